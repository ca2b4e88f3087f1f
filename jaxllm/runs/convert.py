"""Checkpoints into Hugging Face folders and out of them, and whether both compute the same."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config_versions import stamped
from jaxllm.data.chat_template import NativeTemplate
from jaxllm.data.tokenizer import TOKENIZER_FILE
from jaxllm.data.tokenizer_files import CONFIG_FILE, GENERATION_FILE, json_object
from jaxllm.data.tokenizer_files import TEMPLATE_FILE as CHAT_TEMPLATE_FILE
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder, to_json
from jaxllm.models import build_model
from jaxllm.models.hf import is_reward_model, load_hf, save_hf, saved_dtype
from jaxllm.models.hf.peft import save_peft
from jaxllm.models.hf.weights import MAX_SHARD_BYTES
from jaxllm.models.lora import merge_lora
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.checkpoints import (
    TEMPLATE_FILE,
    LoadedModel,
    checkpoint_template,
    load_checkpoint,
    load_folder,
    read_adapters,
    read_base,
    read_config,
    saved_template,
)
from jaxllm.store import local_copy
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint

TOLERANCE = 1e-3  # of logits in float32


def export_checkpoint(checkpoint: str, output: Path, *, dtype: str | None, max_shard_bytes: int) -> None:
    """Write a checkpoint as a Hugging Face model with its tokenizer and chat template."""
    check_empty(output)
    loaded = load_checkpoint(checkpoint)
    if dtype is None and is_hf_folder(loaded.folder):  # whose float32 parameters hold bfloat16 exactly
        dtype = saved_dtype(loaded.folder)
    config, params = merge_lora(loaded.model.config, loaded.params)
    save_hf(
        output,
        config,
        params,
        tokenizer=tokenizer_files(loaded),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        generation=generation_config(loaded),
    )
    fields = json.loads((output / "config.json").read_bytes())
    lora = loaded.model.config.lora
    merged = "" if lora.rank is None else ", its adapters merged"
    print(f"{checkpoint} as {fields['architectures'][0]} in {output}{merged}")
    if lora.quantize != "none":
        print(
            f"note: the frozen kernels as {lora.quantize} rounded them, with which the adapters were trained"
        )


def export_adapters(checkpoint: str, output: Path) -> None:
    """Write the adapters of a checkpoint in the files of PEFT, with its tokenizer and chat template. A base
    that is a run is written beside as a Hugging Face model, OUTPUT/base."""
    check_empty(output)
    folder = find_checkpoint(checkpoint)
    base = read_base(folder)
    if base is None:
        raise ConfigError(f"--checkpoint={checkpoint} has no adapters: leave out --adapters")
    loaded = load_folder(folder)
    lora, path = loaded.model.config.lora, base.path
    if not is_hf_folder(path):
        path = output.absolute() / "base"
        export_checkpoint(str(base.path), path, dtype=None, max_shard_bytes=MAX_SHARD_BYTES)
    trained = read_adapters(folder, jax.eval_shape(lambda: loaded.params))
    save_peft(output, lora, trained, path, tokenizer_files(loaded))
    print(f"adapters of {checkpoint} in {output}, of rank {lora.rank}, for {path}")
    if lora.quantize != "none":
        print(f"note: the adapters were trained beside kernels in {lora.quantize}, which are not in {path}")


def check_is_hf(folder: str) -> None:
    """ConfigError where a folder is no Hugging Face model."""
    if not is_hf_folder(folder):
        raise ConfigError(
            f"--checkpoint={folder} is no Hugging Face model: it lacks a config.json with model_type"
        )


def check_empty(output: Path) -> None:
    """ConfigError where the folder to write holds something."""
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output={output} is not empty: name a new folder")


def tokenizer_files(loaded: LoadedModel) -> dict[str, bytes]:
    """The files by which transformers encodes and formats conversations as this checkpoint does."""
    tokenizer = loaded.tokenizer
    files = dict(tokenizer.files())
    template = None
    if loaded.conversational:
        template = checkpoint_template(loaded).source or NativeTemplate.AS_JINJA
    if TOKENIZER_FILE in files and CONFIG_FILE not in files:  # sentencepiece
        names = {"pad_token": tokenizer.pad_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            **{name: tokenizer.pieces[i] for name, i in names.items()},
            "unk_token": "<unk>",
            "add_bos_token": False,
            "add_eos_token": False,
            "legacy": False,
            "add_prefix_space": tokenizer.encode("a") != tokenizer.encode_markup("a", after="\n"),
        }
        files[CONFIG_FILE] = to_json(config)
    if template is not None:
        files[CHAT_TEMPLATE_FILE] = template.encode()
    return files


def generation_config(loaded: LoadedModel) -> dict[str, Any]:
    """The ids of special tokens: what ends a completion is all that the chat template ends a turn with. The
    rest is that of the model that it was trained from."""
    tokenizer = loaded.tokenizer
    stop_ids = list(tokenizer.stop_ids)
    if loaded.conversational and loaded.generates:
        stop_ids = list(checkpoint_template(loaded).stop_ids)
    return json_object(tokenizer.files(), GENERATION_FILE) | {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0],
        "pad_token_id": tokenizer.pad_id,
    }


def import_checkpoint(folder: str, output: Path) -> None:
    """Write a Hugging Face model as a run folder with one checkpoint, that of step 0."""
    folder = str(local_copy(folder))
    check_is_hf(folder)
    check_empty(output)
    loaded = load_checkpoint(folder)
    config, dtype = read_config(loaded.folder), saved_dtype(loaded.folder)
    config["model"]["param_dtype"] = dtype
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), loaded.params)
    files = {"config.json": to_json(stamped(config)), **loaded.tokenizer.files()}
    if (template := saved_template(loaded.folder)) is not None:
        files[TEMPLATE_FILE] = Path(template).read_bytes()
    metadata = {
        "model": loaded.kind._asdict(),
        "tokenizer": loaded.tokenizer.hash,
        "metrics": None,
        "from": {"path": str(loaded.folder), "hash": checkpoint_hash(loaded.folder)},
    }
    checkpoints = Checkpoints(output / "checkpoints", keep=1)
    checkpoints.save(0, {"params": params}, metadata, files)
    checkpoints.wait()
    print(f"{folder} as {output / 'checkpoints' / '0'}")


def check_checkpoint(folder: str, *, length: int = 64, new_tokens: int = 64) -> None:
    """Compare a Hugging Face model as transformers and as jaxllm compute it, in float32 on random tokens: the
    largest difference of logits, and how many greedy tokens agree. CheckpointError where they differ."""
    folder = str(local_copy(folder))
    check_is_hf(folder)
    if is_reward_model(folder):
        raise ConfigError(f"--checkpoint={folder} is a reward model; check compares language models")
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("check compares with transformers: pip install 'jaxllm[parity]'") from None
    config, params = load_hf(folder, dtype="float32")
    model = build_model(config)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(length, config.max_length // 2)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(jax.jit(model.logits)(params, tokens))
    difference = float(np.abs(logits - expected).max())
    prompt, count = tokens[0].tolist(), min(new_tokens, config.max_length - length)
    sampling = SamplingConfig(0.0, None, None, None, max_new_tokens=count)
    keys = jax.random.split(jax.random.key(0), 1)
    ours = generate(model, params, [prompt], sampling=sampling, stop_ids=(), keys=keys).tokens[0]
    with torch.no_grad():
        output = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    equal = sum(a == b for a, b in zip(ours, output[0, len(prompt) :].tolist(), strict=True))
    print(f"largest difference of logits {difference:.2g} (they spread by {expected.std():.2g})")
    print(f"{equal} of {count} greedy tokens are equal")
    if difference > TOLERANCE:
        raise CheckpointError(f"{folder}: logits differ from those of transformers by {difference:.2g}")
