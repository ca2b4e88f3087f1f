"""Pure functions that yield the overrides of trials, as dicts of dotted config fields."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxllm.errors import ConfigError

Overrides = dict[str, Any]  # a dotted config field -> its value


def grid(fields: Mapping[str, Iterable[Any]]) -> Iterator[Overrides]:
    """Every combination of the fields' values; the last field varies fastest.

    >>> list(grid({"data.batch_size": [8, 16], "seed": [0, 1]}))[1]
    {'data.batch_size': 8, 'seed': 1}
    """
    values = {field: values_of("grid", field, each) for field, each in fields.items()}
    for each in itertools.product(*values.values()):
        yield dict(zip(fields, each, strict=True))


def values_of(function: str, field: str, values: Any) -> list[Any]:
    """The values of a field; ConfigError where they are no list, or an empty one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"{function}(): {field} needs a list of values, such as [{values!r}]")
    if not (found := list(values)):
        raise ConfigError(f"{function}(): {field} has no value")
    return found


def zipped(fields: Mapping[str, Iterable[Any]]) -> Iterator[Overrides]:
    """The first value of every field, then the second of every field. ConfigError for unequal lengths.

    >>> list(zipped({"data.batch_size": [8, 16], "training.steps": [200, 100]}))[1]
    {'data.batch_size': 16, 'training.steps': 100}
    """
    values = {field: values_of("zipped", field, each) for field, each in fields.items()}
    if len(set(map(len, values.values()))) > 1:
        lengths = ", ".join(f"{field} has {len(each)}" for field, each in values.items())
        raise ConfigError(f"zipped() needs as many values for each field: {lengths}")
    for each in zip(*values.values(), strict=True):
        yield dict(zip(fields, each, strict=True))


def chain(*sweeps: Iterable[Overrides]) -> Iterator[Overrides]:
    """The trials of one sweep after those of another."""
    return itertools.chain(*sweeps)


def log_uniform(ranges: Mapping[str, tuple[float, float]], count: int, seed: int = 0) -> Iterator[Overrides]:
    """`count` random trials, each field uniform in its logarithm between two bounds.

    The same seed gives the same trials, and a larger `count` adds to them. Better than a grid where few of
    many fields matter (Bergstra and Bengio, 2012).
    """
    for field, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise ConfigError(f"log_uniform(): {field} needs 0 < low <= high, got ({low}, {high})")
    draw = random.Random(seed)
    for _ in range(count):
        drawn = {
            f: math.exp(draw.uniform(math.log(low), math.log(high))) for f, (low, high) in ranges.items()
        }
        yield {field: float(f"{value:.4g}") for field, value in drawn.items()}  # short names of trials


def seeds(sweep: Iterable[Overrides], count: int, first: int = 0) -> Iterator[Overrides]:
    """Each trial with `count` seeds, `first` and those after it: reports compare means over them."""
    if count < 1:
        raise ConfigError(f"seeds(): the number of seeds is {count}; it must be at least 1")
    for trial in sweep:
        if "seed" in trial:
            raise ConfigError(f"seeds(): a trial has seed={trial['seed']} already: leave out one of the two")
        for seed in range(first, first + count):
            yield {**trial, "seed": seed}
