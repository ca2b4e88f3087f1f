"""A small state of every kind of leaf, and what the tests of checkpoints do with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any


def make_state(step=1, width=4):
    """Every kind of leaf that a run has: optax states, a typed key, bfloat16, scalars."""
    params = {
        "layers": {"query": jnp.arange(8.0 * width).reshape(8, width) + step},
        "embedding": jnp.full((8, 2), step, jnp.bfloat16),
    }
    return State(jnp.int32(step), params, optax.adamw(1e-3).init(params), jax.random.key(step))


def shardings(state, shape):
    """Matrices sharded by rows over both axes of a mesh, the rest replicated."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: rows if leaf.ndim == 2 else replicated, state)


def abstract(state):
    """The shapes of the state, with their shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(found, expected):
    """Equal trees, dtypes and bits."""

    def same(a, b):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, strict=True)

    jax.tree.map(same, found, expected)


def save(checkpoints, *steps):
    """Save a state for each step, one after another."""
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
