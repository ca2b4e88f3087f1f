"""Pretraining: predict the next token of packed documents."""

from typing import Any

import jax

from jaxllm.batches import TokenBatch
from jaxllm.losses import Weighted, linear_cross_entropy


def loss_fn(
    params: Any, batch: TokenBatch, key: jax.Array, *, model: Any, z_loss: float
) -> tuple[Weighted, dict[str, Weighted]]:
    """Cross-entropy in nats a token. `model` is a tuple of functions as `build_model` returns."""
    del key  # nothing here is random
    hidden, _ = model.apply(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    return linear_cross_entropy(
        hidden,
        model.head(params),
        batch.targets,
        batch.mask,
        z_loss=z_loss,
        softcap=model.config.logit_softcap,
    )
