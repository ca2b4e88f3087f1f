"""The one function that says how likely a model finds a text: for policy, old policy and reference alike."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.losses import linear_token_log_probs


def next_token_log_probs(
    params: Any, tokens: jax.Array, *, model: Any, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropy [B, T] in nats; position t is about tokens[:, t + 1], as in every batch.

    The last position is about nothing (it gets the first token, for the mask to hide). `model` is a tuple of
    functions as `build_model` returns; the temperature divides the logits, as the sampler's does.
    """
    hidden, _ = model.apply(params, tokens)
    targets = jnp.roll(tokens, -1, axis=1)
    softcap = model.config.logit_softcap
    return linear_token_log_probs(
        hidden, model.head(params), targets, temperature=temperature, softcap=softcap
    )
