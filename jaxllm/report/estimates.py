"""Whether two figures differ, given how uncertain each is."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit


class Estimate(NamedTuple):
    value: float
    error: float  # standard error
    freedom: float = math.inf  # degrees of freedom that the error was estimated with


class Difference(NamedTuple):
    value: float
    half_width: float  # of its 95% interval

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.value) > self.half_width


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Of runs that differ in their seed: their mean, with the error that their spread gives it. Of one run:
    its own, which knows of the held-out rows but not of other seeds."""
    if len(estimates) == 1:
        return estimates[0]
    values = [estimate.value for estimate in estimates]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, len(values) - 1)


def difference(before: Estimate, after: Estimate) -> Difference:
    """`after` minus `before`, with 1.96 standard errors, or as many more as errors from few seeds ask for:
    Student's t with the degrees of freedom of Welch (1947) and Satterthwaite (1946)."""
    error = math.hypot(before.error, after.error)
    inverse = sum((each.error / error) ** 4 / each.freedom for each in (before, after)) if error else 0
    freedom = min(1 / inverse, 1e9) if inverse else 1e9  # as good as infinite
    return Difference(after.value - before.value, float(stdtrit(freedom, 0.975)) * error)
