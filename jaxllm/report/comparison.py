"""Several runs, or pipelines, beside each other: what was set otherwise, and whether it mattered."""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.report.curves import Curve, Panel, comparison_gallery, curve_title, overlaid, panels
from jaxllm.report.document import Block, Code, Heading, Paragraph, Report, Table, number, with_error
from jaxllm.report.estimates import Estimate, difference, over_seeds
from jaxllm.report.runs import Pipeline, Run
from jaxllm.report.sections import (
    best_point,
    cost,
    gate_word,
    lineage,
    problems,
    setting,
    settings,
    typed,
    written,
)

INTERVALS_EXPLAINED = (
    "Two figures differ where 0 is outside the 95% interval of their difference. For single runs that is "
    "± 1.96 standard errors, which know how few held-out rows there were, and nothing of another seed. Where "
    "one side has several seeds, its error is that of their mean, and Student's t (Welch) widens the "
    "interval for how few they are. Of many figures that are the same, one in twenty seems to differ."
)
BEST_EXPLAINED = "The best of several evaluations flatters the run: compare the last."
SEEDS_EXPLAINED = (
    "Runs whose configs differ in the seed only: their mean, ± its standard error, and their spread."
)


class Measure(NamedTuple):
    """A figure on held-out rows, with a standard error."""

    panel: Panel
    curve: Curve

    @property
    def title(self) -> str:
        return curve_title(self.panel, self.curve)


def comparison_report(found: Sequence[Run | Pipeline]) -> Report:
    """The report on several runs: a section for each stage that they are of."""
    pipelines = [each for each in found if isinstance(each, Pipeline)]
    runs = list(all_runs(found))
    stages = list(dict.fromkeys(stage for stage, _ in runs))
    blocks: list[Block] = [
        *problems([f"{each.name}: {problem}" for each in found for problem in each.problems])
    ]
    if pipelines:
        blocks += [Heading(2, "Gates"), gate_comparison(pipelines)]
    for stage in stages:
        blocks += stage_comparison(stage, [run for name, run in runs if name == stage])
    blocks += [Heading(2, "How differences are judged"), Paragraph(INTERVALS_EXPLAINED)]
    every = [run for _, run in runs]
    blocks += [Heading(2, "Cost"), *cost(every, None, None), Heading(2, "Lineage"), *lineage(every)]
    blocks += [Heading(2, "Commands"), *(Code(run.name, typed(run.command or "unknown")) for run in every)]
    return Report(f"{len(found)} runs compared", None, [each.name for each in found], blocks)


def all_runs(found: Sequence[Run | Pipeline]) -> Iterator[tuple[str, Run]]:
    """Every run with what it is compared as: its stage, or its name in a pipeline."""
    for each in found:
        if isinstance(each, Run):
            yield each.stage, each
        else:
            for run in each.stages:
                yield run.name, in_pipeline(run, each)


def in_pipeline(run: Run, pipeline: Pipeline) -> Run:
    """The run under its full name, paths in its config told from the pipeline's folder: such as differ only
    in where the pipeline is are the same."""
    inside = f"{pipeline.folder.name}/"
    text = {
        path: value.rpartition(inside)[2] if isinstance(value, str) and inside in value else value
        for path, value in settings(run.config)
    }
    return Run(run.folder, f"{pipeline.name}/{run.name}", nested(text), run.record, run.rows, run.entry)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The config with these values by dotted name."""
    config: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        section = config
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return config


def gate_comparison(pipelines: Sequence[Pipeline]) -> Table:
    """A row for each gate, a column for each pipeline."""
    gates = [{str(gate.get("name")): gate for gate in each.gates or []} for each in pipelines]
    names = dict.fromkeys(name for each in gates for name in each)
    rows = [(name, *(gate_cell(each.get(name)) for each in gates)) for name in names]
    return Table(("gate", *(each.name for each in pipelines)), rows)


def gate_cell(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return "–"
    return f"{gate_word(gate)}: {with_error(gate.get('measured'), gate.get('standard_error'))}"


def stage_comparison(stage: str, runs: Sequence[Run]) -> list[Block]:
    """Settings, curves and figures of the runs of one stage, and which of these differ."""
    groups = by_seed(runs)
    measures = [
        Measure(panel, curve)
        for panel in panels(runs[0].stage)
        for curve in overlaid(panel)
        if any(estimate(run, curve) for run in runs)
    ]
    blocks: list[Block] = [Heading(2, stage)]
    if len(runs) > 1:
        blocks += [different_settings(runs)]
    blocks += [
        comparison_gallery(groups if len(groups) > 1 else [[run] for run in runs], runs[0].stage, stage)
    ]
    if measures:
        blocks += [last_and_best(runs, measures), Paragraph(BEST_EXPLAINED, "note")]
    if any(len(group) > 1 for group in groups):
        blocks += [seed_table(groups, measures), Paragraph(SEEDS_EXPLAINED, "note")]
    if len(runs) > 1 and measures:
        blocks += [verdict_table(groups if len(groups) > 1 else [[run] for run in runs], measures)]
    return blocks


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose configs differ in the seed only, together. A seed that was run twice is no second seed."""
    groups: dict[tuple[str, int], list[Run]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for i, run in enumerate(runs):
        config = run.config or {"unknown": i}  # one without a config is like no other
        others = json.dumps({name: config[name] for name in config if name != "seed"}, sort_keys=True)
        seed = (others, str(config.get("seed")))
        groups.setdefault((others, repeats[seed]), []).append(run)
        repeats[seed] += 1
    return list(groups.values())


def different_settings(runs: Sequence[Run]) -> Block:
    """A row for each setting that is not the same in all runs."""
    values = [dict(settings(run.config)) for run in runs]
    names = dict.fromkeys(name for each in values for name in each)
    cells = {name: [setting(each.get(name)) for each in values] for name in names}
    rows = [(name, *cells[name]) for name in names if len(set(cells[name])) > 1]
    if not rows:
        return Paragraph("All settings are the same.", "note")
    return Table(("setting", *(run.name for run in runs)), rows, "What was set otherwise")


def estimate(run: Run, curve: Curve) -> Estimate | None:
    """The last value of a figure, if it has a standard error."""
    point = run.last(curve.metric)
    return None if point is None or point.error is None else Estimate(point.value, point.error)


def group_estimate(group: Sequence[Run], curve: Curve) -> Estimate | None:
    """Of the runs of a group that have the figure."""
    known = [found for run in group if (found := estimate(run, curve)) is not None]
    return over_seeds(known) if known else None


def group_name(group: Sequence[Run]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more seeds"


def last_and_best(runs: Sequence[Run], measures: Sequence[Measure]) -> Table:
    """The last held-out figure of each run, and its best."""
    rows = []
    for measure, run in itertools.product(measures, runs):
        if points := run.points(measure.curve.metric):
            best = best_point(points, measure.panel.best)
            shown = f"{written(best)} (step {best.step})" if best else "–"
            rows.append((measure.title, run.name, written(points[-1]), number(points[-1].step), shown))
    return Table(("figure", "run", "last", "at step", "best"), rows, "Held out, ± one standard error")


def seed_table(groups: Sequence[Sequence[Run]], measures: Sequence[Measure]) -> Table:
    """Mean and spread of each group of seeds, at the last evaluation."""
    rows = []
    for measure, group in itertools.product(measures, groups):
        values = [found.value for run in group if (found := estimate(run, measure.curve)) is not None]
        if len(values) > 1:
            mean = group_estimate(group, measure.curve)
            spread = with_error(statistics.fmean(values), statistics.stdev(values)).partition(" ± ")[2]
            low, high = number(min(values)), number(max(values))
            cells = (str(len(values)), with_error(mean.value, mean.error), spread, f"{low} to {high}")
            rows.append((measure.title, group_name(group), *cells))
    columns = ("figure", "runs", "seeds", "mean", "standard deviation", "range")
    return Table(columns, rows, "Over seeds")


def verdict_table(groups: Sequence[Sequence[Run]], measures: Sequence[Measure]) -> Table:
    """For each figure and pair, the difference with its 95% interval, and whether there is one."""
    rows = []
    for measure, (a, b) in itertools.product(measures, itertools.combinations(groups, 2)):
        before, after = group_estimate(a, measure.curve), group_estimate(b, measure.curve)
        if before is not None and after is not None:
            found = difference(before, after)
            word = "they differ" if found.is_distinguishable else "not distinguishable"
            shown = with_error(found.value, found.half_width)
            rows.append((measure.title, group_name(a), group_name(b), shown, word))
    columns = ("figure", "of", "and of", "second minus first, 95% interval", "")
    return Table(columns, rows, "Whether they differ, at the last evaluation")
