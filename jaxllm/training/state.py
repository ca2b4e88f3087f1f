"""What a run carries from step to step: one plain tree of arrays, saved as it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """Everything a train step reads and returns. Scalars are int32."""

    step: jax.Array  # steps done, skipped ones included: the x-axis, and the index of the next batch
    params: Any
    opt_state: optax.OptState
    key: jax.Array  # typed PRNG key of the run; a step uses fold_in(key, step)
    skipped_steps: jax.Array  # steps whose loss or gradient was not finite
    bad_streak: jax.Array  # of those, how many in a row just now


def init_state(
    key: jax.Array, *, init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state. `init(key)` makes the parameters; jit this with the shardings of the whole state."""
    init_key, run_key = jax.random.split(key)
    params = init(init_key)
    # Separate arrays: a donated state must not hold one buffer twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=run_key,
        skipped_steps=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
    )
