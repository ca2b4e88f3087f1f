"""Log-probs, entropy and cross-entropy from logits: values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    token_entropy,
    token_log_probs,
)

PROBABILITIES = np.array([[[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]])
TARGETS = jnp.array([[0, 1]])


def test_log_probs_and_entropy_by_hand():
    logits = jnp.log(PROBABILITIES)
    np.testing.assert_allclose(jnp.exp(token_log_probs(logits, TARGETS)), [[0.7, 0.25]], rtol=1e-6)
    entropy = -(PROBABILITIES * np.log(PROBABILITIES)).sum(-1)
    np.testing.assert_allclose(token_entropy(logits), entropy, rtol=1e-6)


def test_temperature_divides_the_logits():
    """At temperature 1/2 probabilities are squared."""
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum(-1, keepdims=True)
    logits = jnp.log(PROBABILITIES)
    np.testing.assert_allclose(
        token_log_probs(logits, TARGETS, temperature=0.5),
        np.log([[squared[0, 0, 0], squared[0, 1, 1]]]),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        token_entropy(logits, temperature=0.5), -(squared * np.log(squared)).sum(-1), rtol=1e-5
    )


def test_a_banned_token_adds_nothing():
    logits = jnp.array([[[0.0, -jnp.inf, 0.0]]])
    value, gradient = jax.value_and_grad(lambda z: token_entropy(z).sum())(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert token_log_probs(logits, jnp.array([[1]])) == -jnp.inf
    loss, gradient = jax.value_and_grad(
        lambda z: cross_entropy(z, jnp.array([[0]]), jnp.ones((1, 1)))[0].mean
    )(logits)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[-0.5, 0, 0.5]]], rtol=1e-6)


@pytest.mark.parametrize("target", [-100, -1, 3, 10**6])
def test_an_impossible_target_has_log_prob_minus_infinity(target):
    """JAX wraps a negative index and clamps a large one: either would train on another token."""
    logits, targets = jnp.log(PROBABILITIES), jnp.array([[0, target]])
    assert token_log_probs(logits, targets)[0, 1] == -jnp.inf
    hidden, head = jnp.ones((1, 2, 4)), jnp.ones((4, 3))
    assert linear_token_log_probs(hidden, head, targets)[0][0, 1] == -jnp.inf
    assert cross_entropy(logits, targets, jnp.ones((1, 2)))[0].mean == jnp.inf


def test_cross_entropy_by_hand():
    knobs = {"label_smoothing": 0.3, "z_loss": 0.5}
    loss, metrics = cross_entropy(jnp.log(2 * PROBABILITIES), TARGETS, jnp.array([[1, 1]]), **knobs)
    nll, uniform = -np.log([0.7, 0.25]), -np.log(PROBABILITIES[0]).mean(-1)
    z = 0.5 * np.log(2) ** 2
    np.testing.assert_allclose(loss.mean, (0.7 * nll + 0.3 * uniform + z).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].mean, nll.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"].mean, z, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"].mean, 0.5)


def test_an_untrained_head_is_never_accurate():
    """All logits equal: arg max would predict token 0, and be right where it is the target."""
    for targets in (jnp.zeros((1, 4), int), jnp.arange(4)[None]):
        hidden, mask = jnp.ones((1, 4, 2)), jnp.ones((1, 4))
        assert linear_cross_entropy(hidden, jnp.zeros((2, 4)), targets, mask)[1]["accuracy"].mean == 0
        assert cross_entropy(jnp.zeros((1, 4, 4)), targets, mask)[1]["accuracy"].mean == 0


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_an_error(label_smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing={label_smoothing}"):
        cross_entropy(jnp.log(PROBABILITIES), TARGETS, jnp.ones((1, 2)), label_smoothing=label_smoothing)
