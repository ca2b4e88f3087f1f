"""Proximal policy optimization: the clipped policy and value losses, and an off-policy correction."""

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Array, Weighted, aggregate, masked_sum, zero_masked
from jaxllm.losses.kl import kl_penalty


def ppo_policy_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mode: str = "token_mean",
    max_length: int | None = None,
    importance_weights: Array | None = None,
) -> tuple[Weighted, dict[str, Weighted]]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), with ratio = exp(log_probs - old_log_probs).

    A token gets no gradient once its ratio has moved past the clip in the direction that its advantage favors
    (Schulman et al. 2017, arXiv:1707.06347). The two clips may differ: a wider upper one lets the probability
    of rare tokens grow (DAPO, Yu et al. 2025, arXiv:2503.14476, with 0.28). dual_clip c bounds the loss of a
    token with A < 0 that has become likely: min(loss, -c A) (Ye et al. 2019, arXiv:1912.09729, with 3). TRL's
    `delta` does the same if it is above 1 + clip_high.

    The log ratio is clamped to [-20, 20] before exp, with zero gradient beyond; TRL does not clamp.

    Args:
      log_probs: [B, T], of the policy, nats.
      old_log_probs: [B, T], of the policy before the updates on this rollout; constants.
      advantages: [B, T]; constants.
      mask: [B, T], bool or number; non-zero counts.
      clip_low, clip_high: how far the ratio may fall below and rise above 1.
      dual_clip: above 1; None turns it off.
      mode, max_length: how tokens are reduced, see `aggregate`.
      importance_weights: [B, T], factors of the loss, see `truncated_importance_weights`; constants.

    Returns:
      The loss, and metrics: `loss`; and as token means `ratio`, `approx_kl` (k3 of old against new) and the
      fractions `clip_fraction_low` (ratio < 1 - clip_low and A < 0), `clip_fraction_high` (ratio > 1 +
      clip_high and A > 0) and `clip_fraction` (either).

    Raises:
      ValueError: dual_clip of 1 or less, an unknown mode, `"constant"` without max_length.

    >>> import jax.numpy as jnp
    >>> old_log_probs, advantages = jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])
    >>> log_probs = jnp.log(jnp.array([[1.5, 1.5]]))
    >>> loss, metrics = ppo_policy_loss(
    ...     log_probs, old_log_probs, advantages, jnp.ones((1, 2)), clip_low=0.2, clip_high=0.2
    ... )
    >>> print(f"{loss.sum:.2f} {metrics['clip_fraction'].mean:.2f}")  # -1.2, clipped, and 1.5, not
    0.30 0.50
    """
    chex.assert_rank([log_probs, old_log_probs, advantages, mask], 2)
    chex.assert_equal_shape([log_probs, old_log_probs, advantages, mask])
    log_probs, advantages = zero_masked(log_probs, mask), constant(advantages, mask)
    log_ratio = log_probs - constant(old_log_probs, mask)
    ratio = bounded_exp(log_ratio)
    per_token = clipped_loss(ratio, advantages, clip_low, clip_high, dual_clip)
    if importance_weights is not None:
        per_token = per_token * constant(importance_weights, mask)
    loss = aggregate(per_token, mask, mode, max_length=max_length)
    low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
    return loss, policy_metrics(loss, ratio, log_ratio, low, high, mask)


def ppo_value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, *, clip: float | None
) -> tuple[Weighted, dict[str, Weighted]]:
    """The token mean of 0.5 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2).

    The critic's counterpart of the clipped policy loss (in the code of Schulman et al. 2017, not the paper).

    Args:
      values: [B, T], of the critic.
      old_values: [B, T], of the critic before the updates on this rollout; constants.
      returns: [B, T], R; constants.
      mask: [B, T], bool or number; non-zero counts.
      clip: how far a value may move, in units of reward. None turns clipping off: plain half squared error.

    Returns:
      The loss, and metrics: `loss`; `clip_fraction`, the fraction of tokens where the clipped error is the
      larger one, so that there is no gradient; and `return`, `return_squared`, `error`, `error_squared` with
      error = R - v. From sums of these, explained variance = 1 - Var(error) / Var(return) merges exactly over
      micro-batches, with Var(x) = mean(x^2) - mean(x)^2. In float32 that needs returns whose mean is
      below about 1000 standard deviations.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1))
    >>> loss, metrics = ppo_value_loss(1.5 * one, 0 * one, 2 * one, one, clip=0.5)
    >>> float(loss.mean), float(metrics["clip_fraction"].mean)  # 0.5 * max(0.5^2, 1.5^2)
    (1.125, 1.0)
    """
    chex.assert_rank([values, old_values, returns, mask], 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    values, returns = zero_masked(values, mask), constant(returns, mask)
    error = returns - values
    squared = clipped_squared = error**2
    if clip is not None:
        old_values = constant(old_values, mask)
        clipped_squared = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    loss = masked_sum(0.5 * jnp.maximum(squared, clipped_squared), mask)
    metrics = {
        "loss": loss,
        "clip_fraction": masked_sum(clipped_squared > squared, mask),
        "return": masked_sum(returns, mask),
        "return_squared": masked_sum(returns**2, mask),
        "error": masked_sum(error, mask),
        "error_squared": masked_sum(squared, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)


def truncated_importance_weights(
    old_log_probs: Array, sampler_log_probs: Array, mask: Array, *, level: str, maximum: float
) -> jax.Array:
    """min(exp(old - sampler), maximum), float32 [B, T]: corrects for a sampler that differs from the policy.

    A rollout engine with other kernels or stale weights samples from another distribution than the policy
    that is trained (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). The difference is that of each token at `"token"` level, and the sum over the sequence's
    counted tokens at `"sequence"` level. 0 where masked, without gradient. Weights above the maximum are
    capped, as in TRL's `*_truncate` modes; its `*_mask` modes set them to zero.

    Args:
      old_log_probs: [B, T], computed by the trainer before the update, nats.
      sampler_log_probs: [B, T], as reported by the sampler, nats.
      mask: [B, T], bool or number; non-zero counts.
      level: `"token"` or `"sequence"`.
      maximum: the cap; 2 is common.

    Raises:
      ValueError: an unknown level.

    >>> import jax.numpy as jnp
    >>> old, sampler = jnp.log(jnp.array([[0.5, 0.9, 0.3]])), jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    >>> mask = jnp.array([[1, 1, 0]])
    >>> truncated_importance_weights(old, sampler, mask, level="token", maximum=2.0).round(4).tolist()
    [[2.0, 1.5, 0.0]]
    """
    chex.assert_rank([old_log_probs, sampler_log_probs, mask], 2)
    chex.assert_equal_shape([old_log_probs, sampler_log_probs, mask])
    difference = constant(old_log_probs, mask) - constant(sampler_log_probs, mask)
    match level:
        case "token":
            pass
        case "sequence":
            difference = jnp.broadcast_to(difference.sum(1, keepdims=True), difference.shape)
        case _:
            raise ValueError(f"level={level!r} is unknown; choose token or sequence")
    return zero_masked(jnp.minimum(bounded_exp(difference), maximum), mask)


def constant(x: Array, mask: Array) -> jax.Array:
    """x in float32, zero where masked, without gradient."""
    return jax.lax.stop_gradient(zero_masked(x, mask))


def bounded_exp(log_ratio: Array) -> jax.Array:
    """exp(log_ratio), with log_ratio clamped to [-20, 20] so that it neither overflows nor vanishes."""
    return jnp.exp(jnp.clip(log_ratio, -20, 20))


def clipped_loss(
    ratio: Array, advantages: Array, clip_low: float, clip_high: float, dual_clip: float | None
) -> jax.Array:
    """The per-token loss of PPO and of GRPO's clipped variants."""
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None to turn it off")
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss


def policy_metrics(
    loss: Weighted,
    ratio: Array,
    log_ratio: Array,
    clipped_low: Array,
    clipped_high: Array,
    mask: Array,
) -> dict[str, Weighted]:
    """The metrics that PPO and GRPO share; all but `loss` are token means."""
    metrics = {
        "loss": loss,
        "ratio": masked_sum(ratio, mask),
        "approx_kl": masked_sum(kl_penalty(jnp.zeros_like(log_ratio), log_ratio, estimator="k3"), mask),
        "clip_fraction_low": masked_sum(clipped_low, mask),
        "clip_fraction_high": masked_sum(clipped_high, mask),
        "clip_fraction": masked_sum(clipped_low | clipped_high, mask),
    }
    return jax.lax.stop_gradient(metrics)
