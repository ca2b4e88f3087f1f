"""Whether two measurements differ, given their standard errors."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    value: float
    error: float  # standard error
    degrees_of_freedom: float = math.inf  # of the error's own estimate


class Difference(NamedTuple):
    value: float
    half_width: float  # of its 95% interval

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.value) > self.half_width


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over runs that differ only in the seed, with the standard error from their spread. One run
    keeps its own standard error, which is over held-out rows and not over seeds."""
    if len(estimates) == 1:
        return estimates[0]
    values = [estimate.value for estimate in estimates]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, len(values) - 1)


def difference(before: Estimate, after: Estimate) -> Difference:
    """`after` minus `before` with its 95% interval: ± 1.96 standard errors, or more where an error is from
    few seeds, by Student's t with the degrees of freedom of Welch (1947) and Satterthwaite (1946)."""
    from scipy.special import stdtrit

    error = math.hypot(before.error, after.error)
    inverse = 0.0
    if error:
        inverse = sum((each.error / error) ** 4 / each.degrees_of_freedom for each in (before, after))
    degrees_of_freedom = min(1 / inverse, 1e9) if inverse else 1e9  # in effect infinite
    return Difference(after.value - before.value, float(stdtrit(degrees_of_freedom, 0.975)) * error)
