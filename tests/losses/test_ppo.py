"""PPO's losses: where the clip takes effect, by hand, and importance weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import ppo_policy_loss, ppo_value_loss, truncated_importance_weights

RATIOS = np.array([[0.5, 0.5, 1.0, 2.0, 2.0, 9.0]])
ADVANTAGES = jnp.array([[1.0, -1.0, 2.0, 1.0, -1.0, -1.0]])


def policy_loss(log_probs, **knobs):
    zeros, ones = jnp.zeros_like(log_probs), jnp.ones_like(log_probs)
    return ppo_policy_loss(log_probs, zeros, ADVANTAGES, ones, clip_low=0.2, clip_high=0.3, **knobs)


@pytest.mark.parametrize(
    ("dual_clip", "per_token"),
    [
        (None, [-0.5, 0.8, -2, -1.3, 2, 9]),  # clipped where the ratio moved as A favors
        (3.0, [-0.5, 0.8, -2, -1.3, 2, 3]),
    ],
)
def test_clips_by_hand(dual_clip, per_token):
    loss, metrics = policy_loss(jnp.log(RATIOS), dual_clip=dual_clip)
    np.testing.assert_allclose(loss, (np.sum(per_token), 6), rtol=1e-6)
    means = {name: float(metric.mean) for name, metric in metrics.items()}
    expected = {
        "loss": np.mean(per_token),
        "ratio": RATIOS.mean(),
        "approx_kl": (RATIOS - 1 - np.log(RATIOS)).mean(),
        "clip_fraction_low": 1 / 6,
        "clip_fraction_high": 1 / 6,
        "clip_fraction": 2 / 6,
    }
    assert means == pytest.approx(expected, rel=1e-5)


def test_a_clipped_token_gets_no_gradient():
    gradient = jax.grad(lambda log_probs: policy_loss(log_probs, dual_clip=3.0)[0].sum)(jnp.log(RATIOS))
    np.testing.assert_allclose(gradient, [[-0.5, 0, -2, 0, 2, 0]], rtol=1e-6)


def test_importance_weights_multiply():
    weights = jnp.array([[0.0, 1.0, 2.0, 1.0, 0.5, 1.0]])
    loss, _ = policy_loss(jnp.log(RATIOS), importance_weights=weights)
    np.testing.assert_allclose(loss.sum, 0 + 0.8 - 4 - 1.3 + 1 + 9, rtol=1e-6)


def test_only_the_policy_gets_a_gradient():
    arrays = [jnp.log(RATIOS), jnp.zeros((1, 6)), ADVANTAGES, jnp.ones((1, 6))]

    def total(log_probs, old, advantages, weights):
        knobs = {"clip_low": 0.2, "clip_high": 0.3, "importance_weights": weights}
        return ppo_policy_loss(log_probs, old, advantages, jnp.ones((1, 6)), **knobs)[0].sum

    gradients = jax.grad(total, (0, 1, 2, 3))(*arrays)
    assert [bool((g != 0).any()) for g in gradients] == [True, False, False, False]


def test_a_large_log_ratio_is_finite():
    log_probs = jnp.array([[-200.0, 200.0, 25.0, -25.0, 0.0, 0.0]])
    (loss, metrics), gradient = jax.value_and_grad(
        lambda x: (lambda loss, metrics: (loss.sum, metrics))(*policy_loss(x)), has_aux=True
    )(log_probs)
    assert jnp.isfinite(loss)
    assert all(np.isfinite(metric.mean) for metric in metrics.values())
    np.testing.assert_array_equal(gradient[0, :4], 0)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
        ({"mode": "constant"}, "give max_length"),
        ({"mode": "mean"}, "mode='mean' is unknown"),
    ],
)
def test_invalid_arguments_are_errors(knobs, complaint):
    with pytest.raises(ValueError, match=complaint):
        policy_loss(jnp.log(RATIOS), **knobs)


def value_loss(values, clip):
    old, returns = jnp.zeros_like(values), jnp.array([[1.0, 1.0, 1.0]])
    return ppo_value_loss(values, old, returns, jnp.ones_like(values), clip=clip)


@pytest.mark.parametrize(
    ("clip", "errors", "clipped"),
    [(0.5, [0.7, 0.5, 1], 1 / 3), (0.0, [1, 1, 1], 2 / 3), (None, [0.7, 0.2, 1], 0)],
)
def test_value_loss_by_hand(clip, errors, clipped):
    """Values 0.3, 0.8 and 2 from old ones of 0: 0.8 is past the clip, 2 too but on the wrong side."""
    loss, metrics = value_loss(jnp.array([[0.3, 0.8, 2.0]]), clip)
    np.testing.assert_allclose(loss, (0.5 * np.square(errors).sum(), 3), rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_fraction"].mean, clipped, rtol=1e-6)


def test_explained_variance_merges_exactly():
    """The sums over two parts give the value of the whole."""
    rng = np.random.default_rng(0)
    returns = rng.normal(1, 2, (6, 5)).astype(np.float32)
    values = returns + rng.normal(0, 1, (6, 5)).astype(np.float32)
    mask = rng.random((6, 5)) < 0.7

    def metrics(rows):
        arrays = [jnp.asarray(x[rows]) for x in (values, values, returns, mask)]
        return ppo_value_loss(*arrays, clip=None)[1]

    merged = {k: (v + metrics(slice(2, None))[k]).mean for k, v in metrics(slice(2)).items()}
    error_variance = merged["error_squared"] - merged["error"] ** 2
    explained = 1 - error_variance / (merged["return_squared"] - merged["return"] ** 2)
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    np.testing.assert_allclose(explained, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [[2, 0.5, 0], [0, 0, 0], [4, 0, 4]]),
        ("sequence", [[1, 1, 0], [0, 0, 0], [4, 0, 4]]),  # 2 * 0.5 in the first row, 4 * 6 in the last
    ],
)
def test_importance_weights_by_hand(level, expected):
    ratios = jnp.array([[2.0, 0.5, 7.0], [2.0, 2.0, 2.0], [4.0, jnp.nan, 6.0]])
    mask = jnp.array([[1, 1, 0], [0, 0, 0], [1, 0, 1]])
    sampler = jnp.full((3, 3), -1.0)
    weights = truncated_importance_weights(sampler + jnp.log(ratios), sampler, mask, level=level, maximum=4.0)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_importance_weights_are_constants_and_bounded():
    old, sampler, mask = jnp.array([[50.0, -1.0]]), jnp.array([[-50.0, -2.0]]), jnp.ones((1, 2))
    for level in ("token", "sequence"):
        total = lambda o, s, level=level: truncated_importance_weights(  # noqa: E731
            o, s, mask, level=level, maximum=1e12
        ).sum()
        value, gradients = jax.value_and_grad(total, (0, 1))(old, sampler)
        assert jnp.isfinite(value)
        assert all((g == 0).all() for g in gradients)


def test_unknown_level_is_an_error():
    with pytest.raises(ValueError, match="level='batch' is unknown"):
        truncated_importance_weights(RATIOS, RATIOS, RATIOS, level="batch", maximum=2.0)
