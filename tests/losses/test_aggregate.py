"""Sums and weights: values by hand, auxiliary losses, and the statistics that other losses build on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import (
    Weighted,
    add_auxiliary,
    aggregate,
    cross_entropy,
    masked_mean,
    masked_variance,
    whiten,
)

VALUES = jnp.array([[1.0, 2.0, 3.0], [10.0, jnp.nan, jnp.inf], [jnp.nan, jnp.nan, jnp.nan]])
MASK = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "total", "weight"),
    [
        ("token_mean", 16, 4),  # four tokens
        ("sequence_mean", 2 + 10, 2),  # two sequences with a token
        ("sequence_sum", 6 + 10, 2),
        ("constant", 16, 3 * 5),  # three rows, the empty one too, of at most five tokens
    ],
)
@pytest.mark.parametrize("kind", [bool, np.float32, np.int8])
def test_modes_by_hand(mode, total, weight, kind):
    assert aggregate(VALUES, MASK.astype(kind), mode, max_length=5) == (total, weight)


def test_a_weighted_is_two_float32_scalars():
    assert [x.dtype for x in aggregate(jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2)), "token_mean")] == [
        jnp.float32,
        jnp.float32,
    ]


def test_weighted_adds_and_sums():
    parts = [Weighted(jnp.float32(s), jnp.float32(w)) for s, w in [(2, 1), (3, 3), (5, 4)]]
    assert parts[0] + parts[1] == (5, 4)
    assert sum(parts) == (10, 8)
    assert sum(parts).mean == 1.25


def test_mean_of_nothing_is_zero_with_zero_gradient():
    mean, gradients = jax.value_and_grad(lambda s, w: Weighted(s, w).mean, (0, 1))(3.0, 0.0)
    assert mean == 0
    assert gradients == (0, 0)


def test_gradient_of_a_mean():
    gradient = jax.grad(lambda v: aggregate(v, MASK, "sequence_mean").mean)(VALUES)
    np.testing.assert_allclose(gradient, [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("mode", "complaint"), [("mean", "mode='mean' is unknown"), ("constant", "give max_length")]
)
def test_invalid_arguments_are_errors(mode, complaint):
    with pytest.raises(ValueError, match=complaint):
        aggregate(VALUES, MASK, mode)


def weighted(total, weight):
    return Weighted(jnp.float32(total), jnp.float32(weight))


def test_auxiliary_losses_by_hand():
    loss, aux = (
        weighted(12, 4),
        {"balance": weighted(1, 2), "router_z": weighted(3, 4), "empty": weighted(0, 0)},
    )
    total, metrics = add_auxiliary(loss, {"loss": loss}, aux)
    assert total == (12 + 0.5 * 4 + 0.75 * 4, 4)
    assert metrics == {"loss": loss} | aux


def test_without_auxiliary_losses_nothing_changes():
    loss = weighted(12, 4)
    metrics = {"loss": loss}
    same_loss, same_metrics = add_auxiliary(loss, metrics, {})
    assert same_loss is loss
    assert same_metrics is metrics


def test_an_auxiliary_loss_has_a_gradient_in_the_loss_and_none_in_the_metrics():
    def total(aux_sum, of_metrics):
        loss, metrics = add_auxiliary(weighted(12, 4), {}, {"balance": Weighted(aux_sum, jnp.float32(2))})
        return metrics["balance"].sum if of_metrics else loss.mean

    assert jax.grad(total)(1.0, of_metrics=False) == 0.5
    assert jax.grad(total)(1.0, of_metrics=True) == 0


def test_auxiliary_losses_merge_over_micro_batches():
    """Loss and auxiliary loss have the same weights: 1 x 6, 2 x 3 and 6 x 1 rows give equal means."""
    rng = np.random.default_rng(0)
    logits, balance = (
        rng.normal(size=(6, 5, 7)).astype(np.float32),
        rng.normal(size=(6, 5)).astype(np.float32),
    )
    mask = rng.random((6, 5)) < 0.6

    def mean(logits, balance, parts):
        rows = [slice(n, n + 6 // parts) for n in range(0, 6, 6 // parts)]
        losses = [
            add_auxiliary(
                *cross_entropy(logits[r], np.zeros(mask[r].shape, int), mask[r]),
                {"balance": aggregate(balance[r], mask[r], "token_mean")},
            )[0]
            for r in rows
        ]
        return sum(losses).mean

    gradient = jax.jit(jax.value_and_grad(mean, (0, 1)), static_argnums=2)
    whole = gradient(logits, balance, 1)
    plain = cross_entropy(jnp.asarray(logits), jnp.zeros(mask.shape, int), mask)[0].mean
    np.testing.assert_allclose(whole[0], plain + balance[mask].mean(), rtol=1e-5)
    for parts in (2, 6):
        split = gradient(logits, balance, parts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), split, whole)


def test_an_auxiliary_loss_with_the_name_of_a_metric_is_an_error():
    loss = weighted(12, 4)
    with pytest.raises(ValueError, match="aux has the name of a metric: accuracy, loss; rename"):
        add_auxiliary(
            loss, {"loss": loss, "accuracy": loss}, {"loss": loss, "balance": loss, "accuracy": loss}
        )


def test_masked_statistics_by_hand():
    x, mask = jnp.array([[2.0, jnp.nan], [4.0, 9.0]]), jnp.array([[1, 0], [1, 1]])
    assert masked_mean(x, mask) == 5
    assert masked_variance(x, mask) == 13  # (9 + 1 + 16) / 2
    expected = (np.array([[2, 5], [4, 9]]) - 5) / np.sqrt(13)
    np.testing.assert_allclose(whiten(x, mask), expected, rtol=1e-6)
    kept = whiten(x, mask, shift_mean=False, epsilon=3)
    np.testing.assert_allclose(kept, [[-3 / 4 + 5, 0], [-1 / 4 + 5, 4 / 4 + 5]], rtol=1e-6)


@pytest.mark.parametrize("counted", [0, 1])
def test_statistics_of_almost_nothing(counted):
    x, mask = jnp.array([7.0, jnp.nan, jnp.inf]), jnp.arange(3) < counted
    assert masked_mean(x, mask) == 7 * counted
    assert masked_variance(x, mask) == 0
    np.testing.assert_array_equal(whiten(x, mask), 0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 123.456, 1e6])
def test_equal_values_have_no_variance(value):
    """The rounding error of a float32 mean would count as variance, which whitening would scale up to 1."""
    x, mask = jnp.full((1000,), value), jnp.arange(1000) % 3 != 0
    assert masked_variance(x, mask) < (1e-7 * value) ** 2
    assert jnp.abs(whiten(x, mask)).max() < 1e-3


def test_statistics_equal_numpy():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3, 2, (6, 7)), rng.random((6, 7)) < 0.6
    np.testing.assert_allclose(masked_mean(jnp.asarray(x), mask), x[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(masked_variance(jnp.asarray(x), mask), x[mask].var(ddof=1), rtol=1e-5)


@pytest.mark.parametrize("function", [masked_mean, masked_variance, lambda x, mask: whiten(x, mask)[0, 1]])
def test_garbage_reaches_no_statistic_and_no_gradient(function):
    rng = np.random.default_rng(1)
    mask = jnp.array([[0, 1, 1, 0], [1, 0, 1, 1]])
    clean = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    expected = jax.value_and_grad(function)(clean, mask)
    for garbage in (jnp.nan, jnp.inf, -1e30):
        actual = jax.value_and_grad(function)(jnp.where(mask == 1, clean, garbage), mask)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
