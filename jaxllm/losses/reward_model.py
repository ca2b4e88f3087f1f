"""The loss of a reward model trained on preference pairs."""

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Array, Weighted, masked_sum, zero_masked


def bradley_terry_loss(
    chosen: Array,
    rejected: Array,
    *,
    margin: Array | float | None = None,
    center_coefficient: float = 0.0,
    mask: Array | None = None,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The mean over pairs of -log sigmoid(c - r - margin) + center_coefficient (c + r)^2.

    c and r are the rewards of the chosen and the rejected completion. The first term is the negative log
    likelihood of the choice (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155). The margin is
    larger for clearer preferences (Llama 2, Touvron et al. 2023, arXiv:2307.09288). The last term keeps the
    rewards centered, since the first depends on their difference only (Eisenstein et al. 2023,
    arXiv:2312.09244, with 0.01). As in TRL, the margin changes the loss and no other metric.

    Args:
      chosen: [B], rewards of the chosen completions.
      rejected: [B], rewards of the rejected completions.
      margin: [B] or scalar, in units of reward. None is no margin.
      center_coefficient: weight of the centering term.
      mask: [B], bool or number; non-zero counts. None counts every pair.

    Returns:
      The loss, and metrics: `loss`, `accuracy` (c > r; a tie is wrong), `margin` (c - r), `chosen_reward`,
      `rejected_reward`.

    >>> import jax.numpy as jnp
    >>> loss, metrics = bradley_terry_loss(jnp.array([2.0, 1.0]), jnp.array([0.0, 1.0]))
    >>> print(f"{loss.mean:.3f} {metrics['accuracy'].mean:.1f} {metrics['margin'].mean:.1f}")
    0.410 0.5 1.0
    """
    chex.assert_rank([chosen, rejected], 1)
    mask = jnp.ones(chosen.shape, bool) if mask is None else mask
    chosen, rejected = zero_masked(chosen, mask), zero_masked(rejected, mask)
    difference = chosen - rejected
    logits = difference if margin is None else difference - zero_masked(jnp.asarray(margin), mask)
    per_pair = -jax.nn.log_sigmoid(logits) + center_coefficient * (chosen + rejected) ** 2
    loss = masked_sum(per_pair, mask)
    metrics = {
        "loss": loss,
        "accuracy": masked_sum(chosen > rejected, mask),
        "margin": masked_sum(difference, mask),
        "chosen_reward": masked_sum(chosen, mask),
        "rejected_reward": masked_sum(rejected, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)
