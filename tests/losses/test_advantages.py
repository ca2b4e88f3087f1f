"""Advantages: values by hand, plain loops, masks with holes, and groups with equal rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import (
    discounted_returns,
    generalized_advantage_estimation,
    group_relative_advantages,
    leave_one_out_advantages,
    overlong_penalty,
    token_rewards,
)


def episode(seed=0, rows=4, length=7):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, rows, length)).astype(np.float32)
    mask = rng.random((rows, length)) < 0.6
    mask[0], mask[1] = True, False
    return jnp.asarray(rewards), jnp.asarray(values), mask


def gae_by_loop(rewards, values, mask, discount, lambda_):
    """On each row with the masked positions cut out."""
    advantages, returns = np.zeros((2, *mask.shape))
    for b in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            delta = rewards[b, t] + discount * next_value - values[b, t]
            next_advantage = delta + discount * lambda_ * next_advantage
            next_value = values[b, t]
            advantages[b, t], returns[b, t] = next_advantage, next_advantage + next_value
    return advantages, returns


def test_gae_by_hand():
    rewards, values = jnp.array([[0.0, 0.0, 8.0]]), jnp.array([[1.0, 2.0, 4.0]])
    advantages, returns = generalized_advantage_estimation(
        rewards, values, jnp.ones((1, 3)), discount=0.5, lambda_=0.5
    )
    # a3 = 8 - 4; a2 = 0.5 * 4 - 2 + 0.25 * 4; a1 = 0.5 * 2 - 1 + 0.25 * 1
    np.testing.assert_array_equal(advantages, [[0.25, 1, 4]])
    np.testing.assert_array_equal(returns, [[1.25, 3, 8]])


@pytest.mark.parametrize(("discount", "lambda_"), [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (1.0, 1.0)])
def test_gae_equals_a_loop_over_the_counted_positions(discount, lambda_):
    rewards, values, mask = episode()
    actual = generalized_advantage_estimation(rewards, values, mask, discount=discount, lambda_=lambda_)
    np.testing.assert_allclose(actual, gae_by_loop(rewards, values, mask, discount, lambda_), atol=1e-6)


def test_masked_positions_in_the_middle_have_no_effect():
    rewards, values, _ = episode()
    hole = jnp.array([1, 1, 0, 0, 1, 1, 1], bool)
    holed = jnp.broadcast_to(hole, rewards.shape)
    knobs = {"discount": 0.9, "lambda_": 0.8}
    garbage = [jnp.where(hole, x, jnp.nan) for x in (rewards, values)]
    with_hole = generalized_advantage_estimation(*garbage, holed, **knobs)
    without = generalized_advantage_estimation(rewards[:, hole], values[:, hole], holed[:, hole], **knobs)
    for a, b in zip(with_hole, without, strict=True):
        np.testing.assert_array_equal(a[:, hole], b)
        np.testing.assert_array_equal(a[:, ~hole], 0)


def test_gae_gradient_equals_finite_differences():
    rewards, values, mask = episode(rows=2, length=4)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, *mask.shape)), jnp.float32)

    def total(rewards, values):
        results = generalized_advantage_estimation(rewards, values, mask, discount=0.9, lambda_=0.8)
        return sum((w * x).sum() for w, x in zip(weights, results, strict=True))

    jax.test_util.check_grads(total, (rewards, values), order=1, modes=["rev"], eps=0.1, atol=1e-3, rtol=1e-3)


def test_discounted_returns_by_hand_and_by_gae():
    returns = discounted_returns(
        jnp.array([[1.0, jnp.inf, 2.0, 4.0]]), jnp.array([[1, 0, 1, 1]]), discount=0.5
    )
    np.testing.assert_array_equal(returns, [[1 + 0.5 * 4, 0, 2 + 0.5 * 4, 4]])
    rewards, values, mask = episode()
    _, same = generalized_advantage_estimation(rewards, values, mask, discount=0.9, lambda_=1.0)
    np.testing.assert_allclose(discounted_returns(rewards, mask, discount=0.9), same, atol=1e-6)


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
def test_token_rewards_by_hand(kind):
    scores = jnp.array([1, 0, 1]).astype(kind)
    kl = jnp.array([[1.0, 2.0, jnp.nan], [1.0, jnp.nan, 3.0], [jnp.nan, jnp.nan, jnp.nan]])
    mask = jnp.array([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    rewards = token_rewards(scores, kl, mask, kl_coefficient=0.25)
    np.testing.assert_array_equal(rewards, [[-0.25, -0.5 + 1, 0], [-0.25, 0, -0.75], [0, 0, 0]])


def test_a_missing_score_stays_in_its_empty_row():
    rewards = token_rewards(jnp.array([jnp.nan]), jnp.ones((1, 2)), jnp.zeros((1, 2)), kl_coefficient=1.0)
    np.testing.assert_array_equal(rewards, 0)


GROUPS = np.array([[0.5, 1.0, 3.0], [0.0, 0.0, 1.5]])  # halves: a cast to int would show
DEVIATIONS = np.array([[-1, -0.5, 1.5], [-0.5, -0.5, 1]])


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [
        ("group", np.sqrt([[3.5 / 2], [1.5 / 2]])),  # 1 + 1/4 + 9/4, and 1/4 + 1/4 + 1, over n - 1
        ("batch", np.sqrt(((GROUPS - 1) ** 2).sum() / 5)),
    ],
)
def test_group_advantages_by_hand(scale, divisor):
    actual = group_relative_advantages(jnp.asarray(GROUPS.ravel()), 3, scale=scale, epsilon=0.5)
    np.testing.assert_allclose(actual, (DEVIATIONS / (divisor + 0.5)).ravel(), rtol=1e-6)


def test_group_advantages_without_scale():
    actual = group_relative_advantages(jnp.asarray(GROUPS.ravel()), 3, scale="none", epsilon=0.5)
    np.testing.assert_array_equal(actual, DEVIATIONS.ravel())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-6, 1e-9, 0.0])
def test_equal_rewards_give_exactly_zero(scale, epsilon):
    """The float32 mean of several times 1/3 is not 1/3; a small epsilon would scale the difference to 0.9."""
    for value in (1 / 3, 0.1, 0.7, 1e6, -1e-7, 0.0):
        for group_size in (3, 7, 8):
            rewards = jnp.full(2 * group_size, value)
            advantages = group_relative_advantages(rewards, group_size, scale=scale, epsilon=epsilon)
            np.testing.assert_array_equal(advantages, 0)


@pytest.mark.parametrize("value", [1 / 3, 0.1, 0.7, 1e6])
def test_equal_rewards_give_exactly_zero_beside_a_group_that_differs(value):
    rewards = jnp.array([value] * 7 + [0.0, 1.0, 0.3, 0.1, 0.0, 1.0, 1.0])
    advantages = group_relative_advantages(rewards, 7, scale="batch", epsilon=1e-9)
    np.testing.assert_array_equal(advantages[:7], 0)
    np.testing.assert_array_equal(leave_one_out_advantages(rewards, 7)[:7], 0)
    assert (advantages[7:] != 0).all()


@pytest.mark.parametrize("kind", [bool, np.int32, jnp.bfloat16])
def test_rewards_of_any_type_become_float(kind):
    rewards = jnp.array([1, 0, 0, 1, 1, 0]).astype(kind)
    for function in (
        lambda r: group_relative_advantages(r, 3, scale="none", epsilon=1e-4),
        lambda r: leave_one_out_advantages(r, 3),
    ):
        assert function(rewards).dtype == jnp.float32
        np.testing.assert_array_equal(function(rewards), function(rewards.astype(np.float32)))
    np.testing.assert_allclose(group_relative_advantages(rewards, 3, scale="none", epsilon=1.0)[0], 2 / 3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_invalid_rows_are_left_out(scale):
    rewards = jnp.array(
        [1.0, 2.0, 6.0, jnp.nan, 5.0, jnp.inf, jnp.nan, jnp.nan, jnp.nan, jnp.nan, jnp.nan, jnp.nan]
    )
    valid = jnp.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    advantages = group_relative_advantages(rewards, 4, scale=scale, epsilon=0.5, valid=valid)
    divisor = {"group": np.sqrt(7) + 0.5, "batch": np.std([1, 2, 6, 5], ddof=1) + 0.5, "none": 1}[scale]
    np.testing.assert_allclose(advantages[:3], np.array([-2, -1, 3]) / divisor, rtol=1e-6)
    np.testing.assert_array_equal(advantages[3:], 0)  # invalid, alone in its group, no valid row at all


def test_leave_one_out_compares_with_the_valid_others():
    cut_off = [1, 1, 1, 0]  # whether a completion is valid; the last one is not, and has reward 0
    rewards = jnp.array([1, 1, 1, 0, 4, 1, jnp.nan, 1, jnp.inf, 3, jnp.nan, jnp.nan])
    valid = jnp.array([*cut_off, 1, 1, 0, 1, 0, 1, 0, 0])
    advantages = leave_one_out_advantages(rewards, 4, valid=valid)
    np.testing.assert_array_equal(advantages, [0, 0, 0, 0, 3, -1.5, 0, -1.5, 0, 0, 0, 0])  # 4 - 1; 1 - 5 / 2


def test_group_advantages_have_a_gradient_even_without_spread():
    rewards = jnp.array([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    loss = lambda r: (group_relative_advantages(r, 3, scale="group", epsilon=0.1) * jnp.arange(6)).sum()  # noqa: E731
    gradient = jax.grad(loss)(rewards)
    assert jnp.isfinite(gradient).all()
    jax.test_util.check_grads(
        lambda r: loss(jnp.concatenate([r, rewards[3:]])), (rewards[:3],), 1, ["rev"], eps=0.05, rtol=1e-2
    )


def test_leave_one_out_by_hand():
    advantages = leave_one_out_advantages(jnp.array([1, 2, 6, 0, 0, 3]), 3)
    np.testing.assert_array_equal(advantages, [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3])


@pytest.mark.parametrize("group_size", [1, 0, 4])
def test_invalid_group_sizes_are_errors(group_size):
    rewards = jnp.arange(6.0)
    with pytest.raises(ValueError, match=f"group_size={group_size}"):
        group_relative_advantages(rewards, group_size, scale="group", epsilon=1e-4)
    with pytest.raises(ValueError, match=f"group_size={group_size}"):
        leave_one_out_advantages(rewards, group_size)


def test_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match="scale='std' is unknown"):
        group_relative_advantages(jnp.arange(6.0), 3, scale="std", epsilon=1e-4)


def test_overlong_penalty_by_hand():
    penalty = overlong_penalty(jnp.array([0, 60, 65, 79, 80, 81, 1000]), limit=80, buffer=20)
    np.testing.assert_allclose(penalty, [0, 0, -0.25, -0.95, -1, -1, -1], rtol=1e-6)
    assert penalty.dtype == jnp.float32


def test_overlong_penalty_needs_a_buffer():
    with pytest.raises(ValueError, match="buffer=0"):
        overlong_penalty(jnp.array([1]), limit=80, buffer=0)
