"""The best evaluation so far, and when to stop the run."""

import math

import pytest

from jaxllm.training.early_stopping import EarlyStopping

NAN = math.nan


def after(values, *, highest=False, patience=0, target=None):
    """After an evaluation every ten steps: the EarlyStopping, and which of them were the best so far."""
    early_stopping = EarlyStopping("eval/loss", highest, patience, target)
    return early_stopping, [early_stopping.update(10 * i, value) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("highest", "values", "improved", "step"),
    [
        (False, [3, 2, 4, 1], [True, True, False, True], 40),
        (True, [3, 2, 4, 1], [True, False, True, False], 30),
        (False, [-1, -2, 0], [True, True, False], 20),
        (True, [0.0, 0.0], [True, False], 10),  # an equal value is not better
    ],
)
def test_the_best_is_the_lowest_or_the_highest(highest, values, improved, step):
    early_stopping, found = after(values, highest=highest)
    assert found == improved
    assert early_stopping.step == step
    assert early_stopping.value == (max if highest else min)(values)


def test_nan_is_never_the_best():
    early_stopping, found = after([NAN, 3, NAN])
    assert found == [False, True, False]
    assert (early_stopping.step, early_stopping.value, early_stopping.waited) == (20, 3, 1)
    assert after([NAN])[0].step is None


def test_the_run_stops_after_patience_evaluations_without_a_better_one():
    assert not after([1, 2, 2], patience=3)[0].should_stop
    assert after([1, 2, 2, 2], patience=3)[0].should_stop
    assert not after([1, 2, 2, 0, 2, 2], patience=3)[0].should_stop  # a better one restarts the count
    assert after([NAN, NAN], patience=2)[0].should_stop


def test_patience_of_zero_never_stops():
    assert not after([1] + [2] * 100, patience=0)[0].should_stop
    assert not after([], patience=1)[0].should_stop


@pytest.mark.parametrize(
    ("highest", "values", "stops"),
    [
        (False, [3, 2.1], False),
        (False, [3, 2], True),
        (False, [1, 3], True),  # it was reached before
        (True, [1, 1.9], False),
        (True, [1, 2.5], True),
        (False, [NAN], False),
        (False, [], False),
    ],
)
def test_a_target_that_is_reached_stops_the_run(highest, values, stops):
    assert after(values, highest=highest, target=2.0)[0].should_stop is stops
    assert not after(values, highest=highest)[0].should_stop
