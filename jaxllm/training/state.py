"""What a run carries from step to step: one plain tree of arrays, saved as it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.parallel.sharding import matching


class TrainState(NamedTuple):
    """Everything a train step reads and returns. Scalars are int32."""

    step: jax.Array  # steps done, skipped ones included: the x-axis, and the index of the next batch
    params: Any
    opt_state: optax.OptState
    key: jax.Array  # typed PRNG key of the run; a step uses fold_in(key, step)
    skipped_steps: jax.Array  # steps whose loss or gradient was not finite
    bad_streak: jax.Array  # of those, how many in a row just now


def split_params(params: Any, trainable: str) -> tuple[Any, Any]:
    """Two trees like `params`: leaves whose path (`blocks/mlp/up/kernel`) has the regular expression in it,
    and the others. None, which is no leaf to JAX, stands for what is in the other one."""
    found = matching(trainable, params)
    trained = jax.tree.map(lambda x, is_trainable: x if is_trainable else None, params, found)
    frozen = jax.tree.map(lambda x, is_trainable: None if is_trainable else x, params, found)
    return trained, frozen


def merge_params(trained: Any, frozen: Any) -> Any:
    """What `split_params` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def init_state(
    key: jax.Array,
    *,
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    trainable: str = "",
) -> TrainState:
    """A fresh state. `init(key)` makes the parameters; jit this with the shardings of the whole state.

    Optimiser state is made for the `trainable` parameters alone: those with this expression in their path.
    """
    init_key, run_key = jax.random.split(key)
    params = init(init_key)
    # Separate arrays: a donated state must not hold one buffer twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(split_params(params, trainable)[0]),
        key=run_key,
        skipped_steps=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
    )
