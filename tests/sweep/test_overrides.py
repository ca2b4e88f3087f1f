"""The functions that a config's sweep() is made of."""

import doctest
import math

import pytest

from jaxllm import sweep
from jaxllm.errors import ConfigError
from jaxllm.sweep import chain, grid, log_uniform, machine, overrides, seeds, trials, zipped


def test_a_grid_has_every_combination_and_the_last_field_varies_fastest():
    assert list(grid({"a.b": [1, 2], "c": ["x", None]})) == [
        {"a.b": 1, "c": "x"},
        {"a.b": 1, "c": None},
        {"a.b": 2, "c": "x"},
        {"a.b": 2, "c": None},
    ]
    assert list(grid({})) == [{}]


def test_zipped_takes_values_side_by_side():
    assert list(zipped({"a": [1, 2], "b": (3, 4)})) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ConfigError, match=r"as many values for each field: a has 2, b has 1"):
        list(zipped({"a": [1, 2], "b": [3]}))


def test_chain_and_seeds():
    found = seeds(chain(grid({"a": [1]}), [{"b": 2}]), 2, first=5)
    assert list(found) == [{"a": 1, "seed": 5}, {"a": 1, "seed": 6}, {"b": 2, "seed": 5}, {"b": 2, "seed": 6}]


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (grid({"a": "muon"}), r"grid\(\): a needs a list of values, such as \['muon'\]"),
        (zipped({"a": 0.1}), r"zipped\(\): a needs a list of values, such as \[0.1\]"),
        (grid({"a": []}), r"grid\(\): a has no value"),
        (seeds([{}], 0), r"seeds\(\): the number of seeds is 0; it must be at least 1"),
        (seeds([{"seed": 5}], 2), r"seeds\(\): a trial has seed=5 already"),
    ],
)
def test_what_makes_no_trials_is_an_error_that_names_the_field(trials, message):
    with pytest.raises(ConfigError, match=message):
        list(trials)


def test_log_uniform_is_a_function_of_its_seed_and_a_larger_count_adds_trials():
    ranges = {"a": (1e-4, 1e-2), "b": (1.0, 1.0)}
    found = list(log_uniform(ranges, 400, seed=3))
    assert found[:20] == list(log_uniform(ranges, 20, seed=3))
    assert found[:20] != list(log_uniform(ranges, 20, seed=4))
    logs = [math.log10(each["a"]) for each in found]
    assert all(-4 <= log <= -2 for log in logs)
    # uniform: mean -3, standard deviation 2 / sqrt(12) = 0.577, so the mean of 400 is within 3 x 0.029
    assert sum(logs) / 400 == pytest.approx(-3, abs=0.09)
    assert all(each["b"] == 1.0 for each in found)
    with pytest.raises(ConfigError, match=r"log_uniform\(\): a needs 0 < low <= high, got \(0, 1\)"):
        list(log_uniform({"a": (0, 1)}, 1))


@pytest.mark.parametrize("module", [sweep, overrides, trials, machine], ids=lambda module: module.__name__)
def test_the_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
