"""A trained model from its checkpoint: weights, tokenizer, chat template."""

import json
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import tree_map_with_path

from jaxllm.config import as_dict, parse
from jaxllm.config_versions import upgrade
from jaxllm.data.base_tokenizer import HF_TOKENIZER_FILE
from jaxllm.data.chat_template import ChatTemplate, load_template
from jaxllm.data.tokenizer import TOKENIZER_FILE, BaseTokenizer, check_vocabulary, load_tokenizer
from jaxllm.data.tokenizer_files import has_chat_template
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder, is_peft_folder
from jaxllm.models import Model, ModelConfig, Params, ScalarModel, build_model, build_scalar_model
from jaxllm.models.config import for_platform
from jaxllm.models.hf import fill_hf, is_reward_model, load_hf_config
from jaxllm.models.hf.peft import fill_adapters, load_peft_config, read_peft
from jaxllm.models.lora import ADAPTERS, merge_lora
from jaxllm.models.quantize import is_quantized, quantize, unquantized
from jaxllm.parallel.sharding import MeshConfig, make_mesh, path_name, placed, undivided
from jaxllm.runs.config import factors_of
from jaxllm.store import local_copy, local_path
from jaxllm.training.checkpoint import read_arrays, saved_dtypes
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.parametrization import scaled
from jaxllm.training.state import init_state, is_none, merge_params, split_params
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint

HEADS = ("head", "scalar_head")  # a language model has the first, and lacks the second
TEMPLATE_FILE = "template.jinja"  # of a run whose conversations have another template than the tokenizer's


class ModelKind(NamedTuple):
    """What the parameters of a checkpoint are, whichever stage trained them: `metadata.json` says it."""

    generates: bool  # text; a reward model gives a number instead
    conversational: bool  # reads conversations, by a chat template
    policy_prefix: str  # where in the parameters the model stands; "" where they are one model


# What checkpoints were before their metadata said so (config.json without a version): by stage.
VERSION_1 = {
    "pretrain": ModelKind(generates=True, conversational=False, policy_prefix=""),
    "reward_model": ModelKind(generates=False, conversational=True, policy_prefix=""),
    "ppo": ModelKind(generates=True, conversational=True, policy_prefix="policy"),
}
VERSION_1 |= dict.fromkeys(("sft", "dpo", "grpo"), ModelKind(True, True, ""))


class LoadedModel(NamedTuple):
    """A model as a checkpoint holds it. One that generates is a Model, any other a ScalarModel."""

    folder: Path
    kind: ModelKind
    model: Any
    params: Params
    mesh: Mesh  # that the parameters are on
    tokenizer: BaseTokenizer
    metadata: dict[str, Any]

    @property
    def generates(self) -> bool:
        return self.kind.generates

    @property
    def conversational(self) -> bool:
        return self.kind.conversational


T = TypeVar("T", LoadedModel, ModelKind)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run or of a step folder, under today's names whichever version wrote it; of a Hugging
    Face model, that of the model alone."""
    if is_hf_folder(folder):
        return {"model": as_dict(load_hf_config(folder)), "seed": 0}
    if is_peft_folder(folder):
        return {"model": as_dict(load_peft_config(folder)), "seed": 0}
    try:
        return upgrade(json.loads((folder / "config.json").read_bytes()))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_model(folder: Path) -> ModelConfig:
    """The model of any folder that `read_config` reads."""
    return parse(ModelConfig, read_config(folder)["model"], "model")


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a run saved with the arrays of a step folder; nothing in a Hugging Face model or adapters."""
    if is_hf_folder(folder) or is_peft_folder(folder):
        return {}
    return json.loads((folder / "metadata.json").read_bytes())


def read_kind(folder: Path) -> ModelKind:
    """What the parameters of a step folder are."""
    if (adapters := is_peft_folder(folder)) or is_hf_folder(folder):
        scalar = read_peft(folder).scalar if adapters else is_reward_model(folder)
        return ModelKind(not scalar, has_chat_template(tokenizer_folder(folder)), policy_prefix="")
    metadata = read_metadata(folder)
    if "model" in metadata:
        return ModelKind(**metadata["model"])
    return VERSION_1[read_config(folder)["stage"]]


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer and the chat template of a checkpoint are: adapters may have their base's."""
    own = any((folder / name).exists() for name in (HF_TOKENIZER_FILE, TOKENIZER_FILE))
    return read_peft(folder).base if is_peft_folder(folder) and not own else folder


class Base(NamedTuple):
    """The checkpoint with the frozen weights that adapters belong to."""

    path: Path  # a step folder, or a Hugging Face model
    hash: str | None  # None: unknown, as PEFT's files say none

    def hashed(self) -> "Base":
        """With the hash of its content, which is read where it is unknown."""
        return self._replace(hash=self.hash or checkpoint_hash(self.path))


def read_base(folder: Path) -> Base | None:
    """The base of a folder that holds adapters alone; None where it holds all parameters."""
    if is_peft_folder(folder):
        return Base(read_peft(folder).base, hash=None)
    base = read_metadata(folder).get("base")
    return None if base is None else Base(local_path(base["path"]), base["hash"])


def read_policy(folder: Path, wanted: Any, optional: Collection[str] = ()) -> Params:
    """The parameters of the model in a step folder that generates or scores: PPO's hold a critic besides.

    `wanted` and `optional` are as in `read_arrays`, but floats are cast. Wanted adapters that the folder does
    not have are None; adapters that it has and that are not wanted are merged into their kernels.
    """
    base, (adapters, rest) = read_base(folder), split_params(wanted, ADAPTERS)
    if base is None:
        return read_all(folder, rest, optional)
    if not jax.tree.leaves(adapters):
        return read_merged(folder, wanted, optional)
    return merge_params(
        read_adapters(folder, wanted, optional), read_base_params(base, folder, rest, optional)
    )


def read_all(folder: Path, wanted: Any, optional: Collection[str] = ()) -> Params:
    """`read_policy` of a folder that holds all parameters."""
    if is_hf_folder(folder):
        return fill_hf(folder, wanted, optional)
    return read_cast(folder, wanted, policy_name(folder), optional)


def policy_name(folder: Path) -> str:
    """Where in a step folder the parameters stand that `read_policy` reads."""
    return "/".join(filter(None, ("params", read_kind(folder).policy_prefix)))


def read_cast(folder: Path, wanted: Any, prefix: str, optional: Collection[str] = ()) -> Params:
    """`read_arrays`, with floats cast to the dtypes that are wanted, and kernels quantized that are wanted
    so: one after the other, so that no two are in memory in the dtype they were saved in."""
    saved = saved_dtypes(folder, prefix)

    def is_changed(name: str, leaf: Any) -> bool:
        if is_quantized(leaf):
            return True
        dtype = jnp.dtype(saved.get(name, leaf.dtype))
        both_float = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return both_float and dtype != leaf.dtype

    def read_changed(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_name(path)
        if name not in changed:
            return None
        dtype, kernel = saved.get(name, "float32"), f"{prefix}/{name}"
        if not is_quantized(leaf):
            return read_arrays(folder, leaf.update(dtype=jnp.dtype(dtype)), prefix=kernel).astype(leaf.dtype)
        array = read_arrays(folder, unquantized(leaf, dtype), prefix=kernel)
        places = jax.tree.map(lambda x: x.sharding or array.sharding, leaf)
        return jax.jit(quantize, static_argnums=1, out_shardings=places)(array, leaf.kind)

    leaves = jax.tree_util.tree_leaves_with_path(wanted, is_leaf=is_quantized)
    changed = {path_name(path) for path, leaf in leaves if is_changed(path_name(path), leaf)}
    same = tree_map_with_path(
        lambda path, x: None if path_name(path) in changed else x, wanted, is_leaf=is_quantized
    )
    read = read_arrays(folder, same, prefix=prefix, optional=(*optional, *changed))
    apart = tree_map_with_path(read_changed, wanted, is_leaf=is_quantized)
    return jax.tree.map(lambda x, y: y if x is None else x, read, apart, is_leaf=is_none)


def read_adapters(folder: Path, wanted: Any, optional: Collection[str] = ()) -> Params:
    """What a folder with adapters holds of the wanted parameters, with None in place of the others."""
    if is_peft_folder(folder):
        return fill_adapters(folder, wanted)
    prefix = policy_name(folder)
    saved = saved_dtypes(folder, prefix)
    own = tree_map_with_path(lambda path, leaf: leaf if path_name(path) in saved else None, wanted)
    return read_cast(folder, own, prefix, (*optional, *HEADS))


def read_base_params(base: Base, adapters: Path | str, wanted: Any, optional: Collection[str] = ()) -> Params:
    """The frozen parameters that `adapters` belong to. CheckpointError where they are gone or others."""
    if not local_copy(base.path).exists():
        raise CheckpointError(
            f"{adapters} holds adapters of {base.path}, which is missing: move it back, or put a link there"
        )
    found = find_checkpoint(base.path)  # none of its files is damaged
    if base.hash is not None and checkpoint_hash(found) != base.hash:
        raise CheckpointError(
            f"{adapters} holds adapters of {base.path}, which has changed since: its hash was {base.hash}"
        )
    return read_policy(base.path, wanted, (*optional, *HEADS))


def read_merged(folder: Path, wanted: Any, optional: Collection[str] = ()) -> Params:
    """The parameters of a folder with adapters as those of a model without, which computes the same."""
    config = read_model(folder)
    abstract = jax.eval_shape(build_model(config).init, jax.random.key(0))["blocks"]
    sharding = jax.tree.leaves(wanted)[0].sharding
    if isinstance(sharding, NamedSharding):
        abstract = placed(abstract, cast(Mesh, sharding.mesh))
    params = read_policy(folder, wanted | {"blocks": abstract}, optional)
    blocks = merge_lora(config, {"blocks": params["blocks"]})[1]["blocks"]
    return params | {"blocks": jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), blocks, wanted["blocks"])}


# The mesh that a model is loaded on, or what chooses it for the model; None: this process's first device.
OnMesh = Mesh | Callable[[ModelConfig], Mesh] | None


def load_checkpoint(
    path: str | Path | None, mesh: OnMesh = None, *, dtype: str | None = None, untrained: bool = False
) -> LoadedModel:
    """The newest valid checkpoint of a run folder (RUN/best: its best).

    Of PPO's two models this is the policy. `dtype`: of parameters and computation; None: as it was trained.
    `untrained`: the random weights at step 0 of a run with this config and no --init_from.
    """
    if path is None:
        raise ConfigError("--checkpoint=RUN_FOLDER is missing")
    return load_folder(find_checkpoint(path), mesh, dtype=dtype, untrained=untrained)


def load_folder(
    folder: Path, mesh: OnMesh = None, *, dtype: str | None = None, untrained: bool = False
) -> LoadedModel:
    """`load_checkpoint` of a step folder that `find_checkpoint` has found to be whole."""
    kind = read_kind(folder)
    trained, config = read_model(folder), loaded_config(folder, dtype)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    build = build_model if kind.generates else build_scalar_model
    model: Model | ScalarModel = build(config)
    if mesh is None:
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    elif not isinstance(mesh, Mesh):
        mesh = mesh(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    wanted = placed(shapes, mesh)
    if names := undivided(shapes, mesh):
        print(
            f"note: {folder}: {len(names)} of {len(jax.tree.leaves(shapes))} arrays, such as {names[0]}, are "
            f"whole on each of {mesh.size} devices: their sizes are not divisible",
            file=sys.stderr,
        )
    if untrained:
        params = random_params(folder, build(trained), wanted)
    else:
        params = read_policy(folder, wanted)
    return LoadedModel(folder, kind, model, params, mesh, tokenizer, read_metadata(folder))


def random_params(folder: Path, model: Model | ScalarModel, wanted: Any) -> Params:
    """The parameters at step 0 of a run with the config of a folder and no --init_from, cast and placed."""
    config = read_config(folder)
    init = factors_of(parse(OptimizerConfig, config["optimizer"], "optimizer"), model.config).init
    places = jax.tree.map(lambda x: x.sharding, wanted)
    made = jax.jit(lambda key: scaled(model.init(key), init), out_shardings=places)
    params = init_state(jax.random.key(config["seed"]), init=made, optimizer=optax.identity()).params
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), params, wanted)


def loaded_config(folder: Path, dtype: str | None) -> ModelConfig:
    """The model of a folder as this machine computes it, in `dtype`, as in `load_checkpoint`."""
    config = for_platform(read_model(folder), jax.default_backend())
    if dtype is None:
        return config
    # Of the implementations of attention, cuDNN's alone does not support float32.
    attention = "xla" if (config.attention, dtype) == ("cudnn", "float32") else config.attention
    return replace(config, param_dtype=dtype, compute_dtype=dtype, attention=attention)


def inference_dtype(flag: str | None) -> str | None:
    """What --dtype stands for, as `load_checkpoint` takes it: by default bfloat16, but on CPUs, which compute
    float32 as fast, that of the training."""
    return flag or (None if jax.default_backend() == "cpu" else "bfloat16")


def local_mesh(config: ModelConfig) -> Mesh:
    """All devices of this process: along `tensor` as many as divide key-value heads and MLP, so that each
    computes its own, and the others along `fsdp`."""
    devices = jax.local_devices()
    tensor = math.gcd(len(devices), config.num_kv_heads, config.mlp_width)
    return make_mesh(MeshConfig(data=1, fsdp=-1, tensor=tensor), devices)


def read_tokenizer(folder: Path) -> BaseTokenizer:
    """The tokenizer of a checkpoint."""
    return load_tokenizer(tokenizer_folder(folder))


def checkpoint_template(loaded: LoadedModel, options: Sequence[str] = ()) -> ChatTemplate:
    """The template of the conversations that the checkpoint was trained on, with its clock. `options` are
    NAME=VALUE, as in `load_template`."""
    clock = loaded.metadata.get("clock")
    return load_template(loaded.tokenizer, saved_template(loaded.folder), clock, options)


def saved_template(folder: Path) -> str | None:
    """The file of a folder with its chat template, where that is neither the tokenizer's nor our own."""
    file = tokenizer_folder(folder) / TEMPLATE_FILE
    return str(file) if file.exists() else None


def check_generates(loaded: T, flag: str) -> T:
    """The checkpoint that `flag` names, loaded or its kind alone; ConfigError where it is a reward model."""
    if not loaded.generates:
        raise ConfigError(f"{flag} is a reward model and cannot generate; pass a policy checkpoint")
    return loaded


def check_scores(loaded: T, flag: str) -> T:
    """The checkpoint that `flag` names, loaded or its kind alone; ConfigError where it is no reward model."""
    if loaded.generates:
        raise ConfigError(f"{flag} is not a reward model; pass the run of one")
    return loaded
