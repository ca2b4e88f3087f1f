"""Advantages, which weight the policy gradient, from rewards: how much better than expected an action was."""

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Array, count, masked_variance, zero_masked

SCALES = ("group", "batch", "none")


def generalized_advantage_estimation(
    rewards: Array, values: Array, mask: Array, *, discount: float, lambda_: float
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns by exponentially weighted temporal differences (GAE), float32 [B, T].

    Backwards over the counted positions (Schulman et al. 2015, arXiv:1506.02438):

        delta_t = r_t + discount V_next - V_t
        a_t = delta_t + discount lambda a_next
        return_t = a_t + V_t

    A masked position passes V_next and a_next through unchanged, so that neither padding nor tool output in
    the middle leaks into the estimate (in trainers that only set the rewards there to zero, the values of the
    padding do). After the last counted position V_next and a_next are 0: the episode is over. Both results
    are 0 where masked.

    Args:
      rewards: [B, T].
      values: [B, T], V_t, the critic's estimate before token t is chosen.
      mask: [B, T], bool or number; non-zero counts.
      discount: in [0, 1].
      lambda_: in [0, 1]. At 0 an advantage relies on the critic from the next token on, at 1 on the rewards.

    >>> import jax.numpy as jnp
    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, jnp.nan, 0.5]])
    >>> mask = jnp.array([[1, 0, 1]])
    >>> gae = generalized_advantage_estimation
    >>> advantages, returns = gae(rewards, values, mask, discount=1.0, lambda_=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.25, 0.0, 0.5]], [[0.75, 0.0, 1.0]])
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    counted, rewards, values = mask != 0, zero_masked(rewards, mask), zero_masked(values, mask)

    def step(following, now):
        next_advantage, next_value = following
        reward, value, counts = now
        advantage = reward + discount * (next_value + lambda_ * next_advantage) - value
        here = jnp.where(counts, advantage, next_advantage), jnp.where(counts, value, next_value)
        return here, here[0]

    end = _zero_rows(rewards + values + counted)
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, counted.T), reverse=True)
    advantages = zero_masked(advantages.T, mask)
    return advantages, advantages + values


def discounted_returns(rewards: Array, mask: Array, *, discount: float) -> jax.Array:
    """R_t = r_t + discount R_next over the counted positions, 0 where masked. Float32 [B, T].

    A masked position passes R_next through undiscounted.

    Args:
      rewards: [B, T].
      mask: [B, T], bool or number; non-zero counts.
      discount: in [0, 1], per counted token.

    >>> import jax.numpy as jnp
    >>> discounted_returns(jnp.array([[1.0, jnp.nan, 2.0]]), jnp.array([[1, 0, 1]]), discount=0.5).tolist()
    [[2.0, 0.0, 2.0]]
    """
    chex.assert_rank([rewards, mask], 2)
    chex.assert_equal_shape([rewards, mask])
    counted, rewards = mask != 0, zero_masked(rewards, mask)

    def step(following, now):
        reward, counts = now
        here = jnp.where(counts, reward + discount * following, following)
        return here, here

    end = _zero_rows(rewards + counted)
    _, returns = jax.lax.scan(step, end, (rewards.T, counted.T), reverse=True)
    return zero_masked(returns.T, mask)


def token_rewards(scores: Array, kl: Array, mask: Array, *, kl_coefficient: float | Array) -> jax.Array:
    """-kl_coefficient kl, plus the score at the last counted token; 0 where masked. Float32 [B, T].

    The reward of RLHF with PPO (Ziegler et al. 2019, arXiv:1909.08593). Some trainers put the score one
    position after the last token; here it is at the last token, so that GAE needs no extra position.

    Args:
      scores: [B], the reward of each whole completion.
      kl: [B, T], nats, from `kl_penalty`, usually k1.
      mask: [B, T], bool or number; non-zero counts. A row without a counted token gets no score.
      kl_coefficient: reward per nat.

    >>> import jax.numpy as jnp
    >>> token_rewards(jnp.array([1]), jnp.ones((1, 3)), jnp.array([[1, 1, 0]]), kl_coefficient=0.5).tolist()
    [[-0.5, 0.5, 0.0]]
    """
    chex.assert_rank([scores, kl, mask], [1, 2, 2])
    chex.assert_equal_shape([kl, mask])
    counted = mask != 0
    still_to_come = jnp.cumsum(counted[:, ::-1], axis=1)[:, ::-1]  # this position included
    score = zero_masked(scores[:, None], counted & (still_to_come == 1))
    return score - kl_coefficient * zero_masked(kl, mask)


def group_relative_advantages(
    rewards: Array, group_size: int, *, scale: str, epsilon: float, valid: Array | None = None
) -> jax.Array:
    """(r - mean of the group) / (std + epsilon), float32 [N]; a group is the completions of one prompt.

    std, with n - 1, is that of the group (`"group"`, GRPO, Shao et al. 2024, arXiv:2402.03300) or of all N
    rewards (`"batch"`); `"none"` leaves the division out, since it gives more weight to prompts that are
    almost always or almost never solved (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). TRL has epsilon 1e-4;
    other trainers have 1e-6 or 1e-9, or divide by n in the variance.

    Equal rewards in a group give exactly 0, whatever their value, the scale and epsilon. This takes care: the
    float mean of several times 1/3 may differ from 1/3, and a tiny epsilon turns the difference into
    advantages near 1.

    Args:
      rewards: [N], any number type; a group's rows are consecutive.
      group_size: completions of a prompt, at least 2, dividing N.
      scale: one of the three above.
      epsilon: in units of reward; not used by `"none"`.
      valid: [N], bool or number. Rows with zero (a reward that failed, a truncated completion) are left out
        of the statistics and get 0; so does the only valid row of a group. None counts every row.

    Raises:
      ValueError: group_size below 2 or not dividing N, an unknown scale.

    >>> import jax.numpy as jnp
    >>> rewards = jnp.array([1, 0, 1, 0, 1, 1, 1, 1])
    >>> group_relative_advantages(rewards, 4, scale="none", epsilon=1e-4).tolist()
    [0.5, -0.5, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {', '.join(SCALES)}")
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    groups, valid_groups = _groups(rewards, valid, group_size)
    number = count(valid_groups, axis=1)[:, None]
    mean = groups.sum(1, keepdims=True) / jnp.maximum(number, 1)
    deviations = zero_masked(groups - mean, valid_groups)
    if scale == "none":
        return deviations.ravel()
    if scale == "group":
        variance = (deviations**2).sum(1, keepdims=True) / jnp.maximum(number - 1, 1)
    else:
        variance = masked_variance(rewards, valid)
    spread = variance > 0  # else advantages are 0: sqrt(0) has no finite gradient, 0 / (0 + 0) no value
    std = jnp.sqrt(jnp.where(spread, variance, 1))
    return jnp.where(spread, deviations / (std + epsilon), 0).ravel()


def leave_one_out_advantages(rewards: Array, group_size: int, *, valid: Array | None = None) -> jax.Array:
    """r_i - (sum of the group - r_i) / (n - 1), float32 [N]: a completion against the group's others (RLOO).

    An unbiased baseline (Ahmadian et al. 2024, arXiv:2402.14740); it equals n / (n - 1) times the deviation
    from the group's mean, with n the group's valid rows. Equal rewards give exactly 0.

    Args:
      rewards: [N], any number type; a group's rows are consecutive.
      group_size: completions of a prompt, at least 2, dividing N.
      valid: as in `group_relative_advantages`: other rows are in no baseline and get 0, as does a row alone.

    Raises:
      ValueError: group_size below 2 or not dividing N.

    >>> import jax.numpy as jnp
    >>> leave_one_out_advantages(jnp.array([3.0, 0.0, 0.0]), 3).tolist()
    [3.0, -1.5, -1.5]
    >>> leave_one_out_advantages(jnp.array([3.0, 0.0, 0.0]), 3, valid=jnp.array([1, 1, 0])).tolist()
    [3.0, -3.0, 0.0]
    """
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    groups, valid_groups = _groups(rewards, valid, group_size)
    number = count(valid_groups, axis=1)[:, None]
    others = (groups.sum(1, keepdims=True) - groups) / jnp.maximum(number - 1, 1)
    return zero_masked(groups - others, valid_groups).ravel()


def overlong_penalty(length: Array, *, limit: int, buffer: int) -> jax.Array:
    """0 up to limit - buffer tokens, then linearly down to -1, reached at limit; float32.

    Soft overlong punishment (DAPO, Yu et al. 2025, arXiv:2503.14476), to be added to the reward.

    Args:
      length: of the completions, in tokens; any shape.
      limit: the length at which a completion is truncated, in tokens.
      buffer: how far below limit the penalty starts, in tokens.

    Raises:
      ValueError: buffer below 1.

    >>> import jax.numpy as jnp
    >>> overlong_penalty(jnp.array([80, 90, 100, 120]), limit=100, buffer=20).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    if buffer < 1:
        raise ValueError(f"buffer={buffer} must be at least 1 token")
    return jnp.clip((limit - buffer - jnp.asarray(length, jnp.float32)) / buffer, -1, 0)


def _groups(rewards: Array, valid: Array, group_size: int) -> tuple[jax.Array, Array]:
    """Rewards [N / G, G] minus the highest of their group, 0 where invalid; and `valid` in that shape.

    Advantages do not depend on this shift, and equal rewards become exact zeros.
    """
    chex.assert_rank([rewards, valid], 1)
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size={group_size} must be at least 2 and divide N = {len(rewards)} rewards")
    valid = valid.reshape(-1, group_size)
    groups = rewards.astype(jnp.float32).reshape(-1, group_size)
    best = jnp.where(valid != 0, groups, -jnp.inf).max(1, keepdims=True)
    return zero_masked(groups - jax.lax.stop_gradient(best), valid), valid


def _zero_rows(x: Array) -> jax.Array:
    """[B] zeros to start a scan from: sums of no elements, so that under shard_map they vary as x does."""
    return x[:, :0].sum(axis=1)
