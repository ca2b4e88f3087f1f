"""KL estimators near 0 and at large log ratios, and the controller of the KL coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import adaptive_kl_coefficient, kl_penalty


def estimate(x, estimator):
    return kl_penalty(jnp.asarray(x, jnp.float32), jnp.zeros(np.shape(x)), estimator=estimator)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [-1, 0, 2]), ("k2", [0.5, 0, 2]), ("k3", [np.e - 2, 0, np.exp(-2) + 1])],
)
def test_estimators_by_hand(estimator, expected):
    np.testing.assert_allclose(estimate([-1.0, 0.0, 2.0], estimator), expected, rtol=1e-6)


def test_k3_is_never_negative_in_float32():
    tiny = np.concatenate([np.geomspace(1e-30, 1, 20_001), -np.geomspace(1e-30, 1, 20_001)])
    assert (estimate(tiny, "k3") >= 0).all()
    assert (jax.jit(estimate, static_argnums=1)(tiny, "k3") >= 0).all()
    np.testing.assert_allclose(
        estimate(tiny, "k3"), np.expm1(-tiny) + tiny, rtol=1e-3, atol=1e-9, err_msg="near 0"
    )


def test_k3_is_exactly_zero_at_zero():
    value, gradient = jax.value_and_grad(lambda x: estimate(x, "k3"))(0.0)
    assert value == 0
    assert gradient == 0


def test_k3_of_a_large_log_ratio_is_finite_without_gradient():
    value, gradient = jax.vmap(jax.value_and_grad(lambda x: estimate(x, "k3")))(
        jnp.array([-100.0, -20.5, 100.0])
    )
    np.testing.assert_allclose(value, [np.expm1(20) - 20, np.expm1(20) - 20, 99], rtol=1e-6)
    np.testing.assert_array_equal(gradient, [0, 0, 1])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_only_the_policy_gets_a_gradient(estimator):
    policy, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
    total = lambda p, r: kl_penalty(p, r, estimator=estimator).sum()  # noqa: E731
    ours, theirs = jax.grad(total, (0, 1))(policy, reference)
    x = policy - reference
    slope = {"k1": jnp.ones_like(x), "k2": x, "k3": 1 - jnp.exp(-x)}[estimator]
    np.testing.assert_allclose(ours, slope, rtol=1e-6)
    np.testing.assert_array_equal(theirs, 0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    """The mean over all tokens, weighted by the policy's probabilities, is the KL itself."""
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    estimates = kl_penalty(jnp.log(policy), jnp.log(reference), estimator=estimator)
    np.testing.assert_allclose(policy @ estimates, policy @ np.log(policy / reference), rtol=1e-4)


def test_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="estimator='k4' is unknown"):
        estimate([0.0], "k4")


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)],
    ids=["on", "near", "above", "below"],
)
def test_controller_by_hand(kl, factor):
    """Target 6, 100 samples per step, a horizon of 1000: at most 0.2 * 100 / 1000 = 2% either way."""
    new = adaptive_kl_coefficient(0.5, kl, target=6.0, horizon=1000, num_samples=100)
    np.testing.assert_allclose(new, 0.5 * factor, rtol=1e-6)


@pytest.mark.parametrize(("kl", "exponent"), [(60.0, 0.2), (0.0, -0.2)], ids=["above", "below"])
def test_over_a_horizon_the_coefficient_changes_by_e_to_the_fifth(kl, exponent):
    """100 steps of 10 samples make a horizon of 1000: 1.002^100 = e^0.1998."""
    coefficient = 0.5
    for _ in range(100):
        coefficient = adaptive_kl_coefficient(coefficient, kl, target=6.0, horizon=1e3, num_samples=10)
    np.testing.assert_allclose(coefficient, 0.5 * np.exp(exponent), rtol=1e-3)
