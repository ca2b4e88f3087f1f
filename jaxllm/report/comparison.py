"""The report on several runs or pipelines: the settings that differ, and whether the results differ."""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.evaluation.suites import SUITES
from jaxllm.report.curves import compared_curves, comparison_gallery, curve_title
from jaxllm.report.document import Block, Code, Heading, Paragraph, Report, Table, number, with_error
from jaxllm.report.estimates import Estimate, difference, over_seeds
from jaxllm.report.runs import Pipeline, Run
from jaxllm.report.sections import (
    best_cell,
    config_cell,
    cost,
    flatten,
    gate_result,
    lineage,
    problems,
    wrap_command,
)
from jaxllm.report.suites import suite_section
from jaxllm.runs.panels import Curve, Panel

INTERVALS_EXPLAINED = (
    "Two values are called different where the 95% interval of their difference excludes 0. Between two "
    "single runs the interval is ± 1.96 standard errors; these reflect the number of held-out rows, not the "
    "variation between seeds. Where one side has several seeds, its standard error is that of their mean, "
    "and the interval follows Student's t with Welch's degrees of freedom, which is wider for few seeds. "
    "There is no correction for multiple comparisons: of metrics that are truly equal, one in twenty appears "
    "different."
)
BEST_EXPLAINED = "The best of several evaluations is biased in the run's favor: compare the last values."
SEEDS_EXPLAINED = (
    "Runs whose configs differ only in the seed: the mean ± its standard error, the standard deviation and "
    "the range."
)


class Measure(NamedTuple):
    """A held-out metric that runs are compared by."""

    panel: Panel
    curve: Curve

    @property
    def title(self) -> str:
        return curve_title(self.panel, self.curve)


def comparison_report(found: Sequence[Run | Pipeline]) -> Report:
    """The report on several runs, with a section for each stage."""
    pipelines = [each for each in found if isinstance(each, Pipeline)]
    runs = list(all_runs(found))
    stages = list(dict.fromkeys(stage for stage, _ in runs))
    every = [run for _, run in runs]
    blocks: list[Block] = [
        *problems([f"{each.name}: {problem}" for each in found for problem in each.problems])
    ]
    if pipelines:
        blocks += [Heading(2, "Gates"), gate_comparison(pipelines)]
    for stage in stages:
        blocks += stage_comparison(stage, [run for name, run in runs if name == stage])
    blocks += [
        *suite_section(every),
        Heading(2, "How differences are tested"),
        Paragraph(INTERVALS_EXPLAINED),
    ]
    blocks += [Heading(2, "Cost"), *cost(every, None, None), Heading(2, "Lineage"), *lineage(every)]
    blocks += [
        Heading(2, "Commands"),
        *(Code(run.name, wrap_command(run.command or "unknown")) for run in every),
    ]
    return Report(f"{len(found)} runs compared", None, [each.name for each in found], blocks)


def all_runs(found: Sequence[Run | Pipeline]) -> Iterator[tuple[str, Run]]:
    """Every run with the section that it belongs to: its stage, or its name within a pipeline."""
    for each in found:
        if isinstance(each, Run):
            yield each.stage, each
        else:
            for run in each.stages:
                yield run.name, in_pipeline(run, each)


def in_pipeline(run: Run, pipeline: Pipeline) -> Run:
    """The run as PIPELINE/NAME, with the paths in its config relative to the pipeline's folder, so that they
    are the same in all pipelines."""
    inside = f"{pipeline.folder.name}/"
    values = {
        path: value.rpartition(inside)[2] if isinstance(value, str) and inside in value else value
        for path, value in flatten(run.config).items()
    }
    return Run(run.folder, f"{pipeline.name}/{run.name}", unflatten(values), run.record, run.rows, run.entry)


def unflatten(values: dict[str, Any]) -> dict[str, Any]:
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
    """passed: 0.500 ± 0.010"""
    if gate is None:
        return "–"
    return f"{gate_result(gate)}: {with_error(gate.get('measured'), gate.get('standard_error'))}"


def stage_comparison(stage: str, runs: Sequence[Run]) -> list[Block]:
    """Settings, curves and metrics of the runs of one stage, and which of them differ."""
    by_config = by_seed(runs)
    groups = by_config if len(by_config) > 1 else [[run] for run in runs]  # seeds of one config: one by one
    measures = [
        Measure(panel, curve)
        for panel in runs[0].panels
        for curve in compared_curves(panel)
        if any(estimate(run, curve) for run in runs)
    ]
    blocks: list[Block] = [Heading(2, stage)]
    if len(runs) > 1:
        blocks += [different_settings(runs)]
    blocks += [comparison_gallery(groups, stage)]
    if measures:
        blocks += [last_and_best(runs, measures), Paragraph(BEST_EXPLAINED, "note")]
    if any(len(group) > 1 for group in by_config):
        blocks += [seed_table(by_config, measures), Paragraph(SEEDS_EXPLAINED, "note")]
    if len(runs) > 1 and measures:
        blocks += [difference_table(groups, measures)]
    return blocks


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs whose configs differ only in the seed. A repeat of a seed gets a group of its own, since
    it adds no information."""
    groups: dict[tuple[str, int], list[Run]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for i, run in enumerate(runs):
        config = run.config or {"unknown": i}  # a run without a config gets its own group
        others = json.dumps({name: config[name] for name in config if name != "seed"}, sort_keys=True)
        seed = (others, str(config.get("seed")))
        groups.setdefault((others, repeats[seed]), []).append(run)
        repeats[seed] += 1
    return list(groups.values())


def different_settings(runs: Sequence[Run]) -> Block:
    """A row for each setting that is not the same in all runs."""
    values = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for each in values for name in each)
    cells = {name: [config_cell(each.get(name)) for each in values] for name in names}
    rows = [(name, *cells[name]) for name in names if len(set(cells[name])) > 1]
    if not rows:
        return Paragraph("All settings are the same.", "note")
    return Table(("setting", *(run.name for run in runs)), rows, "Settings that differ")


def estimate(run: Run, curve: Curve) -> Estimate | None:
    """The last value of a metric, where it has a standard error."""
    point = run.last(curve.metric)
    return None if point is None or point.error is None else Estimate(point.value, point.error)


def group_estimate(group: Sequence[Run], curve: Curve) -> Estimate | None:
    """The estimate over the runs of a group that have the metric."""
    known = [found for run in group if (found := estimate(run, curve)) is not None]
    return over_seeds(known) if known else None


def group_name(group: Sequence[Run]) -> str:
    """The first run's name, with the number of the other seeds."""
    others = len(group) - 1
    return f"{group[0].name} and {others} more seed{'s' if others > 1 else ''}" if others else group[0].name


def last_and_best(runs: Sequence[Run], measures: Sequence[Measure]) -> Table:
    """The last and the best value of each held-out metric of each run."""
    rows = []
    for measure, run in itertools.product(measures, runs):
        if points := run.points(measure.curve.metric):
            last, best = points[-1], best_cell(points, measure.panel)
            shown = with_error(last.value, last.error)
            rows.append((measure.title, run.name, shown, number(last.step), best))
    header = ("metric", "run", "last", "at step", "best")
    return Table(header, rows, "Held-out metrics, ± one standard error")


def seed_table(groups: Sequence[Sequence[Run]], measures: Sequence[Measure]) -> Table:
    """Mean and spread over the seeds of each group, at the last evaluation."""
    rows = []
    for measure, group in itertools.product(measures, groups):
        values = [found.value for run in group if (found := estimate(run, measure.curve)) is not None]
        mean = group_estimate(group, measure.curve)
        if len(values) > 1 and mean is not None:
            spread = with_error(statistics.fmean(values), statistics.stdev(values)).partition(" ± ")[2]
            low, high = number(min(values)), number(max(values))
            cells = (str(len(values)), with_error(mean.value, mean.error), spread, f"{low} to {high}")
            rows.append((measure.title, group_name(group), *cells))
    header = ("metric", "runs", "seeds", "mean", "standard deviation", "range")
    return Table(header, rows, "Statistics over seeds")


def difference_table(groups: Sequence[Sequence[Run]], measures: Sequence[Measure]) -> Table:
    """For each metric and pair, the difference with its 95% interval, and whether the interval excludes 0."""
    rows = []
    for measure, (a, b) in itertools.product(measures, itertools.combinations(groups, 2)):
        if measure.curve.metric.startswith(SUITES) and len(a) == len(b) == 1:
            continue  # compared question by question instead
        before, after = group_estimate(a, measure.curve), group_estimate(b, measure.curve)
        if before is not None and after is not None:
            found = difference(before, after)
            result = "different" if found.is_distinguishable else "not distinguishable"
            shown = with_error(found.value, found.half_width)
            rows.append((measure.title, group_name(a), group_name(b), shown, result))
    header = ("metric", "first", "second", "second minus first, 95% interval", "result")
    return Table(header, rows, "Differences at the last evaluation")
