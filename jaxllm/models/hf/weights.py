"""Hugging Face checkpoints, safetensors only, to our parameters and back."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import to_json, write_file
from jaxllm.models.config import ModelConfig, check_model_config
from jaxllm.models.heads import build_scalar_model
from jaxllm.models.hf.families import Family, Row, family_of, find_family, make_config, text_model
from jaxllm.models.interface import Params
from jaxllm.models.quantize import Quantized, is_quantized, quantize, unquantized
from jaxllm.models.transformer import build_model
from jaxllm.parallel.sharding import path_name, placed

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
# Buffers that some checkpoints hold beside their weights.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# Of a model that sees images, whose text model alone is read.
IMAGES = tuple(
    f"{prefix}{name}." for prefix in ("", "model.") for name in ("vision_tower", "multi_modal_projector")
)
HEADS = ("head/", "scalar_head/")
DTYPES = ("F32", "F16", "BF16")


def read_hf_config(folder: str | Path) -> tuple[Family, dict[str, Any]]:
    """The family of a folder and its config.json; CheckpointError where that cannot be read."""
    file = Path(folder).expanduser() / "config.json"
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no JSON object")
    try:
        raw = text_model(raw)
        return find_family(raw), raw
    except ConfigError as error:
        raise ConfigError(f"{file.parent}: {error}") from None


def load_hf_config(folder: str | Path) -> ModelConfig:
    """The config of a folder's model; how it is computed (remat, attention, dtypes) is the plainest."""
    family, raw = read_hf_config(folder)
    try:
        config = make_config(family.read(raw))
        check_model_config(config)
        return config
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{folder}: config.json has a field of a wrong type: {error}") from None


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder's model has a scalar head; ConfigError for a head of another size."""
    _, raw = read_hf_config(folder)
    if not str(next(iter(raw.get("architectures") or [""]))).endswith("ForSequenceClassification"):
        return False
    labels = raw.get("num_labels", len(raw.get("id2label") or {}) or 2)
    if labels != 1:
        raise ConfigError(f"{folder}: a reward model has one label, this one has {labels}")
    return True


class TensorFiles:
    """The tensors of a folder, read lazily and in slices. A context: it closes the files."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder, self.stack = folder, ExitStack()
        self.slices: dict[str, Any] = {}
        for file in tensor_files(folder):
            try:
                opened = self.stack.enter_context(safe_open(str(file), framework="np"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read: {reason(file, error)}") from None
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                self.slices[name] = opened.get_slice(name)

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def weights(self) -> set[str]:
        """The names of the tensors that are no buffers."""
        return {name for name in self.slices if not name.endswith(BUFFERS)}

    @property
    def dtype(self) -> str:
        """The parameters' dtype that holds every tensor exactly."""
        kinds = {self.slices[name].get_dtype() for name in self.weights}
        return "bfloat16" if kinds == {"BF16"} else "float32"


def reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read, in one line."""
    with file.open("rb") as opened:
        if opened.read(23) == b"version https://git-lfs":
            return "it is a Git LFS pointer to the file; run git lfs pull"
    return str(error).partition("\n")[0]


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; an error, with the way out, where none or not all are there."""
    if (index := folder / INDEX).exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{index} cannot be read: it holds no weight_map of files by tensor"
            ) from None
        if missing := [name for name in names if not (folder / name).exists()]:
            raise CheckpointError(f"{folder}: {INDEX} names {missing[0]}, which is missing")
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise ConfigError(
            f"{folder}: {pickles[0].name} is a pickle, which could execute code and is not read; convert it "
            "where transformers is installed: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def load_hf(
    folder: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """The config and the parameters of a folder with a Hugging Face checkpoint in safetensors.

    Of a `...ForSequenceClassification` with one label, the parameters have a `scalar_head` and no `head`.
    Every tensor is read in slices, straight to where it belongs: the host holds one layer of one array at a
    time.

    Args:
      dtype: of the parameters; None keeps that of the tensors. float16 and a mixture become float32, which
        holds them exactly; `save_hf(dtype="float16")` writes the same float16 again.
      mesh: the devices to shard over; None: JAX's default device.

    Raises ConfigError for a model that is not supported, CheckpointError for tensors that are missing, left
    over or of another shape than config.json says.
    """
    folder = Path(folder).expanduser()
    config = load_hf_config(folder)
    build = build_scalar_model if is_reward_model(folder) else build_model
    with TensorFiles(folder) as files:
        config = replace(config, param_dtype=dtype or files.dtype)
        abstract = jax.eval_shape(build(config).init, jax.random.key(0))
        return config, fill(files, abstract if mesh is None else placed(abstract, mesh))


def check_hf(folder: str | Path) -> None:
    """Raise what `load_hf` would, from the headers of the files alone. A head may be missing, because not
    every use of a folder needs it."""
    folder = Path(folder).expanduser()
    config, (family, _) = load_hf_config(folder), read_hf_config(folder)
    with TensorFiles(folder) as files:
        match(family, jax.eval_shape(build_model(config).init, jax.random.key(0)), files, HEADS)


def saved_dtype(folder: str | Path) -> str:
    """What `load_hf` takes for the parameters' dtype unless it is given one."""
    with TensorFiles(Path(folder).expanduser()) as files:
        return files.dtype


def fill_hf(folder: str | Path, wanted: Params, optional: Collection[str] = ()) -> Params:
    """The parameters of a folder as a tree like `wanted`, of `jax.ShapeDtypeStruct`s: in their dtypes, where
    their shardings say (default: the first device). Kernels that are wanted `Quantized` are quantized layer
    by layer. Those under `optional` names may be missing on either side, and are None where the folder has
    none. Raises as `load_hf` does."""
    with TensorFiles(Path(folder).expanduser()) as files:
        return fill(files, wanted, optional)


def fill(files: TensorFiles, wanted: Params, optional: Collection[str] = ()) -> Params:
    """`fill_hf` of open files."""
    family, _ = read_hf_config(files.folder)
    loaders = match(family, wanted, files, optional)
    if images := sum(name.startswith(IMAGES) for name in files.slices):
        print(
            f"note: {files.folder}: {images} tensors of the image encoder are not read; the model reads text"
        )

    def load(path: tuple[Any, ...], leaf: Leaf) -> Any:
        loader = loaders[path_name(path)]
        return None if loader is None else loader(leaf)

    return jax.tree_util.tree_map_with_path(load, wanted, is_leaf=is_quantized)


Leaf = jax.ShapeDtypeStruct | Quantized
Loader = Callable[[Leaf], Any]


def match(
    family: Family, wanted: Params, files: TensorFiles, optional: Collection[str]
) -> dict[str, Loader | None]:
    """What loads each of our arrays, by its path; CheckpointError where tensors and arrays do not match."""
    found = jax.tree_util.tree_leaves_with_path(wanted, is_leaf=is_quantized)
    leaves = {path_name(path): leaf for path, leaf in found}
    rename = renaming(family, files)
    used: set[str] = set()
    loaders: dict[str, Loader | None] = {}
    for row in rows_of(family, leaves):
        if row.ours[0].startswith(tuple(optional)) and rename(row.theirs) not in files.slices:
            loaders[row.ours[0]] = None
            continue
        ends = np.cumsum([leaves[path].shape[-1] for path in row.ours])
        for path, end in zip(row.ours, ends, strict=True):
            leaf, stacked = leaves[path], path.startswith("blocks/")
            count = leaf.shape[0] if stacked else 1
            names = [rename(row.theirs.replace("*", str(layer))) for layer in range(count)]
            shape = (*leaf.shape[int(stacked) : -1], int(ends[-1]))
            for name in names:
                check_tensor(files, name, shape[::-1] if row.transposed else shape)
            used.update(names)
            loaders[path] = make_loader(files, names, row.transposed, int(end) - leaf.shape[-1], stacked)
    if missing := set(leaves) - set(loaders):
        raise ConfigError(f"{files.folder}: {min(missing)} has no tensor in the family {family.model_type}")
    for row in family.tensors:  # what is not wanted: a tied head, which is a copy, and what is optional
        tied = row.ours == ("head/kernel",) and "head/kernel" not in leaves
        if tied or row.ours[0].startswith(tuple(optional)):
            used |= {row.theirs, f"language_model.{row.theirs}"}
    if left := [name for name in files.weights - used if not name.startswith(IMAGES)]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"{files.folder}: {min(left)}{more} would be left out: config.json has no place for it"
        )
    return loaders


def renaming(family: Family, files: TensorFiles) -> Callable[[str], str]:
    """Their names as in these files: without the prefix where a model was saved without its head, with a
    longer one where the model sees images."""
    first = family.tensors[0].theirs
    prefix = first.partition(".")[0] + "."
    for other in ("", f"language_model.{prefix}", f"{prefix}language_model."):
        if other + first.removeprefix(prefix) in files.slices:
            return lambda name, other=other: (
                other + name.removeprefix(prefix) if name.startswith(prefix) else name
            )
    return lambda name: name


def rows_of(family: Family, leaves: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a family's table for arrays that a model has."""
    return (row for row in family.tensors if row.ours[0] in leaves)


def check_tensor(files: TensorFiles, name: str, shape: tuple[int, ...]) -> None:
    """CheckpointError where a tensor is missing or has another shape, ConfigError for another type."""
    if name not in files.slices:
        raise CheckpointError(f"{files.folder}: tensor {name} is missing")
    if (kind := files.slices[name].get_dtype()) not in DTYPES:
        raise ConfigError(
            f"{files.folder}: tensor {name} is of type {kind}; only {', '.join(DTYPES)} are supported: save "
            f"the model unquantized"
        )
    if (found := tuple(files.slices[name].get_shape())) != shape:
        raise CheckpointError(f"{files.folder}: tensor {name} has shape {found}; config.json needs {shape}")


def make_loader(files: TensorFiles, names: list[str], transposed: bool, start: int, stacked: bool) -> Loader:
    """Loads an array from the tensor of each layer: the part of its last axis that begins at `start`."""

    def load(leaf: Leaf) -> Any:
        kernel = unquantized(leaf, "float32") if isinstance(leaf, Quantized) else leaf
        shape, dtype = kernel.shape[int(stacked) :], kernel.dtype
        first_device = SingleDeviceSharding(jax.local_devices()[0])
        sharding: Any = kernel.sharding or first_device
        place = sharding  # of one layer
        if stacked and isinstance(sharding, NamedSharding):
            place = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

        def layer(name: str) -> jax.Array:
            def read(index: Any) -> np.ndarray:
                ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
                parts = [slice(each.start, each.stop) for each in ranges]
                parts[-1] = slice(parts[-1].start + start, parts[-1].stop + start)
                part = files.slices[name][tuple(reversed(parts)) if transposed else tuple(parts)]
                return np.asarray(part.T if transposed else part, dtype)

            return jax.make_array_from_callback(shape, place, read)

        if not stacked:
            return layer(names[0])
        places = jax.tree.map(lambda x: x.sharding or first_device, leaf)
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), leaf)  # noqa: E731
        array = jax.jit(zeros, out_shardings=places)()
        for i, name in enumerate(names):
            array = write_layer(array, layer(name), i)
        return array

    return load


def _write_layer(array: Any, layer: jax.Array, i: int) -> Any:
    written = quantize(layer, array.kind) if isinstance(array, Quantized) else layer
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), array, written)


write_layer = jax.jit(_write_layer, donate_argnums=0)


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint in the layout of transformers; parameters with a `scalar_head` leave as a
    `...ForSequenceClassification` with one label.

    Args:
      tokenizer: its files by name, which are written beside it.
      dtype: of the tensors; None keeps that of the parameters.
      generation: the content of generation_config.json, such as the ids of stop tokens.

    Raises ConfigError where no family of Hugging Face's computes what the config says.
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser()
    family = family_of(config)
    scalar = "scalar_head" in params
    fields = family.write(config)
    fields["architectures"] = [family.architecture_of(scalar=scalar)]
    fields["torch_dtype"] = dtype or config.param_dtype
    if scalar:
        fields |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    fields |= {
        name: value for name, value in sorted((generation or {}).items()) if name.endswith("_token_id")
    }
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(family, config, params, dtype, max_shard_bytes)
    names, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: make() for name, (make, _) in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += sum(size for _, size in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_file(folder / INDEX, to_json(index))
    for name, content in (tokenizer or {}).items():
        write_file(folder / name, content)
    if generation is not None:
        write_file(folder / "generation_config.json", to_json(dict(generation)))
    write_file(folder / "config.json", to_json(fields))  # last: it makes the folder a model


def plan_shards(
    family: Family, config: ModelConfig, params: Params, dtype: str | None, limit: int
) -> list[dict[str, tuple[Callable[[], np.ndarray], int]]]:
    """What makes each tensor, and its bytes, in groups of at most `limit` bytes."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    covered = {path for row in rows_of(family, leaves) for path in row.ours}
    if missing := set(leaves) - covered:
        raise ConfigError(f"{min(missing)} has no place in the family {family.model_type}")
    target = (
        ml_dtypes.bfloat16 if (dtype or config.param_dtype) == "bfloat16" else np.dtype(dtype or "float32")
    )
    shards: list[dict[str, tuple[Callable[[], np.ndarray], int]]] = [{}]
    size = 0
    for row in rows_of(family, leaves):
        parts = [leaves[path] for path in row.ours]
        stacked = row.ours[0].startswith("blocks/")
        for layer in range(parts[0].shape[0] if stacked else 1):

            def make(parts=parts, row=row, layer=layer, stacked=stacked) -> np.ndarray:
                found = [np.asarray(part[layer] if stacked else part) for part in parts]
                joined = np.concatenate(found, axis=-1) if len(found) > 1 else found[0]
                return np.ascontiguousarray(joined.T if row.transposed else joined, dtype=target)

            numbers = sum(math.prod(part.shape) for part in parts) // (parts[0].shape[0] if stacked else 1)
            bytes_ = numbers * np.dtype(target).itemsize
            if shards[-1] and size + bytes_ > limit:
                shards.append({})
                size = 0
            shards[-1][row.theirs.replace("*", str(layer))] = (make, bytes_)
            size += bytes_
    return shards
