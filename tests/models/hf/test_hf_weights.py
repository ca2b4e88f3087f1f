"""Hugging Face folders are read and written exactly; what cannot be is named in one line."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from record import NEW_TOKENS, PROMPTS, RECORDED, weights_of
from safetensors.numpy import load_file, save_file

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder
from jaxllm.models import build_model
from jaxllm.models.config import LoRAConfig
from jaxllm.models.hf import check_hf, fill_hf, load_hf, save_hf
from jaxllm.models.hf.weights import INDEX
from jaxllm.models.lora import ADAPTERS
from jaxllm.models.quantize import quantize
from jaxllm.parallel.sharding import MeshConfig, batch_sharding, make_mesh, placed
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.training.state import split_params

FAMILIES = json.loads(RECORDED.read_text())


def write_folder(folder, name="qwen3"):
    """The folder that transformers would write for a family."""
    recorded = FAMILIES[name]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(recorded["config"]))
    weights = weights_of(recorded["tensors"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


LENGTHS = np.array([len(prompt) for prompt in PROMPTS])
TOTAL = LENGTHS.max() + NEW_TOKENS
HALF = TOTAL // 2  # what two packed documents have of a row


def all_logits(model, params, tokens):
    """Logits of rows padded on the right and, last, of their beginnings packed into one row; and those of the
    tokens after the prompts, decoded with a cache after a prefill of padded prompts."""
    rows = jnp.concatenate([tokens, tokens[:, :HALF].reshape(1, TOTAL)])
    segment_ids = jnp.zeros_like(rows).at[-1, HALF:].set(1)
    prompts = jnp.where(jnp.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 0)
    cache = model.apply(params, prompts, cache=model.init_cache(*tokens.shape)).cache
    positions = LENGTHS[:, None] + jnp.arange(NEW_TOKENS)
    new = jnp.take_along_axis(tokens, positions, axis=1)
    decoded = model.logits(params, new, positions=positions, cache=cache)
    return model.logits(params, rows, segment_ids=segment_ids), decoded


@pytest.mark.parametrize("name", list(FAMILIES))
def test_greedy_tokens_and_logits_are_those_of_transformers(name, tmp_path):
    write_folder(tmp_path, name)
    config, params = load_hf(tmp_path)
    recorded = FAMILIES[name]
    if config.sliding_window is not None:
        assert config.sliding_window < LENGTHS.min()
    tokens = np.zeros((2, TOTAL), np.int32)
    for row, prompt, greedy in zip(tokens, PROMPTS, recorded["greedy"], strict=True):
        row[: len(prompt) + NEW_TOKENS] = prompt + greedy
    logits, decoded = jax.jit(functools.partial(all_logits, build_model(config)))(params, tokens)
    for row, start in enumerate(LENGTHS):
        end = start + NEW_TOKENS
        np.testing.assert_array_equal(logits[row, start - 1 : end - 1].argmax(-1), recorded["greedy"][row])
        np.testing.assert_allclose(logits[row, end - 1, :8], recorded["logits"][row], atol=1e-4)
        np.testing.assert_allclose(decoded[row, -1, :8], recorded["logits"][row], atol=1e-4)
        np.testing.assert_allclose(decoded[row], logits[row, start:end], atol=2e-4)  # each 1e-4 off at most
        packed = logits[-1, row * HALF : (row + 1) * HALF]
        np.testing.assert_allclose(packed, logits[row, :HALF], atol=2e-4)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_generated_tokens_are_those_of_transformers(name, tmp_path):
    write_folder(tmp_path, name)
    config, params = load_hf(tmp_path)
    sampling = SamplingConfig(0.0, None, None, None, max_new_tokens=NEW_TOKENS)
    keys = jax.random.split(jax.random.key(0), 2)
    found = generate(build_model(config), params, PROMPTS, sampling=sampling, stop_ids=(), keys=keys)
    assert [list(tokens) for tokens in found.tokens] == FAMILIES[name]["greedy"]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_check_of_a_folder_passes_with_and_without_a_head(name, tmp_path):
    weights = write_folder(tmp_path, name)
    check_hf(tmp_path)
    weights.pop("lm_head.weight", None)
    save_file(weights, tmp_path / "model.safetensors")
    check_hf(tmp_path)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_loaded_and_saved_is_bit_identical(name, tmp_path):
    weights = write_folder(tmp_path / "theirs", name)
    save_hf(tmp_path / "ours", *load_hf(tmp_path / "theirs"))
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    renamed = to_llama_names(weights) if name.startswith("phi") else weights
    assert saved.keys() == renamed.keys()
    for key, value in renamed.items():
        np.testing.assert_array_equal(saved[key], value)
    assert load_hf(tmp_path / "ours")[0] == load_hf(tmp_path / "theirs")[0]


def to_llama_names(weights):
    """Phi's tensors as Llama's or Mistral's, as which the same model leaves."""
    split = {}
    for key, value in weights.items():
        if "qkv_proj" in key:
            parts = np.split(value, [32, 48])
            split |= {key.replace("qkv", each): part for each, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in key:
            gate, up = np.split(value, 2)
            split |= {key.replace("gate_up", "gate"): gate, key.replace("gate_up", "up"): up}
        else:
            split[key] = value
    return split


ONE_OF_EACH = {FAMILIES[name]["config"]["model_type"]: name for name in reversed(FAMILIES)}


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_on_a_mesh_parameters_and_logits_are_those_of_one_device(name, tmp_path):
    write_folder(tmp_path, name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, params = load_hf(tmp_path, mesh=mesh)
    _, whole = load_hf(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    greedy, expected = (FAMILIES[name][key][0] for key in ("greedy", "logits"))
    tokens = jax.device_put(np.array([PROMPTS[0] + greedy] * 4), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        logits = jax.jit(build_model(config).logits)(params, tokens)[-1, LENGTHS[0] - 1 :]
    np.testing.assert_array_equal(logits[:-1].argmax(-1), greedy)
    np.testing.assert_allclose(logits[-1, :8], expected, atol=1e-4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_the_text_model_of_one_that_sees_images_is_read(prefix, tmp_path, capsys):
    weights = write_folder(tmp_path / "text", "gemma3")
    (tmp_path / "images").mkdir()
    text = {**FAMILIES["gemma3"]["config"], "tie_word_embeddings": True}
    raw = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "images" / "config.json").write_text(json.dumps(raw | {"vision_config": {}}))
    renamed = {prefix + name.removeprefix("model."): value for name, value in weights.items()}
    for name in ("vision_tower.x", "multi_modal_projector.y", "model.vision_tower.z"):
        renamed[name] = np.zeros(3, np.float32)
    save_file(renamed, tmp_path / "images" / "model.safetensors")
    config, params = load_hf(tmp_path / "images")
    assert capsys.readouterr().out.endswith(
        "images: 3 tensors of the image encoder are not read; the model reads text\n"
    )
    expected, arrays = load_hf(tmp_path / "text")
    assert config == expected
    jax.tree.map(np.testing.assert_array_equal, params, arrays)


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_kernels_are_quantized_while_they_are_read(name, tmp_path):
    write_folder(tmp_path, name)
    config, params = load_hf(tmp_path)
    lora = LoRAConfig(2, 4.0, False, 0.0, "", "nf4")
    shapes = jax.eval_shape(build_model(replace(config, lora=lora)).init, jax.random.key(0))
    wanted = split_params(shapes, ADAPTERS)[1]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for read in (fill_hf(tmp_path, wanted), fill_hf(tmp_path, placed(wanted, mesh))):
        for layer, part in (("attention", "value"), ("mlp", "up"), ("mlp", "down")):
            kernel = read["blocks"][layer][part]["kernel"]
            whole = quantize(params["blocks"][layer][part]["kernel"], "nf4")
            jax.tree.map(np.testing.assert_array_equal, kernel, whole)
        np.testing.assert_array_equal(read["embed"]["table"], params["embed"]["table"])


def test_large_exports_are_split_and_read_back(tmp_path):
    write_folder(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    save_hf(tmp_path / "ours", config, params, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = load_hf(tmp_path / "ours")[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    (tmp_path / "ours" / sorted(set(index["weight_map"].values()))[1]).unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names model-00002-of-.*, which is missing"):
        load_hf(tmp_path / "ours")


def test_bfloat16_stays_bfloat16(tmp_path):
    weights = {name: value.astype(jnp.bfloat16) for name, value in write_folder(tmp_path / "theirs").items()}
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    config, params = load_hf(tmp_path / "theirs")
    assert config.param_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    save_hf(tmp_path / "ours", config, params)
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(np.array_equal(saved[name], value) for name, value in weights.items())
    assert load_hf(tmp_path / "theirs", dtype="float32")[1]["final_norm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "extra would be left out"),
        (
            lambda w: w.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model\.norm\.weight has shape \(3,\); config\.json needs \(32,\)",
        ),
        (lambda w: w.update({"model.norm.weight": np.ones(32)}), "is of type F64; only F32, F16, BF16 are"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(32, np.int8)}),
            "is of type I8; only F32.* unquant",
        ),
    ],
    ids=["missing", "extra", "misshaped", "float64", "int8"],
)
def test_tensors_that_do_not_fit_are_named(damage, message, tmp_path):
    weights = write_folder(tmp_path)
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors")
    for read in (check_hf, load_hf):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            read(tmp_path)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only(folder, name, content=b""):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors cannot be read: "),
        (lambda f: only(f, "notes.txt"), rf"holds neither model\.safetensors nor {INDEX}"),
        (
            lambda f: only(f, "pytorch_model.bin"),
            r"pytorch_model\.bin is a pickle.*from_pretrained.*save_pret",
        ),
        (lambda f: only(f, "consolidated.00.pth"), r"consolidated\.00\.pth is a pickle"),
        (
            lambda f: only(f, INDEX, b'{"weight_map": {"a": "lost.safetensors"}}'),
            "names lost.safetensors, which",
        ),
        (lambda f: only(f, INDEX, b"[]"), "cannot be read: it holds no weight_map"),
        (lambda f: only(f, INDEX, b'{"weight_map"'), "cannot be read: it holds no weight_map"),
        (
            lambda f: only(
                f, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            "it is a Git LFS pointer to the file; run git lfs pull",
        ),
    ],
    ids=["truncated", "absent", "bin", "pth", "lost shard", "index", "cut index", "pointer"],
)
def test_files_that_cannot_be_read_are_named(damage, message, tmp_path):
    write_folder(tmp_path)
    damage(tmp_path)
    assert is_hf_folder(tmp_path)
    for read in (check_hf, load_hf):
        with pytest.raises((CheckpointError, ConfigError), match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_a_folder_with_weights_and_a_damaged_config_is_a_hugging_face_model(tmp_path):
    assert not is_hf_folder(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_ty')
    assert is_hf_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_hf(tmp_path)


def test_float16_is_read_exactly_and_written_again(tmp_path):
    weights = {name: value.astype(np.float16) for name, value in write_folder(tmp_path / "theirs").items()}
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    config, params = load_hf(tmp_path / "theirs")
    assert config.param_dtype == "float32"  # in which float16 is exact; training in it would overflow
    save_hf(tmp_path / "ours", config, params, dtype="float16")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "float16"
    assert {value.dtype for value in saved.values()} == {np.dtype("float16")}
    assert all(np.array_equal(saved[name], value) for name, value in weights.items())


@pytest.mark.parametrize("copy", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_stored_copy_of_a_tied_head_is_not_left_over_and_not_written(copy, tmp_path):
    weights = write_folder(tmp_path / "theirs", "llama3.2")
    copied = {**weights, copy: weights["model.embed_tokens.weight"]}
    save_file(copied, tmp_path / "theirs" / "model.safetensors")
    config, params = load_hf(tmp_path / "theirs")
    assert config.tie_embeddings
    assert "head" not in params
    save_hf(tmp_path / "ours", config, params)
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == weights.keys()


def test_a_model_that_no_family_computes_is_not_exported(tmp_path):
    write_folder(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="no Hugging Face family computes"):
        save_hf(tmp_path / "ours", replace(config, norm_position="both"), params)
    assert not (tmp_path / "ours").exists()
