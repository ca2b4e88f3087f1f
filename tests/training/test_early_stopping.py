"""The best evaluation so far, and when to stop waiting for a better one."""

import math

import pytest

from jaxllm.training.early_stopping import EarlyStopping

NAN = math.nan


def after(values, *, highest=False, patience=0, target=None):
    """The comparison after an evaluation every ten steps, and which of them were the best yet."""
    best = EarlyStopping("eval/loss", highest, patience, target)
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
    assert not after([1, 2, 2], patience=3)[0].over
    assert after([1, 2, 2, 2], patience=3)[0].over
    assert not after([1, 2, 2, 0, 2, 2], patience=3)[0].over  # a better one begins the count anew
    assert after([NAN, NAN], patience=2)[0].over


def test_without_patience_nothing_is_over():
    assert not after([1] + [2] * 100, patience=0)[0].over
    assert not after([], patience=1)[0].over


@pytest.mark.parametrize(
    ("highest", "values", "over"),
    [
        (False, [3, 2.1], False),
        (False, [3, 2], True),
        (False, [1, 3], True),  # it was there
        (True, [1, 1.9], False),
        (True, [1, 2.5], True),
        (False, [NAN], False),
        (False, [], False),
    ],
)
def test_a_target_that_is_reached_ends_the_run(highest, values, over):
    assert after(values, highest=highest, target=2.0)[0].over is over
    assert not after(values, highest=highest)[0].over
