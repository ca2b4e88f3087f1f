"""Logits near 2^15, where float32 numbers are 1/256 apart: results must be as accurate as for small logits.

The logits are LEVEL plus multiples of 1/4, which float32 represents exactly; hidden states and head are exact
in bfloat16 too. The expected values are computed in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from loss_restatements import log_softmax

from jaxllm.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    token_entropy,
    token_log_probs,
)

LEVEL = 2.0**15
B, T, V = 4, 6, 43  # with block_size 1: 5 slices of 8 columns, and 3 columns that remain
TARGETS = np.random.default_rng(0).integers(0, V, (B, T))
WEIGHTS = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32)  # of log-probs and entropies

temperatures = pytest.mark.parametrize("temperature", [1.0, 0.7])
block_sizes = pytest.mark.parametrize("block_size", [None, 1])
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def hidden_and_head(dtype=jnp.float32):
    """Head row 0 is LEVEL in every column; hidden[b, t, 0] is 1."""
    rng = np.random.default_rng(2)
    hidden = rng.integers(-2, 3, (B, T, 3)) / 2.0
    head = rng.integers(-3, 4, (3, V)) / 2.0
    hidden[..., 0], head[0] = 1, LEVEL
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)


def exact_logits():
    return np.einsum("btd,dv->btv", *(np.asarray(x, np.float64) for x in hidden_and_head()))


def expected(temperature):
    """Log-probs, entropies, and the gradient of `weighted_sum` with respect to the logits."""
    log_p = log_softmax(exact_logits() / temperature)
    p, is_target = np.exp(log_p), np.arange(V) == TARGETS[..., None]
    entropy = -(p * log_p).sum(-1)
    d_log_prob, d_entropy = is_target - p, -p * (log_p + entropy[..., None])
    gradient = (WEIGHTS[0, ..., None] * d_log_prob + WEIGHTS[1, ..., None] * d_entropy) / temperature
    return log_p[is_target].reshape(B, T), entropy, gradient


def weighted_sum(log_probs, entropy):
    return (WEIGHTS[0] * log_probs + WEIGHTS[1] * entropy).sum()


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("level", [3e4, -3e4])
@temperatures
def test_equal_logits_have_log_prob_minus_log_v(level, temperature):
    logits, targets = jnp.full((1, 2, 11), level), jnp.array([[0, 10]])
    close(token_log_probs(logits, targets, temperature=temperature), -np.log(11))
    close(token_entropy(logits, temperature=temperature), np.log(11))
    close(cross_entropy(logits, targets, jnp.ones((1, 2)), label_smoothing=0.5)[0].mean, np.log(11))


@pytest.mark.parametrize("softcap", [None, 5e4])
@pytest.mark.parametrize("block_size", [None, 1])
@temperatures
@dtypes
def test_equal_logits_have_log_prob_minus_log_v_with_the_head_inside(dtype, temperature, block_size, softcap):
    # The last bit of tanh may depend on the place in a vector: 2^-9 for logits of 30,000.
    near = close if softcap is None else partial(np.testing.assert_allclose, atol=2**-8)
    hidden, head, targets = jnp.ones((1, 2, 1), dtype), jnp.full((1, 11), 3e4, dtype), jnp.array([[0, 10]])
    options = {"block_size": block_size, "softcap": softcap}
    log_probs, entropy = linear_token_log_probs(hidden, head, targets, temperature=temperature, **options)
    near(log_probs, -np.log(11))
    near(entropy, np.log(11))
    loss, _ = linear_cross_entropy(hidden, head, targets, jnp.ones((1, 2)), label_smoothing=0.5, **options)
    near(loss.mean, np.log(11))


@temperatures
def test_dense_values_and_gradients(temperature):
    def score(logits):
        log_probs = token_log_probs(logits, TARGETS, temperature=temperature)
        entropy = token_entropy(logits, temperature=temperature)
        return weighted_sum(log_probs, entropy), (log_probs, entropy)

    (_, values), gradient = jax.value_and_grad(score, has_aux=True)(jnp.asarray(exact_logits(), jnp.float32))
    for actual, truth in zip((*values, gradient), expected(temperature), strict=True):
        close(actual, truth)


def linear_scores(block_size, temperature):
    """A function that returns log-probs, entropies, and the gradient of `weighted_sum` by the head."""

    def score(head, hidden, targets, weights):
        options = {"block_size": block_size, "temperature": temperature}
        log_probs, entropy = linear_token_log_probs(hidden, head, targets, **options)
        return (weights[..., 0] * log_probs + weights[..., 1] * entropy).sum(), (log_probs, entropy)

    def run(head, hidden, targets, weights):
        (_, values), d_head = jax.value_and_grad(score, has_aux=True)(head, hidden, targets, weights)
        return *values, d_head

    return run


def linear_arguments(dtype=jnp.float32):
    hidden, head = hidden_and_head(dtype)
    return head, hidden, jnp.asarray(TARGETS), jnp.moveaxis(jnp.asarray(WEIGHTS), 0, -1)


def assert_linear_close(actual, temperature):
    log_probs, entropy, d_logits = expected(temperature)
    hidden = np.asarray(hidden_and_head()[0], np.float64)
    close(actual[0], log_probs)
    close(actual[1], entropy)
    d_head = np.einsum("btd,btv->dv", hidden, d_logits)
    atol = 0.03 if actual[2].dtype == jnp.bfloat16 else 5e-6  # the gradient has the type of the head
    np.testing.assert_allclose(np.asarray(actual[2], np.float64), d_head, rtol=atol / 3, atol=atol)


@temperatures
@block_sizes
@dtypes
def test_linear_values_and_gradients(dtype, block_size, temperature):
    actual = jax.jit(linear_scores(block_size, temperature))(*linear_arguments(dtype))
    assert_linear_close(actual, temperature)


@block_sizes
def test_linear_values_and_gradients_under_vmap(block_size):
    head, *rows = linear_arguments()
    one_row = jax.vmap(linear_scores(block_size, 0.7), in_axes=(None, 0, 0, 0))
    log_probs, entropy, d_head = jax.jit(one_row)(head, *(x[:, None] for x in rows))
    assert_linear_close((log_probs[:, 0], entropy[:, 0], d_head.sum(0)), 0.7)


@block_sizes
def test_linear_values_and_gradients_under_shard_map(block_size):
    mesh = jax.make_mesh((B,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        linear_scores(block_size, 0.7),
        mesh=mesh,
        in_specs=(whole, rows, rows, rows),
        out_specs=(rows, rows, whole),
    )
    assert_linear_close(jax.jit(sharded)(*linear_arguments()), 0.7)


@block_sizes
def test_linear_values_and_gradients_with_the_vocabulary_over_devices(block_size):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    padded = 44  # a multiple of 4; the logit of the new column is 0, so that its probability is 0
    head, *rows = linear_arguments()
    head = jnp.pad(head, [(0, 0), (0, padded - V)])
    by_row, of_head = (NamedSharding(mesh, s) for s in (PartitionSpec("fsdp"), PartitionSpec(None, "tensor")))
    arguments = jax.device_put([head, *rows], [of_head, by_row, by_row, by_row])
    log_probs, entropy, d_head = jax.jit(linear_scores(block_size, 0.7))(*arguments)
    assert_linear_close((log_probs, entropy, d_head[:, :V]), 0.7)


@block_sizes
def test_cross_entropy_and_its_terms(block_size):
    """Label smoothing compares with the mean logit; only the z-loss depends on the level."""
    options = {"label_smoothing": 0.3, "z_loss": 1e-4}
    logits, mask = exact_logits(), np.ones((B, T))
    log_p = log_softmax(logits)
    nll = -log_p[np.arange(V) == TARGETS[..., None]]
    z = 1e-4 * (np.log(np.exp(logits - LEVEL).sum(-1)) + LEVEL) ** 2
    hidden, head = hidden_and_head()
    for loss, metrics in (
        cross_entropy(jnp.asarray(logits, jnp.float32), TARGETS, mask, **options),
        linear_cross_entropy(hidden, head, TARGETS, mask, block_size=block_size, **options),
    ):
        close(metrics["loss"].mean, nll.mean())
        np.testing.assert_allclose(metrics["z_loss"].mean, z.mean(), rtol=1e-6)
        total = metrics["z_loss"].mean + 0.7 * nll.mean() - 0.3 * log_p.mean()
        np.testing.assert_allclose(loss.mean, total, rtol=1e-6)
    smoothed, _ = linear_cross_entropy(
        hidden, head, TARGETS, mask, block_size=block_size, label_smoothing=0.3
    )
    close(smoothed.mean, 0.7 * nll.mean() - 0.3 * log_p.mean())


@pytest.mark.parametrize("level", [0.1, 1 / 3, 0.7, -0.3, 3e4 + 0.1])
def test_equal_logits_predict_nothing(level):
    """A mean of equal numbers may be rounded down: token 0 would then count as the most likely token."""
    targets, mask = jnp.zeros((1, 2), int), jnp.ones((1, 2))
    assert cross_entropy(jnp.full((1, 2, 43), level), targets, mask)[1]["accuracy"].mean == 0
    hidden, head = jnp.ones((1, 2, 1)), jnp.full((1, 43), level)
    for block_size in (None, 1):
        _, metrics = linear_cross_entropy(hidden, head, targets, mask, block_size=block_size)
        assert metrics["accuracy"].mean == 0
