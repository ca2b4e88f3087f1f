"""Proximal policy optimisation: an actor and a critic, in one tree of parameters."""

from typing import Any

import jax

from jaxllm.batches import RolloutBatch
from jaxllm.losses import Weighted, aggregate, ppo_policy_loss, ppo_value_loss
from jaxllm.rollout.score import next_token_log_probs


def loss_fn(
    params: Any,
    batch: RolloutBatch,
    key: jax.Array,
    *,
    model: Any,
    critic: Any,
    temperature: float,
    clip: float,
    value_clip: float | None,
    value_coefficient: float,
    entropy_coefficient: float,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Policy loss + value_coefficient value loss - entropy_coefficient entropy, all means over tokens.

    params: {"policy", "critic"}. `model` and `critic` are tuples of functions as `build_model` and
    `build_scalar_model` return, `temperature` the sampler's. Metrics are `policy/NAME` and `value/NAME`.
    """
    del key  # nothing here is random
    log_probs, entropy = next_token_log_probs(
        params["policy"], batch.tokens, model=model, temperature=temperature
    )
    values = critic.apply(params["critic"], batch.tokens)
    policy, policy_metrics = ppo_policy_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        clip_low=clip,
        clip_high=clip,
        importance_weights=batch.importance_weights,
    )
    value, value_metrics = ppo_value_loss(values, batch.values, batch.returns, batch.mask, clip=value_clip)
    spread = aggregate(entropy, batch.mask, "token_mean")
    # The three count the same tokens, so their sums add up to a sum over the same weight.
    total = policy.sum + value_coefficient * value.sum - entropy_coefficient * spread.sum
    loss = Weighted(total, policy.weight)
    metrics = {f"policy/{name}": x for name, x in (policy_metrics | {"entropy": spread}).items()}
    metrics |= {f"value/{name}": x for name, x in value_metrics.items()} | {"loss": loss}
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)
