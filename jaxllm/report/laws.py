"""Fitted scaling laws as text and as pictures."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.report.runs import Run
from jaxllm.report.scaling import Interval, fit_isoflops, fit_sigmoid, hours, sigmoid, trained
from jaxllm.training.metrics import held_out_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FURTHER = 10  # times the largest budget, which the law is extrapolated to


class Law(NamedTuple):
    text: str  # Markdown
    svg: bytes


def size_law(runs: Sequence[Run], metric: str) -> Law:
    """The best number of parameters for a budget, from runs of several sizes at several budgets."""
    law = fit_isoflops([trained(run, metric) for run in runs])
    rows = [
        f"| {optimum.flops:.3g} | {within(optimum.parameters)} | {optimum.loss:.3f} |"
        + ("" if optimum.in_range else " outside the sizes that were run: not used")
        for optimum in law.optima
    ]
    further = FURTHER * law.optima[-1].flops
    lines = [
        f"{len(runs)} runs, {len(law.optima)} budgets. Parameters are those in matrix products, so without "
        f"the embedding. Losses differ from the parabolas by {law.noise:.3g}.",
        "",
        f"| FLOPs | best parameters (95%) | {metric} there |",
        "|---|---|---|",
        *rows,
        "",
        f"best parameters = {law.coefficient:.3g} x FLOPs^{law.exponent.value:.3f} "
        f"(95%: {law.exponent.low:.3f} to {law.exponent.high:.3f}; Hoffmann et al. 2022 found 0.5)",
        f"extrapolated to {further:.3g} FLOPs: {within(law.best_parameters(further))}",
    ]
    figure, axes = _figure(f"{metric} at equal FLOPs", "parameters", metric)
    for optimum in law.optima:
        x, y = ([getattr(point, name) for point in optimum.points] for name in ("parameters", "loss"))
        grid = np.geomspace(min(x), max(x), 50)
        [line] = axes.plot(grid, optimum.curve(np.log(grid)), label=f"{optimum.flops:.2g} FLOPs")
        axes.plot(x, y, "o", color=line.get_color(), markersize=4)
        if optimum.in_range:
            axes.plot(optimum.parameters.value, optimum.loss, "*", color=line.get_color(), markersize=11)
    axes.set_xscale("log")
    axes.legend(frameon=False)
    return Law("\n".join(lines), _svg(figure))


def reward_law(run: Run, metric: str) -> Law:
    """A metric of one run against its compute. ConfigError where the run does not have it."""
    compute, values, errors = hours(run, metric)
    if not values:
        names = ", ".join(held_out_names(run.rows))
        raise ConfigError(f"--metric={metric}: {run.folder} has {names or 'no evaluations'}")
    law = fit_sigmoid(compute, values, errors)
    lines = [
        f"{len(values)} evaluations over {compute[-1]:.3g} device hours of training and rollouts.",
        "",
        "| | value (95%) |",
        "|---|---|",
        f"| start | {law.initial:.4g} |",
        f"| asymptote | {within(law.asymptote)} |",
        f"| device hours to half of the rise | {within(law.midpoint)} |",
        f"| exponent | {within(law.exponent)} |",
    ]
    if law.midpoint.high > compute[-1]:
        lines += ["", "The curve has hardly bent: its asymptote is not determined by this run."]
    figure, axes = _figure(f"{metric} against compute", "device hours", metric)
    axes.errorbar(compute, values, errors, fmt="o", markersize=4)
    grid = np.linspace(compute[1] / 10, 2 * compute[-1], 200)
    fitted = sigmoid(grid, law.initial, law.asymptote.value, law.midpoint.value, law.exponent.value)
    axes.plot(grid, fitted)
    axes.axhspan(law.asymptote.low, law.asymptote.high, alpha=0.15)
    return Law("\n".join(lines), _svg(figure))


def within(interval: Interval) -> str:
    """0.80 (0.78 to 0.83)"""
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def _figure(title: str, x: str, y: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
