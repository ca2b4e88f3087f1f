"""Group relative policy optimization and its variants: PPO without a critic, one advantage per completion."""

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Array, Weighted, aggregate, count, masked_sum, zero_masked
from jaxllm.losses.kl import kl_penalty
from jaxllm.losses.ppo import bounded_exp, clipped_loss, constant, policy_metrics

MODES = {
    "grpo": "sequence_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "gspo": "sequence_mean",
    "cispo": "token_mean",
}


def grpo_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    variant: str,
    clip_low: float,
    clip_high: float,
    ref_log_probs: Array | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    kl_importance_weighted: bool = False,
    dual_clip: float | None = None,
    max_length: int | None = None,
    importance_weights: Array | None = None,
    entropy: Array | None = None,
    entropy_coefficient: float = 0.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The clipped policy loss with one advantage per completion, plus a KL penalty and an entropy bonus.

    With ratio = exp(log_probs - old_log_probs) and s = stop_gradient; the modes are those of `aggregate`:

    | variant | loss of a token | ratio | mode |
    |---|---|---|---|
    | `grpo` | that of `ppo_policy_loss` | per token | sequence_mean |
    | `dr_grpo` | the same | per token | constant, max_length required |
    | `dapo` | the same | per token | token_mean |
    | `gspo` | the same | per sequence: exp(mean of the log ratio over its tokens) | sequence_mean |
    | `cispo` | -s(min(ratio, clip_high)) A log_probs; clip_low unused | per token | token_mean |

    GRPO: Shao et al. 2024, arXiv:2402.03300. Dr. GRPO: Liu et al. 2025, arXiv:2503.20783. DAPO: Yu et al.
    2025, arXiv:2503.14476. GSPO: Zheng et al. 2025, arXiv:2507.18071. CISPO: MiniMax 2025, arXiv:2506.13585.

    Then, per token and in the same mode: importance_weights multiply that loss; kl_coefficient kl is added,
    times the ratio if kl_importance_weighted (DeepSeek 2025, arXiv:2512.02556: an unbiased gradient of the
    KL); entropy_coefficient entropy is subtracted.

    TRL 1.16 differs: its `grpo` divides by the number of all sequences, empty ones included; its entropy
    bonus is always a token mean; kl_importance_weighted is its default (`use_bias_correction_kl`); it does
    not clamp log ratios to [-20, 20]. Our `gspo` is its loss_type "grpo" with importance_sampling_level
    "sequence".

    Args:
      log_probs: [B, T], of the policy, nats, at the sampler's temperature.
      old_log_probs: [B, T], of the policy before the updates on this rollout; constants.
      advantages: [B], one per completion, see `group_relative_advantages`; or [B, T], one per token, as in
        REINFORCE++; constants.
      mask: [B, T], bool or number; non-zero counts. Zero for prompt, padding and tool output.
      variant: one of the five above.
      clip_low, clip_high: how far the ratio may fall below and rise above 1; 3e-4 and 4e-4 are usual for
        gspo. For cispo clip_high is the highest ratio, 5 for example.
      ref_log_probs: [B, T], of the reference; constants. If given, `kl` is a metric whatever its coefficient.
      kl_coefficient: loss per nat.
      kl_estimator: see `kl_penalty`.
      kl_importance_weighted: multiply the KL by the ratio, which has a gradient.
      dual_clip: above 1, see `ppo_policy_loss`; not supported by cispo.
      max_length: the longest completion that the rollout allows, in tokens; for `dr_grpo`.
      importance_weights: [B, T], see `truncated_importance_weights`; constants.
      entropy: [B, T], nats, with gradient. If given, `entropy` is a metric whatever its coefficient.
      entropy_coefficient: loss per nat.

    Returns:
      The loss, and the metrics of `ppo_policy_loss`, with `kl` and `entropy` where their arrays are given.
      cispo counts ratio > clip_high with A > 0 as clipped high, and nothing as low.

    Raises:
      ValueError: an unknown variant, `dr_grpo` without max_length, `cispo` with dual_clip, a KL or entropy
        coefficient without its array, dual_clip of 1 or less.

    >>> import jax.numpy as jnp
    >>> log_probs, mask = jnp.full((2, 3), -1.0), jnp.array([[1, 1, 1], [1, 0, 0]])
    >>> advantages, clips = jnp.array([1.0, -1.0]), {"clip_low": 0.2, "clip_high": 0.2}
    >>> loss, _ = grpo_loss(log_probs, log_probs, advantages, mask, variant="grpo", **clips)
    >>> float(loss.mean)  # two completions count the same
    0.0
    >>> loss, _ = grpo_loss(log_probs, log_probs, advantages, mask, variant="dapo", **clips)
    >>> float(loss.mean)  # four tokens count the same
    -0.5
    """
    chex.assert_rank([log_probs, old_log_probs, advantages, mask], [2, 2, {1, 2}, 2])
    chex.assert_equal_shape([log_probs, old_log_probs, mask])
    if variant not in MODES:
        raise ValueError(f"variant={variant!r} is unknown; choose one of {', '.join(MODES)}")
    if variant == "cispo" and dual_clip is not None:
        raise ValueError(f'dual_clip={dual_clip} is not supported by variant="cispo"; set it to None')
    if ref_log_probs is None and kl_coefficient != 0:
        raise ValueError(f"kl_coefficient={kl_coefficient} needs ref_log_probs")
    if entropy is None and entropy_coefficient != 0:
        raise ValueError(f"entropy_coefficient={entropy_coefficient} needs entropy")
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    log_probs, advantages = zero_masked(log_probs, mask), constant(advantages, mask)
    log_ratio = log_probs - constant(old_log_probs, mask)
    ratio = bounded_exp(_per_sequence(log_ratio, mask) if variant == "gspo" else log_ratio)
    if variant == "cispo":
        per_token = -jax.lax.stop_gradient(jnp.minimum(ratio, clip_high)) * advantages * log_probs
        low, high = jnp.zeros(mask.shape, bool), (ratio > clip_high) & (advantages > 0)
    else:
        per_token = clipped_loss(ratio, advantages, clip_low, clip_high, dual_clip)
        low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
    if importance_weights is not None:
        per_token = per_token * constant(importance_weights, mask)
    extra = {}
    if ref_log_probs is not None:
        extra["kl"] = kl_penalty(log_probs, constant(ref_log_probs, mask), estimator=kl_estimator)
        if kl_importance_weighted:
            extra["kl"] = ratio * extra["kl"]
        per_token = per_token + kl_coefficient * extra["kl"]
    if entropy is not None:
        extra["entropy"] = zero_masked(entropy, mask)
        per_token = per_token - entropy_coefficient * extra["entropy"]
    loss = aggregate(per_token, mask, MODES[variant], max_length=max_length)
    metrics = policy_metrics(loss, ratio, log_ratio, low, high, mask)
    extra = {name: masked_sum(values, mask) for name, values in extra.items()}
    return loss, metrics | jax.lax.stop_gradient(extra)


def _per_sequence(log_ratio: Array, mask: Array) -> jax.Array:
    """[B, T], at every position of a sequence the mean over its counted tokens."""
    tokens = jnp.maximum(count(mask, axis=1), 1)[:, None]
    return jnp.broadcast_to(log_ratio.sum(1, keepdims=True) / tokens, log_ratio.shape)
