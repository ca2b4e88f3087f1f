"""Reward model: give the answer that people preferred the higher reward."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.batches import PairBatch
from jaxllm.losses import Weighted, bradley_terry_loss


def loss_fn(
    params: Any, batch: PairBatch, key: jax.Array, *, model: Any, center_coefficient: float
) -> tuple[Weighted, dict[str, Weighted]]:
    """Bradley-Terry with margins, in nats a pair. `model` is a tuple of functions as `build_scalar_model`
    returns."""
    del key  # nothing here is random
    rewards = model.rewards(params, batch.tokens, batch.lengths)
    loss = partial(bradley_terry_loss, center_coefficient=center_coefficient)
    return weigh_pairs(loss, batch.weight, rewards[:, 0], rewards[:, 1], margin=batch.margin)


def weigh_pairs(loss: Any, weight: jax.Array, *args: Any, **kwargs: Any) -> Any:
    """A loss over pairs, and its metrics, with weight[B] for each: weighted sums of what it gives a pair."""
    pairs = jax.tree.map(lambda x: x[:, None], (args, kwargs))
    each = jax.vmap(lambda args, kwargs: loss(*args, **kwargs))(*pairs)
    return jax.tree.map(lambda x: jnp.sum(x * weight), each)
