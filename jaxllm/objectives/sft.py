"""Instruction fine-tuning: predict the tokens of the answers."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.batches import TokenBatch
from jaxllm.losses import Weighted, aggregate, linear_cross_entropy, linear_token_log_probs


def loss_fn(
    params: Any,
    batch: TokenBatch,
    key: jax.Array,
    *,
    model: Any,
    z_loss: float,
    neftune_alpha: float,
    dft: bool,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Cross-entropy in nats a token. `model` is a tuple of functions as `build_model` returns.

    neftune_alpha > 0 adds uniform noise to the embeddings, of at most alpha / sqrt(T D) (NEFTune, Jain et al.
    2023, arXiv:2310.05914, where T is the length of the text; here it is that of the row). `dft` weighs each
    token's loss by its own probability, a constant (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629):
    what the model finds very unlikely pulls less. The metric `loss` is without that weight.
    """
    noise = None
    if neftune_alpha > 0:
        shape = (*batch.tokens.shape, model.config.width)
        noise = jax.random.uniform(key, shape, minval=-1) * neftune_alpha / (shape[1] * shape[2]) ** 0.5
    hidden, _ = model.apply(
        params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, noise=noise
    )
    head, softcap = model.head(params), model.config.logit_softcap
    if not dft:
        return linear_cross_entropy(hidden, head, batch.targets, batch.mask, z_loss=z_loss, softcap=softcap)
    log_probs, _ = linear_token_log_probs(hidden, head, batch.targets, softcap=softcap)
    weights = jax.lax.stop_gradient(jnp.exp(log_probs))
    loss = aggregate(-weights * log_probs, batch.mask, "token_mean")
    metrics = {"loss": aggregate(-log_probs, batch.mask, "token_mean"), "dft_loss": loss}
    return loss, jax.lax.stop_gradient(metrics)
