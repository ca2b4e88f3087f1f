"""Pictures of a sweep: the metric against each hyperparameter, and parallel coordinates."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.report.curves import COLORS, placeholder, to_svg
from jaxllm.report.document import Legend, Picture, is_number, number
from jaxllm.sweep.groups import Group
from jaxllm.sweep.record import Sweep
from jaxllm.sweep.trials import short_names, short_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST, OTHER, GREY = 1, 0, COLORS - 1  # colors of the page
LOG_RATIO = 5  # of the largest to the smallest value, from which an axis is logarithmic

LABEL = 0.08  # height of a label, as a fraction of its axis


class Scale(NamedTuple):
    """Where the values of a field lie on an axis: by size, by its logarithm, or in a row as categories."""

    categories: list[str]  # none: numbers
    is_log: bool

    def place(self, value: Any) -> float:
        if self.categories:
            return self.categories.index(short_value(value))
        return math.log10(value) if self.is_log else float(value)


def scale_of(values: Sequence[Any]) -> Scale:
    """The scale that fits these values of a field."""
    if not all(map(is_number, values)):
        return Scale(list(dict.fromkeys(map(short_value, values))), False)
    is_log = min(values) > 0 and max(values) >= LOG_RATIO * min(values)
    return Scale([], is_log)


def against_each_field(sweep: Sweep, found: Sequence[Group]) -> list[Picture]:
    """A picture for each field: a dot for each trial, those of the best config in color."""
    fields = short_names(dict.fromkeys(field for group in found for field in group.settings))
    pictures = []
    for i, (field, label) in enumerate(fields.items()):
        having = [group for group in found if field in group.settings and group.measured]
        if having:
            draw = functools.partial(
                _scatter, metric=sweep.goal.metric, having=having, field=field, best=found[0]
            )
            svg = to_svg(draw, f"field-{i}")
            legend = [Legend("best config", BEST, 0), Legend("others", OTHER, 0)]
            pictures.append(Picture(label, svg, legend))
    return pictures


def _scatter(figure: "Figure", metric: str, having: Sequence[Group], field: str, best: Group) -> None:
    axes = figure.add_subplot()
    scale = scale_of([group.settings[field] for group in having])
    for group in sorted(having, key=lambda group: group is best):  # the best on top
        places = [scale.place(group.settings[field])] * len(group.values)
        color = placeholder(BEST if group is best else OTHER)
        axes.plot(places, group.values, "o", color=color, markersize=5, alpha=0.8, markeredgewidth=0)
    ticks = {scale.place(value): short_value(value) for group in having for value in [group.settings[field]]}
    if scale.categories or len(ticks) <= 4:
        axes.set_xticks(list(ticks), list(ticks.values()))
    elif scale.is_log:
        low, high = math.floor(min(ticks)), math.ceil(max(ticks))
        axes.set_xticks(range(low, high + 1), [f"{10.0**power:g}" for power in range(low, high + 1)])
    axes.set_title(metric, loc="left", fontsize=9)
    axes.margins(x=0.08)


def parallel_coordinates(sweep: Sweep, measured: Sequence[Group]) -> Picture:
    """A line for each config, best first in `measured`, through its settings and its mean."""
    fields = short_names(dict.fromkeys(field for group in measured for field in group.settings))
    width = max(4.4, 1.5 * (len(fields) + 1))
    svg = to_svg(lambda figure: _parallel(figure, fields, sweep, measured), "parallel", (width, 3.0))
    return Picture(
        "Parallel coordinates", svg, [Legend("best config", BEST, 0), Legend("best quarter", OTHER, 0)]
    )


def apart(values: dict[float, Any]) -> dict[float, Any]:
    """Those of the values by height that have room for a label; both ends have."""
    found = {}
    for height in sorted(values, key=lambda height: (0 < height < 1, height)):  # the ends first
        if all(abs(height - other) > LABEL for other in found):
            found[height] = values[height]
    return found


def _parallel(figure: "Figure", fields: dict[str, str], sweep: Sweep, measured: Sequence[Group]) -> None:
    axes = figure.add_subplot()
    axes.grid(False)
    columns = [[group.settings.get(field) for group in measured] for field in fields]
    columns.append([group.mean for group in measured])
    heights = []
    for x, values in enumerate(columns):
        scale = scale_of(values)
        places = [scale.place(value) for value in values]
        low, high = min(places), max(places)
        span = high - low or 1.0
        heights.append([(place - low) / span if high > low else 0.5 for place in places])
        axes.axvline(x, color=placeholder(GREY), linewidth=0.8, zorder=0)
        for height, value in apart(dict(zip(heights[-1], values, strict=True))).items():
            text = number(value) if x == len(fields) else short_value(value)
            axes.annotate(
                text, (x, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
    for rank in reversed(range(len(measured))):
        color = BEST if rank == 0 else OTHER if rank < len(measured) / 4 else GREY
        line = [column[rank] for column in heights]
        strong = rank == 0 or color == OTHER
        axes.plot(
            line, color=placeholder(color), linewidth=2.4 if rank == 0 else 1.2, alpha=1 if strong else 0.5
        )
    axes.set_xticks(range(len(columns)), [*fields.values(), sweep.goal.metric])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.5)
