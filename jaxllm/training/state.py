"""The state that a run carries from step to step: one plain tree of arrays, saved as it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.parallel.sharding import matching
from jaxllm.random_streams import INIT, RUN, stream

Params = dict[str, Any]  # nested, with arrays at the leaves; None where a leaf belongs to another tree


class TrainState(NamedTuple):
    """Everything a train step reads and returns. Scalars are int32."""

    step: jax.Array  # steps done, including skipped ones: the x-axis, and the index of the next batch
    params: Params
    opt_state: optax.OptState
    key: jax.Array  # typed PRNG key of the run; a step uses fold_in(key, step)
    skipped_steps: jax.Array  # steps so far that changed nothing: not finite, or without gradient
    bad_streak: jax.Array  # the latest steps in a row whose loss or gradient was not finite


def split_params(params: Params, trainable: str) -> tuple[Params, Params]:
    """Trained and frozen parameters: two trees like `params`.

    Trained are the leaves in whose path (`blocks/mlp/up/kernel`) the regular expression `trainable` is found.
    In each tree None, which is not a leaf to JAX, stands for the leaves of the other one.
    """
    found = matching(trainable, params)
    trained = jax.tree.map(lambda x, is_trainable: x if is_trainable else None, params, found)
    frozen = jax.tree.map(lambda x, is_trainable: None if is_trainable else x, params, found)
    return trained, frozen


def merge_params(trained: Params, frozen: Params) -> Params:
    """The inverse of `split_params`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=is_none)


def is_none(x: object) -> bool:
    """As `is_leaf`: makes the leaves that belong to another tree visible to `jax.tree.map`."""
    return x is None


def init_state(
    key: jax.Array,
    *,
    init: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    trainable: str = "",
) -> TrainState:
    """A state at step 0. `init(key)` makes the parameters; jit this with the shardings of the whole state.

    Only the `trainable` parameters, as in `split_params`, have optimizer state.
    """
    params = init(stream(key, INIT))
    # Separate arrays: a donated state must not hold one buffer twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(split_params(params, trainable)[0]),
        key=stream(key, RUN),
        skipped_steps=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
    )
