"""The device mesh, and the table of rules that shards every array of a run over it.

Four axes: `data` replicates the model; `fsdp` shards parameters, which are gathered when they are used;
`sequence` splits the tokens of each row (jaxllm/parallel/sequence.py); `tensor` shards attention heads and
the hidden units of MLPs. Batches are sharded over `data` and `fsdp`.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import ConfigError

Device = Any  # a jax.Device, which is no type to type checkers

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = P(("data", "fsdp"))


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; at most one may be -1, which takes the remaining devices."""

    data: int
    fsdp: int
    tensor: int
    sequence: int = 1


# Pattern -> mesh axis of each dimension. The pattern is searched for in the path of a leaf, such as
# "params/blocks/mlp/up/kernel". The path of an optimizer moment ends with that of its parameter, so one rule
# covers both. The parameters of blocks are stacked: their first dimension is the layer. Each leaf of the
# state matches exactly one rule.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/table$", P("tensor", "fsdp")),
    (r"embed/positions$", P(None, "fsdp")),
    (r"(^|/)head/kernel$", P("fsdp", "tensor")),
    (r"scalar_head/kernel$", P("fsdp", None)),
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
    (r"attention/(query|key|value)/bias$", P(None, "tensor")),
    (r"attention/output/kernel$", P(None, "tensor", "fsdp")),
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r"(attention/output|mlp/down)/bias$", P()),
    (r"_norm/(scale|bias)$", P()),
    (r"(query|key|value|gate|up)/kernel/(codes|scales)$", P(None, "fsdp", None, "tensor")),
    (r"(output|down)/kernel/(codes|scales)$", P(None, "tensor", None, "fsdp")),
    (r"(query|key|value|gate|up)/lora/a$", P(None, "fsdp", None)),
    (r"(query|key|value|gate|up)/lora/b$", P(None, None, "tensor")),
    (r"(output|down)/lora/a$", P(None, "tensor", None)),
    (r"(output|down)/lora/b$", P(None, None, "fsdp")),
    (r"(^|/)(step|key|skipped_steps|bad_streak|count|ns_coeffs)$", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """The mesh of these devices (default: all); ConfigError where their number does not match the config."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    invalid = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if invalid or len(free) > 1:
        raise ConfigError(f"mesh: each size must be 1 or more, and at most one of them -1; got {sizes}")
    fixed = {axis: size for axis, size in sizes.items() if size != -1}
    taken, product = math.prod(fixed.values()), " x ".join(f"{axis}={size}" for axis, size in fixed.items())
    if free and len(devices) % taken:
        raise ConfigError(f"mesh: {len(devices)} devices are not divisible by {product}; change these sizes")
    if free:
        sizes[free[0]] = len(devices) // taken
    elif taken != len(devices):
        raise ConfigError(
            f"mesh: {product} is {taken} devices, but there are {len(devices)}; "
            "set one size to -1 to take the remaining devices"
        )
    # Explicit axis types, JAX's default, would require a sharding for every operation of the model.
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        return Mesh(across_slices(tuple(sizes.values()), len(slices), devices), AXES, axis_types=axis_types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)


def across_slices(shape: tuple[int, ...], slices: int, devices: Sequence[Device]) -> np.ndarray:
    """The devices of several slices (TPU) or hosts (GPU) as an array [data, fsdp, sequence, tensor] in which
    the slow network between these lies along `data`, the outermost axis; what it cannot take, along the next.

    ConfigError where `tensor`, which communicates in every layer, would have to cross slices.
    """
    left, outer = slices, []
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1 or outer[-1] > 1:
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ConfigError(
            f"mesh: {sizes} over {slices} slices or hosts would split tensor over the network between them; "
            f"make mesh.data or mesh.fsdp divisible by {slices}"
        )
    inner = [size // times for size, times in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)


def order_of_devices(mesh: Mesh) -> str:
    """`data x fsdp x sequence x tensor = [[[[0.0 0.1]]] [[[1.0 1.1]]]]`: PROCESS.DEVICE along the axes."""
    ids: dict[int, list[int]] = {}
    for device in mesh.devices.flat:
        ids[device.process_index] = sorted([*ids.get(device.process_index, []), device.id])

    def name(device: Device) -> str:
        return f"{device.process_index}.{ids[device.process_index].index(device.id)}"

    names = str(np.vectorize(name, otypes=[object])(mesh.devices)).replace("'", "")
    return f"{' x '.join(mesh.axis_names)} = {' '.join(names.split())}"


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text: `params/blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matching(pattern: str, params: Any) -> Any:
    """A tree of bool with the structure of params: whether the pattern is found in the parameter's path."""

    def matches(path: tuple[Any, ...], _: object) -> bool:
        return re.search(pattern, path_name(path)) is not None

    return jax.tree_util.tree_map_with_path(matches, params)


def rule_for(path: str) -> P:
    """The spec of the one rule that the path matches; ValueError where no rule or several match."""
    matches = [(pattern, spec) for pattern, spec in RULES if re.search(pattern, path)]
    if len(matches) != 1:
        found = "no rule" if not matches else f"rules {[pattern for pattern, _ in matches]}"
        raise ValueError(
            f"{path} matches {found} of jaxllm.parallel.sharding.RULES; it must match exactly one"
        )
    return matches[0][1]


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf (array or ShapeDtypeStruct) of a state tree.

    A dimension that is not divisible by its mesh axis (an odd vocabulary over tensor=4) is not sharded; a
    line in the log says so.
    """

    def resolve(path: tuple[Any, ...], leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        axes = []
        for size, axis in zip(leaf.shape, rule_for(name), strict=False):
            if axis is not None and size % mesh.shape[axis]:
                logging.info(
                    "%s: dimension %d is not divisible by mesh.%s=%d; not sharded",
                    name,
                    size,
                    axis,
                    mesh.shape[axis],
                )
                axis = None
            axes.append(axis)
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(resolve, tree)


def placed(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The ShapeDtypeStructs of a tree with their shardings: the target that a checkpoint is restored to."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def undivided(tree: Any, mesh: Mesh) -> list[str]:
    """The leaves that a rule shards, but that are whole on each device: none of their sizes is divisible."""

    def is_sharded_by_rule(name: str) -> bool:
        return any(axis is not None and mesh.shape[axis] > 1 for axis in rule_for(name))

    found = jax.tree_util.tree_leaves_with_path(shardings(tree, mesh))
    names = [path_name(path) for path, sharding in found if sharding.is_fully_replicated]
    return [name for name in names if is_sharded_by_rule(name)]


def whole(tree: Any, mesh: Mesh) -> Any:
    """The shardings of a tree without `fsdp`: replicated over it, so that no use gathers a parameter."""

    def without_fsdp(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in sharding.spec)))

    return jax.tree.map(without_fsdp, shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Constrain the sharding of an array inside jit, under `jax.set_mesh`.

    Without a mesh, or where the first dimension is not divisible, the compiler decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return x
    leading = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in leading if axis):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


# Positions that attention and matrix products of a platform compute together.
POSITIONS = {"cpu": 8, "gpu": 64, "tpu": 128}


def width_multiple(mesh: Mesh) -> int:
    """What the width of a batch should be a multiple of: whole tiles on every device."""
    return POSITIONS.get(mesh.devices.flat[0].platform, 8) * mesh.shape["sequence"]
