"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`, read and written.

A layer's adapters are `base_model.model.LAYER.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank]:
ours, transposed. LAYER is what the family's table calls the layer in the base, a Hugging Face model.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import PEFT_CONFIG, is_hf_folder, to_json, write_file
from jaxllm.models.config import LoRAConfig, ModelConfig
from jaxllm.models.hf.families import Family, Row
from jaxllm.models.hf.weights import load_hf_config, read_hf_config
from jaxllm.models.interface import Params
from jaxllm.parallel.sharding import path_name

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {"CAUSAL_LM": False, "SEQ_CLS": True}  # whether the model has a scalar head
SCORE = "score"  # what transformers calls that head

# Fields that change nothing about what the saved adapters compute.
IGNORED = frozenset(
    {
        *("peft_version", "auto_mapping", "revision", "inference_mode", "fan_in_fan_out"),
        *(
            "target_modules",
            "exclude_modules",
            "layers_pattern",
            "megatron_core",
            "loftq_config",
            "eva_config",
        ),
        *("qalora_group_size", "runtime_config", "ensure_weight_tying"),  # these say how others are used
    }
)
READ = frozenset(
    {
        *(
            "peft_type",
            "task_type",
            "base_model_name_or_path",
            "r",
            "lora_alpha",
            "use_rslora",
            "lora_dropout",
        ),
        *("modules_to_save", "init_lora_weights"),
    }
)
# Ways to initialize that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) subtract from it.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapters(NamedTuple):
    """What an adapter_config.json and the names of the tensors say."""

    lora: LoRAConfig
    base: Path
    scalar: bool  # a reward model's, with its head


def read_peft(folder: str | Path) -> Adapters:
    """The config of a folder with adapters; ConfigError, naming the field, for what is not supported."""
    folder = Path(folder).expanduser()
    try:
        raw = json.loads((folder / PEFT_CONFIG).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG} cannot be read: {error}") from None
    try:
        check_fields(raw)
        base = find_base(folder, raw["base_model_name_or_path"])
        lora = LoRAConfig(
            rank=raw["r"],
            alpha=float(raw["lora_alpha"]),
            rank_stabilized=bool(raw.get("use_rslora")),
            dropout=float(raw.get("lora_dropout") or 0),
            targets="^blocks/(" + "|".join(adapted_layers(folder, base)) + ")$",
            quantize="none",
        )
    except KeyError as error:
        raise ConfigError(f"{folder}: {PEFT_CONFIG}: {error.args[0]} is missing") from None
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    scalar = TASKS[raw["task_type"]]
    if scalar and f"{PREFIX}{SCORE}.weight" not in tensor_names(folder):
        raise CheckpointError(
            f"{folder / WEIGHTS}: {PREFIX}{SCORE}.weight, a reward model's head, is missing"
        )
    return Adapters(lora, base, scalar)


def check_fields(raw: Mapping[str, Any]) -> None:
    """ConfigError for a field that is unknown, or whose value is not supported."""

    def unsupported(name: str, only: str) -> ConfigError:
        return ConfigError(f"{PEFT_CONFIG}: {name}={raw.get(name)!r} is not supported, only {only}")

    if raw.get("peft_type") != "LORA":
        raise unsupported("peft_type", "'LORA'")
    if raw.get("task_type") not in TASKS:
        raise unsupported("task_type", " and ".join(map(repr, TASKS)))
    if raw.get("init_lora_weights") not in INITIALIZATIONS:
        raise unsupported("init_lora_weights", "those that leave the base as it is")
    heads = {SCORE, "classifier"} if TASKS[raw["task_type"]] else set()
    if not set(raw.get("modules_to_save") or ()) <= heads:
        raise unsupported("modules_to_save", "the head of a reward model (score)")
    for name, value in raw.items():
        neutral = value in (None, False, {}, []) or (name == "bias" and value == "none")
        if name not in READ | IGNORED and not neutral:
            raise ConfigError(f"{PEFT_CONFIG}: {name}={value!r} is not supported")


def find_base(folder: Path, named: str | None) -> Path:
    """The Hugging Face model that adapters belong to; ConfigError where it is not on this disk."""
    places = [] if not named else [Path(named).expanduser(), folder / named]
    found = next((place.absolute() for place in places if is_hf_folder(place)), None)
    if found is None:
        raise ConfigError(
            f"{PEFT_CONFIG}: base_model_name_or_path={named!r} is no folder with a Hugging Face model: "
            "download it, and set the field to its path"
        )
    return found


def adapter_rows(family: Family) -> dict[str, Row]:
    """The layers of blocks that may have adapters, by what they are called in the base (`*` is the layer)."""
    kernels = (row for row in family.tensors if row.ours[0].startswith("blocks/"))
    return {row.theirs.removesuffix(".weight"): row for row in kernels if row.ours[0].endswith("/kernel")}


def adapted_layers(folder: Path, base: Path) -> list[str]:
    """Our names (`attention/query`) of the layers that have adapters; ConfigError where blocks differ."""
    family, _ = read_hf_config(base)
    rows, layers = adapter_rows(family), load_hf_config(base).num_layers
    found: dict[str, set[int]] = {}
    for name in tensor_names(folder):
        module = name.removeprefix(PREFIX).removesuffix(".weight")
        if module == SCORE:
            continue
        layer, _, part = module.rpartition(".lora_")
        number = re.search(r"\.(\d+)\.", layer)
        pattern = "" if number is None else layer.replace(number.group(), ".*.", 1)
        if part not in ("A", "B") or pattern not in rows or number is None:
            raise ConfigError(f"{WEIGHTS}: {name} is no adapter of a layer of {family.model_type}")
        found.setdefault(pattern, set()).add(int(number.group(1)))
    if partial := sorted(pattern for pattern, numbers in found.items() if len(numbers) < layers):
        raise ConfigError(
            f"{WEIGHTS}: {partial[0]} has adapters in {len(found[partial[0]])} of {layers} layers; only all "
            "are supported"
        )
    return [
        ours.removeprefix("blocks/").removesuffix("/kernel") for each in found for ours in rows[each].ours
    ]


def tensor_names(folder: Path) -> list[str]:
    """The names in a folder's file of adapters; an error where it cannot be read."""
    with open_adapters(folder) as tensors:
        return sorted(tensors.keys())


def open_adapters(folder: Path) -> Any:
    """The open file of adapters. A context."""
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise ConfigError(
            f"{folder}: adapter_model.bin is a pickle, which could execute code and is not read; save the "
            "adapters with safe_serialization=True"
        )
    try:
        return safe_open(str(file), framework="np")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def load_peft_config(folder: str | Path) -> ModelConfig:
    """The config of the model that a folder's adapters make of their base."""
    found = read_peft(folder)
    return replace(load_hf_config(found.base), lora=found.lora)


def fill_adapters(folder: Path, wanted: Params) -> Params:
    """What a folder of adapters holds of the wanted parameters (shapes), with None in place of the others.
    CheckpointError for a tensor of another shape."""
    base = find_base(folder, json.loads((folder / PEFT_CONFIG).read_bytes())["base_model_name_or_path"])
    rows = adapter_rows(read_hf_config(base)[0])
    theirs = {ours: (name, row.ours) for name, row in rows.items() for ours in row.ours}
    shapes = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    with open_adapters(folder) as tensors:
        names = set(tensors.keys())

        def read(name: str) -> np.ndarray:
            return np.asarray(tensors.get_tensor(name), np.float32).T

        def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array | None:
            ours = path_name(path)
            if ours == "scalar_head/kernel":
                name = f"{PREFIX}{SCORE}.weight"
                return place(read(name), leaf, name) if name in names else None
            layer, _, part = ours.rpartition("/lora/")
            if part not in ("a", "b"):
                return None
            module, fused = theirs[f"{layer}/kernel"]
            pattern = f"{PREFIX}{module}.lora_{part.upper()}.weight"
            if pattern.replace("*", "0") not in names:
                return None
            each = np.stack([read(pattern.replace("*", str(i))) for i in range(leaf.shape[0])])
            if part == "b" and len(fused) > 1:  # one layer of theirs is several of ours, one after the other
                widths = [shapes[name.replace("/kernel", "/lora/b")].shape[-1] for name in fused]
                cuts = np.cumsum(widths)[:-1]
                each = np.split(each, cuts, axis=-1)[fused.index(f"{layer}/kernel")]
            return place(each, leaf, pattern)

        return jax.tree_util.tree_map_with_path(load, wanted)


def place(array: np.ndarray, leaf: jax.ShapeDtypeStruct, name: str) -> jax.Array:
    """The array where the leaf belongs; CheckpointError where it has another shape."""
    if array.shape != leaf.shape:
        raise CheckpointError(f"{WEIGHTS}: {name} has shape {array.shape} (transposed), not {leaf.shape}")
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index].astype(leaf.dtype))


def save_peft(
    folder: Path, lora: LoRAConfig, params: Params, base: Path, files: Mapping[str, bytes] | None = None
) -> None:
    """Write adapters (and the scalar head of a reward model, which they then are) in the files of PEFT.

    Args:
      params: what trained: adapters, and perhaps a scalar head; None in place of all other leaves.
      base: the Hugging Face model that they belong to.
      files: others to write beside, such as those of the tokenizer.

    Raises ConfigError where PEFT's files have no place for them.
    """
    from safetensors.numpy import save_file

    family, _ = read_hf_config(base)
    rows = {ours: (name, row) for name, row in adapter_rows(family).items() for ours in row.ours}
    tensors: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    scalar = False
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        ours = path_name(path)
        layer, _, part = ours.rpartition("/lora/")
        if ours == "scalar_head/kernel":
            scalar = True
            tensors[f"{PREFIX}{SCORE}.weight"] = np.ascontiguousarray(np.asarray(leaf, np.float32).T)
            continue
        if part not in ("a", "b"):
            raise ConfigError(
                f"{ours} trained beside the adapters and has no place in PEFT's files: leave out "
                "--adapters, to export the whole model"
            )
        name, row = rows[f"{layer}/kernel"]
        if len(row.ours) > 1:
            raise ConfigError(
                f"{layer.removeprefix('blocks/')} is a part of {name} in {family.model_type}, which has one "
                "pair of adapters: leave out --adapters, to export the whole model"
            )
        modules.add(name)
        for i, each in enumerate(np.asarray(leaf, np.float32)):
            key = f"{PREFIX}{name.replace('*', str(i))}.lora_{part.upper()}.weight"
            tensors[key] = np.ascontiguousarray(each.T)
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": target_modules(modules, {name for name, _ in rows.values()}),
        "modules_to_save": [SCORE] if scalar else None,
        "bias": "none",
        "fan_in_fan_out": not any(row.transposed for _, row in rows.values()),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in (files or {}).items():
        write_file(folder / name, content)
    write_file(folder / PEFT_CONFIG, to_json(fields))  # last: it makes the folder one of adapters


def target_modules(adapted: set[str], layers: set[str]) -> list[str]:
    """The ends of the names of the adapted layers: as short as leaves out all others."""

    def end(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    others = {end(name, 1) for name in layers - adapted}
    return sorted(end(name, 2 if end(name, 1) in others else 1) for name in adapted)
