"""The best evaluation so far, and when to stop waiting for a better one."""

import math

import pytest

from jaxllm.training.best import Best

NAN = math.nan


def after(values, *, highest=False, patience=0):
    """The comparison after an evaluation every ten steps, and which of them were the best yet."""
    best = Best("eval/loss", highest, patience)
    return best, [best.update(10 * i, value) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("highest", "values", "bettered", "step"),
    [
        (False, [3, 2, 4, 1], [True, True, False, True], 40),
        (True, [3, 2, 4, 1], [True, False, True, False], 30),
        (False, [-1, -2, 0], [True, True, False], 20),
        (True, [0.0, 0.0], [True, False], 10),  # as good is no better: the first stays
    ],
)
def test_the_best_is_the_lowest_or_the_highest(highest, values, bettered, step):
    best, found = after(values, highest=highest)
    assert found == bettered
    assert best.step == step
    assert best.value == (max if highest else min)(values)


def test_nan_is_never_the_best():
    best, found = after([NAN, 3, NAN])
    assert found == [False, True, False]
    assert (best.step, best.value, best.waited) == (20, 3, 1)
    assert after([NAN])[0].step is None


def test_patience_ends_after_so_many_evaluations_without_a_better_one():
    assert not after([1, 2, 2], patience=3)[0].given_up
    assert after([1, 2, 2, 2], patience=3)[0].given_up
    assert not after([1, 2, 2, 0, 2, 2], patience=3)[0].given_up  # a better one begins the count anew
    assert after([NAN, NAN], patience=2)[0].given_up


def test_without_patience_nothing_is_given_up():
    assert not after([1] + [2] * 100, patience=0)[0].given_up
    assert not after([], patience=1)[0].given_up
