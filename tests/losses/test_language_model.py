"""Log-probs, entropy, cross-entropy: by hand, and with the head applied inside equal to the dense form."""

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


@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["small", "large"])
def test_log_probs_and_entropy_by_hand(shift):
    logits = jnp.log(PROBABILITIES) + shift
    tolerance = {"rtol": 1e-3 if shift else 1e-6}
    np.testing.assert_allclose(jnp.exp(token_log_probs(logits, TARGETS)), [[0.7, 0.25]], **tolerance)
    entropy = -(PROBABILITIES * np.log(PROBABILITIES)).sum(-1)
    np.testing.assert_allclose(token_entropy(logits), entropy, **tolerance)


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
def test_an_impossible_target_is_loud(target):
    """JAX wraps a negative index and clamps a large one: either would train on some other token."""
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
    """All logits equal: arg max would say token 0, and be right of it."""
    for targets in (jnp.zeros((1, 4), int), jnp.arange(4)[None]):
        hidden, mask = jnp.ones((1, 4, 2)), jnp.ones((1, 4))
        assert linear_cross_entropy(hidden, jnp.zeros((2, 4)), targets, mask)[1]["accuracy"].mean == 0
        assert cross_entropy(jnp.zeros((1, 4, 4)), targets, mask)[1]["accuracy"].mean == 0


def linear_arrays(batch=2, length=6, width=5, vocab_size=43):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(batch, length, width)), rng.normal(size=(width, vocab_size))
    targets = rng.integers(0, vocab_size, (batch, length))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(targets)


def dense_logits(hidden, head, softcap):
    logits = hidden @ head
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("block_size", [None, 1, 2, 4, 5, 6, 100])
def test_linear_log_probs_and_entropy_equal_the_dense_ones(block_size, softcap):
    """V = 43 is cut into up to 5 slices of 8, with an odd remainder; 4 and 5 do not divide T = 6."""
    hidden, head, targets = linear_arrays()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, *targets.shape)), jnp.float32)

    def score(log_probs, entropy):
        return (weights[0] * log_probs + weights[1] * entropy).sum(), (log_probs, entropy)

    def linear(hidden, head):
        knobs = {"temperature": 0.7, "softcap": softcap, "block_size": block_size}
        return score(*linear_token_log_probs(hidden, head, targets, **knobs))

    def dense(hidden, head):
        logits = dense_logits(hidden, head, softcap)
        return score(
            token_log_probs(logits, targets, temperature=0.7), token_entropy(logits, temperature=0.7)
        )

    actual = jax.jit(jax.value_and_grad(linear, (0, 1), has_aux=True))(hidden, head)
    expected = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


@pytest.mark.parametrize("block_size", [2, None])
def test_linear_cross_entropy_equals_the_dense_one(block_size):
    hidden, head, targets = linear_arrays()
    mask, knobs = (
        jnp.array([[1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0]]),
        {"label_smoothing": 0.1, "z_loss": 0.01},
    )

    def linear(hidden, head):
        loss, metrics = linear_cross_entropy(hidden, head, targets, mask, block_size=block_size, **knobs)
        return loss.mean, (loss, metrics)

    def dense(hidden, head):
        loss, metrics = cross_entropy(hidden @ head, targets, mask, **knobs)
        return loss.mean, (loss, metrics)

    actual = jax.jit(jax.value_and_grad(linear, (0, 1), has_aux=True))(hidden, head)
    expected = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


def test_linear_functions_map_over_batches():
    hidden, head, targets = linear_arrays()
    one = lambda h, t: linear_token_log_probs(h[None], head, t[None], block_size=2)  # noqa: E731
    mapped = jax.vmap(one)(hidden, targets)
    whole = linear_token_log_probs(hidden, head, targets, block_size=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=1e-5), mapped, whole)


def test_mixed_precision_is_promoted_and_gradients_keep_their_types():
    hidden, head, targets = linear_arrays()
    narrow = hidden.astype(jnp.bfloat16)
    loss = lambda h, w: linear_cross_entropy(h, w, targets, jnp.ones(targets.shape), block_size=2)[0].mean  # noqa: E731
    gradients = jax.grad(loss, (0, 1))(narrow, head)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    expected = jax.grad(loss, (0, 1))(narrow.astype(jnp.float32), head)
    np.testing.assert_allclose(gradients[1], expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(label_smoothing):
    hidden, head, targets = linear_arrays()
    with pytest.raises(ValueError, match=f"label_smoothing={label_smoothing}"):
        linear_cross_entropy(hidden, head, targets, jnp.ones((2, 6)), label_smoothing=label_smoothing)


def test_a_head_of_another_width_is_refused():
    hidden, head, targets = linear_arrays()
    with pytest.raises(ValueError, match=r"head must be \[D, V\] with the D of hidden, 5; got \(43, 5\)"):
        linear_token_log_probs(hidden, head.T, targets)


def test_a_block_of_nothing_is_refused():
    with pytest.raises(ValueError, match="block_size=0"):
        linear_token_log_probs(*linear_arrays(), block_size=0)
