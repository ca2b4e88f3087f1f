"""The device mesh, and the table that says how every array of a run lies on it.

Three axes. `data` repeats the model, `fsdp` splits parameters and gathers them when used,
`tensor` splits heads and hidden units. Batches are split over `data` and `fsdp` together.
"""

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what is left."""

    data: int
    fsdp: int
    tensor: int


# Path pattern -> axes, searched in the path of a leaf ("params/blocks/mlp/up/kernel"). Optimizer
# moments end with the path of their parameter, so one row covers a parameter and its moments.
# Blocks are stacked: their leading axis is the layer. Each leaf of a state matches exactly one row.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/table$", P("tensor", "fsdp")),
    (r"(^|/)head/kernel$", P("fsdp", "tensor")),
    (r"scalar_head/kernel$", P("fsdp", None)),
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
    (r"attention/(query|key|value)/bias$", P(None, "tensor")),
    (r"attention/output/kernel$", P(None, "tensor", "fsdp")),
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r"(attention/output|mlp/down)/bias$", P()),
    (r"_norm/scale$", P()),
    (r"(^|/)(step|key|skipped_steps|bad_streak|count|ns_coeffs)$", P()),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arrange the devices (all of them by default) as config says; ConfigError where they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        raise ConfigError(f"mesh: sizes must be 1 or more, and at most one of them -1; got {sizes}")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(1, len(devices) // taken)
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh: {' x '.join(f'{axis}={size}' for axis, size in sizes.items())} does not cover "
            f"{len(devices)} devices; set one of the axes to -1 to fill it"
        )
    # Explicit axis types (the default) would ask for a sharding on every operation of the model.
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's key path as text: `params/blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matching(pattern: str, params: Any) -> Any:
    """A tree like params, True where the parameter's path (`blocks/mlp/up/kernel`) matches."""

    def matches(path: tuple[Any, ...], _: Any) -> bool:
        return re.search(pattern, path_name(path)) is not None

    return jax.tree_util.tree_map_with_path(matches, params)


def rule_for(path: str) -> P:
    """The one row of RULES that the path matches; ValueError where none or several do."""
    matches = [(pattern, spec) for pattern, spec in RULES if re.search(pattern, path)]
    if len(matches) != 1:
        found = "no rule" if not matches else f"rules {[pattern for pattern, _ in matches]}"
        raise ValueError(f"{path} matches {found} in jaxllm.parallel.sharding.RULES; it must match exactly one")
    return matches[0][1]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf (array or ShapeDtypeStruct) of a state tree.

    An axis that does not divide its dimension (an odd vocabulary over tensor=4) is dropped for that
    leaf, which is then whole along it; this is logged.
    """

    def resolve(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        axes = []
        for size, axis in zip(leaf.shape, rule_for(name), strict=False):
            if axis is not None and size % mesh.shape[axis]:
                logging.info(
                    "%s: %d does not divide over %s=%d; kept whole", name, size, axis, mesh.shape[axis]
                )
                axis = None
            axes.append(axis)
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(resolve, tree)


def placed(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree, each with its sharding: what a checkpoint is read into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def whole(tree: Any, mesh: Mesh) -> Any:
    """Shardings that keep every leaf whole, but for `tensor`: no parameter is gathered when it is used."""

    def without_fsdp(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in sharding.spec)))

    return jax.tree.map(without_fsdp, shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Lay an array out inside jit, under `jax.set_mesh`.

    Without a mesh, or where the leading axis does not divide, the array is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return x
    leading = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in leading if axis):
        return x
    return jax.lax.with_sharding_constraint(x, spec)
