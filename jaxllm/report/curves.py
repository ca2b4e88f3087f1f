"""Which curves tell the story of a stage, and how one is drawn: SVG that takes its colours from the page."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxllm.report.document import Gallery, Legend, Picture
from jaxllm.report.runs import Point, Run
from jaxllm.errors import ConfigError

COLOURS = 8  # that html.py defines; after them come dashes


class Curve(NamedTuple):
    label: str
    metric: str

    @property
    def is_held_out(self) -> bool:
        return self.metric.startswith("eval/")


class Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[Curve, ...]
    best: str | None = None  # "lowest", "highest", or neither


def _panel(title: str, unit: str, best: str | None, **metrics: str) -> Panel:
    """`train=` and `held_out=` name a metric each; other names, with _ for a space, are labels."""
    labels = {"train": "training", "held_out": "held out"}
    curves = [Curve(labels.get(name, name.replace("_", " ")), metric) for name, metric in metrics.items()]
    return Panel(title, unit, tuple(curves), best)


_LOSS = _panel("Loss", "nats a token", "lowest", train="train/loss", held_out="eval/loss")
_BITS = _panel("Compression", "bits per byte", "lowest", held_out="eval/bits_per_byte")
_GUESSED = _panel(
    "Next token guessed", "fraction", "highest", train="train/accuracy", held_out="eval/accuracy"
)
_ENDED = _panel("Answers that end by themselves", "fraction", "highest", held_out="eval/stopped_fraction")
_REWARD = _panel("Reward", "as paid", "highest", sampled_in_training="reward/mean", held_out="eval/reward")
_KL = _panel("Distance to the start", "KL, nats an answer", None, training="kl/reference")
_LENGTH = _panel(
    "Length", "tokens an answer", None, sampled_in_training="completion/mean_length", held_out="eval/length"
)
PANELS = {
    "pretrain": (_LOSS, _BITS, _GUESSED),
    "sft": (_LOSS, _ENDED, _GUESSED),
    "reward_model": (
        _panel(
            "Chosen answer preferred",
            "fraction of pairs",
            "highest",
            train="train/accuracy",
            held_out="eval/accuracy",
        ),
        _panel("Margin", "reward", "highest", train="train/margin", held_out="eval/margin"),
        _panel("Loss", "nats a pair", "lowest", train="train/loss", held_out="eval/loss"),
    ),
    "dpo": (
        _panel(
            "Chosen answer preferred",
            "fraction of pairs",
            "highest",
            train="rewards/accuracies",
            held_out="eval/rewards/accuracies",
        ),
        _panel(
            "Margin", "implicit reward", "highest", train="rewards/margins", held_out="eval/rewards/margins"
        ),
        _panel(
            "Answers, held out",
            "implicit reward",
            None,
            chosen="eval/rewards/chosen",
            rejected="eval/rewards/rejected",
        ),
    ),
    "ppo": (_REWARD, _KL, _LENGTH),
    "grpo": (
        _panel(
            "Pass@1, held out",
            "fraction of problems",
            "highest",
            greedy="eval/pass@1",
            sampled="eval/sampled_pass@1",
        ),
        _REWARD,
        _LENGTH,
        _KL,
    ),
}
OTHER = (_panel("Loss", "", "lowest", train="train/loss", held_out="eval/loss"),)


def panels(stage: str) -> tuple[Panel, ...]:
    """The pictures of a stage."""
    return PANELS.get(stage, OTHER)


class Line(NamedTuple):
    points: list[Point]
    legend: Legend
    is_held_out: bool  # measured now and then: with its points
    is_pale: bool = False  # thin, behind the others


def stage_gallery(run: Run, name: str) -> Gallery:
    """A run's pictures: training thin, what is held out with its points and a band of one standard error."""
    pictures = []
    for i, panel in enumerate(panels(run.stage)):
        measured = [curve for curve in panel.curves if len(run.points(curve.metric)) > 1]
        beside = any(curve.is_held_out for curve in measured)
        held_out = 0
        lines = []
        for curve in measured:
            colour = held_out % COLOURS if curve.is_held_out or not beside else COLOURS - 1
            held_out += curve.is_held_out
            pale = beside and not curve.is_held_out
            legend = Legend(curve.label, colour, 0)
            lines.append(Line(run.points(curve.metric), legend, curve.is_held_out, pale))
        if lines:
            pictures.append(picture(panel.title, panel.unit, lines, f"{name}-{i}"))
    return Gallery(pictures)


def overlaid(panel: Panel) -> tuple[Curve, ...]:
    """What of a panel is shown where runs are compared: held-out curves, or if it has none its first."""
    return tuple(curve for curve in panel.curves if curve.is_held_out) or panel.curves[:1]


def curve_title(panel: Panel, curve: Curve) -> str:
    """The panel's title, with the curve's label where the panel alone does not tell."""
    return panel.title if len(overlaid(panel)) == 1 else f"{panel.title}, {curve.label}"


def comparison_gallery(groups: Sequence[Sequence[Run]], stage: str, name: str) -> Gallery:
    """A picture for each figure with all runs in it: a colour a group, a dash a run of the group."""
    pictures = []
    for panel in panels(stage):
        for curve in overlaid(panel):
            lines = []
            for i, group in enumerate(groups):
                for j, run in enumerate(group):
                    legend = Legend(run.name, i % COLOURS, j + i // COLOURS)
                    if points := run.points(curve.metric):
                        lines.append(Line(points, legend, curve.is_held_out))
            if any(len(line.points) > 1 for line in lines):
                title = curve_title(panel, curve)
                pictures.append(picture(title, panel.unit, lines, f"{name}-{len(pictures)}"))
    return Gallery(pictures)


# Drawing. Matplotlib is given stand-ins for colours, and the page's own are put in their place.

_INK, _RULE = "#010101", "#020202"
_STYLE = {
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
    """Lines over the training steps. `name` is the picture's own within the page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError:
        raise ConfigError("a report needs an extra: pip install 'jaxllm[plot]'") from None

    import io

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        axes.set_title(unit, loc="left", fontsize=9)
        axes.set_xlabel("step", loc="right")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    legend = [line.legend for line in lines] if len(lines) > 1 else []
    return Picture(title, _for_the_page(file.getvalue(), name), legend)


def _draw(axes: object, line: Line) -> None:
    steps, values = [p.step for p in line.points], [p.value for p in line.points]
    colour = _stand_in(line.legend.colour)
    if line.is_pale:
        axes.plot(steps, values, color=colour, linewidth=0.9, zorder=1)
        return
    dash = _DASHES[line.legend.dash % len(_DASHES)]
    marker = "o" if line.is_held_out else None
    axes.plot(steps, values, color=colour, linewidth=1.6, linestyle=dash, marker=marker, markersize=3.5)
    if any(point.error is not None for point in line.points):
        errors = [point.error or 0.0 for point in line.points]
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def _stand_in(colour: int) -> str:
    return f"#0303{colour:02x}"


def _for_the_page(svg: str, name: str) -> str:
    """The <svg> element with the page's colours and font, with ids that no other picture has, and without
    what only a file of its own needs."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    colours = {_INK: "--muted", _RULE: "--rule"} | {_stand_in(i): f"--series-{i}" for i in range(COLOURS)}
    for stand_in, variable in colours.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg.strip()
