"""Preference losses without a reward model: DPO and its variants."""

import chex
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from jaxllm.losses.aggregate import Array, Weighted, masked_sum, zero_masked

VARIANTS = ("sigmoid", "robust", "hinge", "ipo", "apo_zero", "sppo")


def dpo_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_length: Array | None = None,
    rejected_length: Array | None = None,
    mask: Array | None = None,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The mean over pairs of a loss of two log ratios between policy and reference.

    With c = chosen - ref_chosen, j = rejected - ref_rejected, d = c - j, e = label_smoothing, s = sigmoid:

    | variant | loss of a pair | source |
    |---|---|---|
    | `sigmoid` | -(1-e) log s(beta d) - e log s(-beta d) | DPO, Rafailov et al. 2023, arXiv:2305.18290 |
    | `robust` | (-(1-e) log s(beta d) + e log s(-beta d)) / (1-2e) | Chowdhury 2024, arXiv:2403.00409 |
    | `hinge` | max(0, 1 - beta d) | SLiC, Zhao et al. 2023, arXiv:2305.10425 |
    | `ipo` | (d - 1/(2 beta))^2 | Azar et al. 2023, arXiv:2310.12036 |
    | `apo_zero` | 1 - s(beta c) + s(beta j) | D'Oosterlinck et al. 2024, arXiv:2408.06266 |
    | `sppo` | (c - 1/(2 beta))^2 + (j + 1/(2 beta))^2 | Wu et al. 2024, arXiv:2405.00675 |

    `sigmoid` with e > 0 is conservative DPO (Mitchell 2023): it assumes that a share e of the labels is
    flipped. `ipo` sums log-probs over the completion as its paper does; given lengths, c and j are divided by
    them, as in TRL (where a length is the number of tokens in the completion mask). `sppo` is TRL's
    `sppo_hard`.

    Args:
      chosen, rejected: [B], the policy's log-probs summed over each completion, nats.
      ref_chosen, ref_rejected: [B], those of the reference; constants.
      beta: strength of the implied KL penalty; the smaller, the further the policy may leave the reference.
      variant: one of the six above.
      label_smoothing: in [0, 1) for `sigmoid`, [0, 0.5) for `robust`; not supported by the others.
      chosen_length, rejected_length: [B], tokens, both or neither. Only `ipo` uses them.
      mask: [B], bool or number; non-zero counts. None counts every pair.

    Returns:
      The loss, and metrics: `loss`, `rewards/chosen` (beta c), `rewards/rejected` (beta j), `rewards/margins`
      (their difference), `rewards/accuracies` (margin > 0; a tie is wrong). Where policy and reference are
      equal, the sigmoid loss is log 2 and margins are 0.

    Raises:
      ValueError: an unknown variant, label_smoothing out of range or not supported by the variant, one length
        without the other.

    >>> import jax.numpy as jnp
    >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
    >>> loss, metrics = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    >>> float(jnp.exp(loss.mean)), float(metrics["rewards/margins"].mean)
    (2.0, 0.0)
    """
    chex.assert_rank([chosen, rejected, ref_chosen, ref_rejected], 1)
    check_dpo_options(variant, label_smoothing)
    if (chosen_length is None) != (rejected_length is None):
        missing = "chosen_length" if chosen_length is None else "rejected_length"
        raise ValueError(f"{missing} is missing; give both lengths or neither")
    mask = jnp.ones(chosen.shape, bool) if mask is None else mask

    def log_ratio(log_probs: Array, ref_log_probs: Array) -> jax.Array:
        return zero_masked(log_probs, mask) - jax.lax.stop_gradient(zero_masked(ref_log_probs, mask))

    c, j = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    reward_chosen, reward_rejected = beta * c, beta * j
    logits = reward_chosen - reward_rejected
    match variant:
        case "sigmoid":
            per_pair = -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
        case "robust":
            unbiased = (1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
            per_pair = -unbiased / (1 - 2 * label_smoothing)
        case "hinge":
            per_pair = jax.nn.relu(1 - logits)
        case "ipo":
            if chosen_length is not None and rejected_length is not None:
                c = c / jnp.maximum(zero_masked(chosen_length, mask), 1)
                j = j / jnp.maximum(zero_masked(rejected_length, mask), 1)
            per_pair = (c - j - 1 / (2 * beta)) ** 2
        case "apo_zero":
            per_pair = sigmoid(-reward_chosen) + sigmoid(reward_rejected)  # 1 - sigmoid(x) loses digits
        case "sppo":
            per_pair = (c - 1 / (2 * beta)) ** 2 + (j + 1 / (2 * beta)) ** 2
    loss = masked_sum(per_pair, mask)
    metrics = {
        "loss": loss,
        "rewards/chosen": masked_sum(reward_chosen, mask),
        "rewards/rejected": masked_sum(reward_rejected, mask),
        "rewards/margins": masked_sum(logits, mask),
        "rewards/accuracies": masked_sum(logits > 0, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)


def check_dpo_options(variant: str, label_smoothing: float) -> None:
    """ValueError for an unknown variant, or a label_smoothing that is out of range or not supported by it."""
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    limit = {"sigmoid": 1.0, "robust": 0.5}.get(variant)
    if limit is None and label_smoothing != 0:
        raise ValueError(f"label_smoothing={label_smoothing} is not supported by {variant!r}; set it to 0")
    if limit is not None and not 0 <= label_smoothing < limit:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, {limit}) for {variant!r}")
