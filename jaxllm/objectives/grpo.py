"""Group-relative policy optimisation: make the better answers of a group likelier."""

from typing import Any

import jax

from jaxllm.batches import RolloutBatch
from jaxllm.losses import Weighted, grpo_loss
from jaxllm.rollout.score import next_token_log_probs


def loss_fn(
    params: Any, batch: RolloutBatch, key: jax.Array, *, model: Any, temperature: float, **options: Any
) -> tuple[Weighted, dict[str, Weighted]]:
    """The loss of `grpo_loss` with these options; metrics `policy/NAME`. `model` is a tuple of functions as
    `build_model` returns, `temperature` the sampler's."""
    del key  # nothing here is random
    log_probs, entropy = next_token_log_probs(params, batch.tokens, model=model, temperature=temperature)
    loss, metrics = grpo_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        ref_log_probs=batch.ref_log_probs,
        importance_weights=batch.importance_weights,
        entropy=entropy,
        **options,
    )
    return loss, {f"policy/{name}": value for name, value in metrics.items()} | {"loss": metrics["loss"]}
