"""Context parallelism: the tokens of a row split over the mesh axis `sequence`.

Everything but attention treats each token by itself. Under `shard_map` over this axis alone, each device has
T / n positions of every row: attention gathers keys and values of all of them (as in Llama 3, Grattafiori et
al. 2024, arXiv:2407.21783, section 3.3.2), and whatever adds up over tokens is added over the axis.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXIS = "sequence"
TOKENS = P(None, AXIS)  # of an array [B, T, ...]
T = TypeVar("T")


def num_shards(length: int) -> int:
    """Devices over which the current mesh splits `length` tokens: 1 without a mesh, within a part, and where
    it does not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AXIS not in mesh.axis_names or AXIS in mesh.manual_axes:
        return 1
    size = mesh.shape[AXIS]
    return 1 if length % size else size


def is_split() -> bool:
    """Whether the caller sees a part of each row."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AXIS in mesh.manual_axes


def split(function: Callable[..., T], in_specs: Any, out_specs: Any) -> Callable[..., T]:
    """The function on parts of rows: TOKENS marks the arrays that are split, P() those that each device has
    whole."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS})


def by_token(function: Callable[..., T], *, sums: bool) -> Callable[..., T]:
    """A loss function (hidden [B, T, D], head, *arrays [B, T]) on parts of rows, and so its [B, T, V] logits.

    sums: it returns sums over all tokens, which are added up; otherwise arrays [B, T].
    """

    def wrapped(hidden: jax.Array, head: jax.Array, *arrays: jax.Array) -> T:
        # XLA (of JAX 0.10) aborts on a lookup in logits that are split over `tensor` as well.
        tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
        if num_shards(hidden.shape[1]) == 1 or tensor > 1:
            return function(hidden, head, *arrays)

        def part(*inputs: jax.Array) -> T:
            outputs = function(*inputs)
            return jax.lax.psum(outputs, AXIS) if sums else outputs

        specs = (TOKENS, P(), *(TOKENS for _ in arrays))
        return split(part, specs, P() if sums else TOKENS)(hidden, head, *arrays)

    return wrapped


def gathered(x: jax.Array) -> jax.Array:
    """All positions of an array [B, T / n, ...] of which this device has a part."""
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def first_position(length: int) -> jax.Array:
    """Where in its row a part of `length` tokens begins."""
    return jax.lax.axis_index(AXIS) * jnp.int32(length)
