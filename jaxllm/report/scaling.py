"""Scaling laws fitted to runs: the best model size for a compute budget, and reward against compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig, matrix_parameters
from jaxllm.report.runs import Run
from jaxllm.training.metrics import held_out_names

RESAMPLES = 1000
SAME_BUDGET = 1.2  # runs whose FLOPs differ by less than this factor belong to one budget


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


class Trained(NamedTuple):
    """What a finished run says of its size and budget."""

    parameters: float  # in matrix products: with the head, without the embedding
    flops: float
    loss: float  # held out


class Optimum(NamedTuple):
    """The lowest point of the parabola through the losses of one budget."""

    flops: float  # the geometric mean of the budget's runs
    parameters: Interval
    loss: float
    in_range: bool  # the parabola opens upwards, and its lowest point lies between the sizes that were run
    points: list[Trained]
    curve: Polynomial  # the loss, of log parameters


class IsoFLOPs(NamedTuple):
    """Parameters that are best for a budget of C FLOPs: coefficient * C ** exponent."""

    optima: list[Optimum]
    noise: float  # standard deviation of the losses around the parabolas
    coefficient: float
    exponent: Interval
    resampled: np.ndarray  # [RESAMPLES, 2]: log coefficient and exponent

    def best_parameters(self, flops: float) -> Interval:
        """For another budget."""
        logs = self.resampled @ np.array([1.0, np.log(flops)])
        return Interval(self.coefficient * flops**self.exponent.value, *map(float, np.exp(_middle(logs))))


class Sigmoid(NamedTuple):
    """initial + (asymptote - initial) / (1 + (midpoint / compute) ** exponent)."""

    initial: float
    asymptote: Interval
    midpoint: Interval  # the compute at which half of the rise is made
    exponent: Interval


def sigmoid(compute: Any, initial: float, asymptote: Any, midpoint: Any, exponent: Any) -> np.ndarray:
    """ScaleRL's curve of reward against compute (Khatri et al. 2025, arXiv:2510.13786, equation 1)."""
    with np.errstate(divide="ignore", over="ignore"):  # at compute 0
        return initial + (asymptote - initial) / (1 + (midpoint / np.asarray(compute)) ** exponent)


def trained(run: Run, metric: str) -> Trained:
    """Raises ConfigError where the run has no such metric or no known size."""
    last, flops, tokens = run.last(metric), run.flops, run.tokens
    if last is None or not flops or not tokens:
        names = ", ".join(held_out_names(run.rows))
        raise ConfigError(f"{run.folder} has no {metric}: it has {names or 'no evaluations'}")
    return Trained(matrix_parameters(parse(ModelConfig, run.config["model"], "model")), flops, last.value)


def fit_isoflops(points: Sequence[Trained], seed: int = 0) -> IsoFLOPs:
    """Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556): for each budget a parabola of the loss in log
    parameters, and a line through the logs of their lowest points.

    Intervals are by a parametric bootstrap: all is fitted again to losses drawn around the parabolas, with
    the standard deviation of what these leave, in which several seeds of a size count. Raises ConfigError
    with fewer than two budgets of at least three sizes whose lowest point lies between their sizes.
    """
    found = _budgets(points)
    budgets = [each for each in found if len({point.parameters for point in each}) >= 3]
    if len(budgets) < 2:
        raise ConfigError(
            f"{len(budgets)} of {len(found)} budgets of FLOPs have at least 3 sizes, and two are needed: see "
            "configs/isoflops.py"
        )
    sizes = [np.log([point.parameters for point in each]) for each in budgets]
    losses = [np.array([point.loss for point in each]) for each in budgets]
    flops = np.array([np.mean(np.log([point.flops for point in each])) for each in budgets])
    curves = [Polynomial.fit(x, y, 2) for x, y in zip(sizes, losses, strict=True)]
    smooth = [curve(x) for curve, x in zip(curves, sizes, strict=True)]
    lowest = np.array([_lowest(curve, x) for curve, x in zip(curves, sizes, strict=True)])
    used = np.array([x.min() < at < x.max() for x, at in zip(sizes, lowest, strict=True)], bool)
    if used.sum() < 2:
        raise ConfigError(
            f"{used.sum()} of {len(budgets)} budgets have their lowest loss between the sizes that were run, "
            "and two are needed: add smaller or larger sizes"
        )
    left = sum(((y - z) ** 2).sum() for y, z in zip(losses, smooth, strict=True))
    freedom = sum(map(len, losses)) - 3 * len(budgets)
    noise = float(np.sqrt(left / freedom)) if freedom else float("nan")

    random = np.random.default_rng(seed)
    drawn = np.full((RESAMPLES, len(budgets)), np.nan)
    for row in drawn if freedom else ():
        for i, (x, y) in enumerate(zip(sizes, smooth, strict=True)):
            row[i] = _lowest(Polynomial.fit(x, y + random.normal(0, noise, len(y)), 2), x)
    lines = [_line(flops, row, used & np.isfinite(row)) for row in drawn]
    intercept, slope = _line(flops, lowest, used)
    optima = [
        Optimum(
            float(np.exp(flops[i])),
            Interval(*map(float, np.exp([lowest[i], *_middle(drawn[:, i])]))),
            float(curves[i](lowest[i])),
            bool(used[i]),
            budgets[i],
            curves[i],
        )
        for i in range(len(budgets))
    ]
    resampled = np.array(lines)
    exponent = Interval(slope, *_middle(resampled[:, 1]))
    return IsoFLOPs(optima, noise, float(np.exp(intercept)), exponent, resampled)


def _lowest(curve: Polynomial, x: np.ndarray) -> float:
    """Where a parabola is lowest, at most the range of `x` beyond its ends; nan where it opens downwards."""
    _, linear, square = curve.convert().coef
    if square <= 0:
        return float("nan")
    return float(np.clip(-linear / (2 * square), x.min() - np.ptp(x), x.max() + np.ptp(x)))


def _line(x: np.ndarray, y: np.ndarray, used: np.ndarray) -> tuple[float, float]:
    """Intercept and slope; nan with fewer than two points."""
    if used.sum() < 2:
        return float("nan"), float("nan")
    intercept, slope = Polynomial.fit(x[used], y[used], 1).convert().coef
    return float(intercept), float(slope)


def _budgets(points: Sequence[Trained]) -> list[list[Trained]]:
    """The runs of each budget, by rising FLOPs."""
    budgets: list[list[Trained]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if budgets and point.flops < SAME_BUDGET * budgets[-1][0].flops:
            budgets[-1].append(point)
        else:
            budgets.append([point])
    return budgets


def fit_sigmoid(
    compute: Sequence[float], values: Sequence[float], errors: Sequence[float], seed: int = 0
) -> Sigmoid:
    """The curve of `sigmoid` through values with standard errors; the first, at compute 0, is its start.

    Intervals are by fitting again to values drawn with these errors or, where they are all 0, with what the
    curve leaves. An asymptote is known only where the curve has bent: else its interval is wide. Raises
    ConfigError for fewer than five values.
    """
    from scipy.optimize import curve_fit

    x, y, sd = (np.asarray(each, np.float64) for each in (compute, values, errors))
    if len(x) < 5:
        raise ConfigError(f"{len(x)} evaluations are too few to fit a sigmoid: 5 are needed")
    x, initial, y, sd = x[1:], y[0], y[1:], sd[1:] if sd[1:].all() else np.ones(len(x) - 1)

    def fit(y: np.ndarray, start: Any) -> np.ndarray:
        """asymptote, log midpoint, log exponent"""

        def curve(x: np.ndarray, asymptote: float, midpoint: float, exponent: float) -> np.ndarray:
            return sigmoid(x, initial, asymptote, np.exp(midpoint), np.exp(exponent))

        span = np.ptp(y) + abs(y.max() - initial)
        low = [min(initial, y.min()) - 10 * span, np.log(x.min()) - 5, np.log(0.1)]
        high = [max(initial, y.max()) + 10 * span, np.log(x.max()) + 5, np.log(20.0)]
        inside = np.clip(start, np.array(low) + 1e-9, np.array(high) - 1e-9)
        return curve_fit(curve, x, y, inside, sd, bounds=(low, high), max_nfev=20_000)[0]

    found = fit(y, [y.max(), np.log(np.median(x)), 0.0])
    if not np.any(errors):
        left = y - sigmoid(x, initial, found[0], *np.exp(found[1:]))
        sd = np.full(len(y), np.sqrt((left**2).sum() / (len(y) - 3)))
    random = np.random.default_rng(seed)
    drawn = np.array([fit(random.normal(y, sd), found) for _ in range(RESAMPLES // 5)])
    asymptote, midpoint, exponent = (
        Interval(float(change(found[i])), *(float(change(edge)) for edge in _middle(drawn[:, i])))
        for i, change in enumerate((float, np.exp, np.exp))
    )
    return Sigmoid(float(initial), asymptote, midpoint, exponent)


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    """The bounds of the middle 95%; nan where nothing was drawn."""
    if not np.isfinite(drawn).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def hours(run: Run, metric: str) -> tuple[list[float], list[float], list[float]]:
    """Device hours of training and rollouts before each evaluation of a metric, its values and errors."""
    devices = run.last_start.get("devices", {}).get("count", 1)
    x, y, sd, total, before = [], [], [], 0.0, 0
    errors = {point.step: point.error or 0.0 for point in run.points(metric)}
    for row in run.rows:
        step_time = row.get("perf/step_time") or 0.0
        total += step_time * (row["step"] - before)
        before = row["step"]
        if row["step"] in errors:
            x.append(total * devices / 3600)
            y.append(row[metric])
            sd.append(errors[row["step"]])
    return x, y, sd
