"""Learning a reward from comparisons."""

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Weighted, weigh, zero_masked


def bradley_terry_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    margin: jax.Array | None = None,
    center_coefficient: float = 0.0,
    mask: jax.Array | None = None,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The mean over pairs of -log sigmoid(c - r - margin) + center_coefficient (c + r)^2.

    c and r are the rewards of the chosen and the rejected answer. The first term is the likelihood of the
    choice (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155), the margin says how clear it was
    (Llama 2, Touvron et al. 2023, arXiv:2307.09288), the last term pins the level, which the first leaves
    free (Eisenstein et al. 2023, arXiv:2312.09244, with 0.01). As in TRL, margins enter the loss only.

    Args:
      chosen: [B], rewards of the preferred answers.
      rejected: [B], rewards of the others.
      margin: [B] or scalar, in units of reward. None is no margin.
      center_coefficient: weight of the centring term.
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
    surprise = difference if margin is None else difference - zero_masked(margin, mask)
    per_pair = -jax.nn.log_sigmoid(surprise) + center_coefficient * (chosen + rejected) ** 2
    loss = weigh(per_pair, mask)
    metrics = {
        "loss": loss,
        "accuracy": weigh(chosen > rejected, mask),
        "margin": weigh(difference, mask),
        "chosen_reward": weigh(chosen, mask),
        "rejected_reward": weigh(rejected, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)
