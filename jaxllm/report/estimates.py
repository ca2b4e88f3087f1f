"""Whether two measurements differ, given their standard errors."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.evaluation.perplexity import ratio


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


class PairedDifference(NamedTuple):
    value: float
    half_width: float  # of its 95% interval; NaN of a single pair
    p: float | None  # of McNemar's exact test; None where scores are not all 0 or 1

    @property
    def is_distinguishable(self) -> bool:
        """Whether p < 0.05, or without p whether the interval excludes 0."""
        return abs(self.value) > self.half_width if self.p is None else self.p < 0.05


def paired_difference(pairs: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> PairedDifference:
    """Second minus first of two models' scores, (numerator, denominator), of the same questions.

    McNemar (1947), exact: of the questions that one model alone gets right, each model has half by chance.
    The interval is Student's, of the sum of differences over the sum of denominators (delta method).

    >>> right, wrong = (1.0, 1.0), (0.0, 1.0)
    >>> paired_difference([(wrong, right)] * 6 + [(right, right)] * 2).p
    0.03125
    """
    from scipy.special import bdtr, stdtrit

    before, after = (np.array(scores, float) for scores in zip(*pairs, strict=True))
    value, error = ratio(after[:, 0] - before[:, 0], (after[:, 1] + before[:, 1]) / 2)
    half_width = float(stdtrit(len(pairs) - 1, 0.975)) * error if len(pairs) > 1 else math.nan
    if not np.isin([before, after], (0, 1)).all():
        return PairedDifference(value, half_width, None)
    gained, lost = (int((x[:, 0] > y[:, 0]).sum()) for x, y in ((after, before), (before, after)))
    p = min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    return PairedDifference(value, half_width, p)
