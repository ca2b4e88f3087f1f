"""Draws the curves of runs as SVG that takes its colors from the page."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.report.document import Gallery, Legend, Picture
from jaxllm.report.runs import Point, Run
from jaxllm.runs.panels import Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

COLORS = 8  # defined in style.css; further lines are told apart by dashes


class Line(NamedTuple):
    points: list[Point]
    legend: Legend
    is_held_out: bool  # measured at few steps, each of which gets a marker
    in_background: bool = False  # thin, behind the others


def stage_gallery(run: Run, name: str) -> Gallery:
    """A run's pictures: training metrics thin, held-out metrics with markers and a band of ± one standard
    error."""
    pictures = []
    for i, panel in enumerate(run.panels):
        measured = [curve for curve in panel.curves if len(run.points(curve.metric)) > 1]
        any_held_out = any(curve.is_held_out for curve in measured)
        held_out = 0
        lines = []
        for curve in measured:
            color = held_out % COLORS if curve.is_held_out or not any_held_out else COLORS - 1
            held_out += curve.is_held_out
            in_background = any_held_out and not curve.is_held_out
            legend = Legend(curve.label, color, 0)
            lines.append(Line(run.points(curve.metric), legend, curve.is_held_out, in_background))
        if lines:
            pictures.append(picture(panel.title, panel.unit, lines, f"{name}-{i}"))
    return Gallery(pictures)


def compared_curves(panel: Panel) -> tuple[Curve, ...]:
    """The curves of a panel that runs are compared by: the held-out ones, or else the first."""
    return tuple(curve for curve in panel.curves if curve.is_held_out) or panel.curves[:1]


def curve_title(panel: Panel, curve: Curve) -> str:
    """The panel's title, with the curve's label where the panel has several to compare."""
    return panel.title if len(compared_curves(panel)) == 1 else f"{panel.title}, {curve.label}"


def comparison_gallery(groups: Sequence[Sequence[Run]], name: str) -> Gallery:
    """A picture for each metric with all runs of one stage in it: a color per group, a dash per run of the
    group."""
    pictures = []
    for panel in groups[0][0].panels:
        for curve in compared_curves(panel):
            lines = []
            for i, group in enumerate(groups):
                for j, run in enumerate(group):
                    legend = Legend(run.name, i % COLORS, j + i // COLORS)
                    if points := run.points(curve.metric):
                        lines.append(Line(points, legend, curve.is_held_out))
            if any(len(line.points) > 1 for line in lines):
                title = curve_title(panel, curve)
                pictures.append(picture(title, panel.unit, lines, f"{name}-{len(pictures)}"))
    return Gallery(pictures)


# Drawing. Matplotlib gets placeholder colors, which are then replaced by the page's CSS variables.

_INK, _RULE = "#010101", "#020202"
_STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def picture(title: str, unit: str, lines: Sequence[Line], name: str) -> Picture:
    """Lines over the training steps. `name` must be unique within the page."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        axes.set_title(unit, loc="left", fontsize=9)
        axes.set_xlabel("step", loc="right")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))

    legend = [line.legend for line in lines] if len(lines) > 1 else []
    return Picture(title, to_svg(draw, name), legend)


def to_svg(draw: Callable[["Figure"], None], name: str, size: tuple[float, float] = (4.4, 2.6)) -> str:
    """What `draw` draws into a figure, in the page's style, as an <svg> element. Colors are `placeholder`s;
    `name` must be unique within the page; the size is in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(file.getvalue(), name)


def _draw(axes: "Axes", line: Line) -> None:
    steps, values = [p.step for p in line.points], [p.value for p in line.points]
    color = placeholder(line.legend.color)
    if line.in_background:
        axes.plot(steps, values, color=color, linewidth=0.9, zorder=1)
        return
    dash = _DASHES[line.legend.dash % len(_DASHES)]
    marker = "o" if line.is_held_out else None
    axes.plot(steps, values, color=color, linewidth=1.6, linestyle=dash, marker=marker, markersize=3.5)
    if any(point.error is not None for point in line.points):
        errors = [point.error or 0.0 for point in line.points]
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)


def placeholder(color: int) -> str:
    """For --series-COLOR of the page."""
    return f"#0303{color:02x}"


def _for_page(svg: str, name: str) -> str:
    """The <svg> element with the page's colors and font, with ids that are unique within the page, and
    without what only a separate file needs."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    colors = {_INK: "--muted", _RULE: "--rule"} | {placeholder(i): f"--series-{i}" for i in range(COLORS)}
    for drawn, variable in colors.items():
        svg = svg.replace(drawn, f"var({variable})")
    return svg.strip()
