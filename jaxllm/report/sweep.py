"""The report on a sweep: which config is best and how sure that is, and every trial."""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence

from jaxllm.errors import ConfigError
from jaxllm.report.document import (
    Block,
    Code,
    Gallery,
    Heading,
    Paragraph,
    Report,
    Table,
    duration,
    is_number,
    number,
    with_error,
)
from jaxllm.report.estimates import Difference, Estimate, difference, over_seeds
from jaxllm.report.sections import wrap_command
from jaxllm.report.sweep_pictures import against_each_field, parallel_coordinates
from jaxllm.sweep.groups import Group, groups
from jaxllm.sweep.overrides import Overrides
from jaxllm.sweep.record import Sweep, logged_metrics
from jaxllm.sweep.trials import short_names, short_value, shown

CONFIGS_EXPLAINED = (
    "Trials that differ only in the seed are averaged: mean ± standard error, and the 95% interval of the "
    "mean by Student's t. The interval of a single seed reflects its held-out rows alone, and not the "
    "variation between seeds. A config is different from the best where the 95% interval of their difference "
    "excludes 0, without correction for multiple comparisons. A click on a header sorts."
)
PARALLEL_EXPLAINED = (
    "A line for each config through its settings and its mean: the best thick, the best quarter in color, "
    "the others gray."
)


def sweep_report(sweep: Sweep) -> Report:
    """The report on a sweep, finished or not. ConfigError where no trial has logged its metric."""
    for trial in sweep.trials:
        sweep.observe(trial)
    found = groups(sweep)
    measured = [group for group in found if group.measured]
    if not measured:
        raise ConfigError(no_metric(sweep))
    commands = [Heading(2, "Command"), Code("", wrap_command(sweep.command))]
    blocks: list[Block] = [
        *problems(sweep),
        *best_config(sweep, measured),
        Heading(2, "Configurations"),
        config_table(sweep, found),
        Paragraph(CONFIGS_EXPLAINED, "note"),
        Heading(2, "Hyperparameters"),
        Gallery(against_each_field(sweep, found)),
        Gallery([parallel_coordinates(sweep, measured)]),
        Paragraph(PARALLEL_EXPLAINED, "note"),
        Heading(2, "Trials"),
        trial_table(sweep),
        *commands,
    ]
    counts = Counter(trial.status for trial in sweep.trials)
    facts = [sweep.config_file, *(f"{count} {status}" for status, count in counts.items())]
    facts += [f"{sweep.goal.metric}, {'highest' if sweep.goal.highest else 'lowest'} is best"]
    return Report(f"Sweep {sweep.folder.name}", None, facts, blocks)


def no_metric(sweep: Sweep) -> str:
    """What is wrong where no trial that has finished has the metric."""
    there = {name for trial in sweep.trials for name in logged_metrics(sweep.folder / trial.name, sweep.goal)}
    if not any(trial.status == "finished" for trial in sweep.trials):
        return f"{sweep.folder}: no trial has finished yet"
    names = ", ".join(sorted(there)) or "no held-out metric: set training.evaluate_every"
    return f"--metric={sweep.goal.metric}: no trial has logged it; they have {names}"


def problems(sweep: Sweep) -> list[Block]:
    """Trials without a result, at the top."""
    failed = [
        f"{each.name}: {each.message or each.status}" for each in sweep.trials if each.status == "failed"
    ]
    failed += [f"{each.name} diverged" for each in sweep.trials if each.status == "diverged"]
    left = sum(not (each.is_done or each.status == "failed") for each in sweep.trials)
    lines = [f"{left} of {len(sweep.trials)} trials have not finished"] if left else []
    return [Paragraph(f"{line}.", "bad") for line in [*lines, *failed]]


# The best config


def estimate(group: Group) -> Estimate | None:
    """The mean over its seeds; None without a standard error."""
    found = [
        Estimate(each.value, each.error or math.nan) for each in group.measured if each.value is not None
    ]
    mean = over_seeds(found) if found else None
    return None if mean is None or math.isnan(mean.error) else mean


def interval(group: Group) -> str:
    """The mean ± half its 95% interval."""
    found = estimate(group)
    if found is None:
        return f"{number(group.mean)} (no standard error)"
    return with_error(found.value, difference(Estimate(0, 0), found).half_width)


def seeds_of(group: Group) -> str:
    count = len(group.measured)
    if count > 1:
        return f"mean over {count} seeds, 95% interval"
    return "one seed; 95% interval over held-out rows, not over seeds"


def best_config(sweep: Sweep, measured: Sequence[Group]) -> list[Block]:
    """The best config, how many others may be as good, the winner's curse, and what fresh seeds say."""
    best, *others = measured
    metric = sweep.goal.metric
    like = sum(is_like(best, other) for other in others)
    text = f"{shown(best.settings) or 'the config as it is'}: {metric} {interval(best)} ({seeds_of(best)})."
    blocks: list[Block] = [Heading(2, "Best configuration"), Paragraph(text, "strong")]
    if others:
        blocks += [Paragraph(f"Not distinguishable from it: {like} of the {len(others)} other configs.")]
    if edges := at_edge(best, measured):
        text = f"Its {' and '.join(edges)} is the last value that was tried: values beyond may be better."
        blocks += [Paragraph(text)]
    if len(measured) > 1:
        curse = "This mean is biased in its favor, since it was chosen as the best of"
        blocks += [Paragraph(f"{curse} {len(measured)} means (the winner's curse). {fresh_seeds(sweep)}")]
    return blocks


def fresh_seeds(sweep: Sweep) -> str:
    """What the seeds that did not choose the best config have measured, or how to get some."""
    confirmed = [group for group in groups(sweep, confirms=True) if group.measured]
    if not confirmed:
        return "experiments/sweep.py --confirm=3 re-runs it with fresh seeds, whose mean is unbiased."
    found = [f"{shown(each.settings)}: {interval(each)} ({seeds_of(each)})" for each in confirmed]
    return f"Confirmed with fresh seeds, {'; '.join(found)}."


def at_edge(best: Group, measured: Sequence[Group]) -> list[str]:
    """The numeric fields, of three values or more, whose best value is the smallest or the largest."""
    labels, found = short_names(best.settings), []
    for field, value in best.settings.items():
        tried = {group.settings[field] for group in measured if is_number(group.settings.get(field))}
        if len(tried) > 2 and value in (min(tried), max(tried)):
            found.append(f"{labels[field]}={short_value(value)}")
    return found


def against(best: Group, other: Group) -> Difference | None:
    """`other` minus `best`."""
    before, after = estimate(best), estimate(other)
    return None if before is None or after is None else difference(before, after)


def is_like(best: Group, other: Group) -> bool:
    found = against(best, other)
    return found is not None and not found.is_distinguishable


# Tables


def fields_of(sweep: Sweep) -> dict[str, str]:
    """The fields that trials set, seeds apart, with their short names."""
    return short_names(dict.fromkeys(field for trial in sweep.trials for field in trial.settings))


def setting(settings: Overrides, field: str) -> str:
    return short_value(settings[field]) if field in settings else "–"


def config_table(sweep: Sweep, found: Sequence[Group]) -> Table:
    """A row for each config, best first."""
    fields, rows = fields_of(sweep), []
    for i, group in enumerate(found):
        mean = estimate(group) if group.measured else None
        shown_mean = (
            with_error(mean.value, mean.error) if mean else number(group.mean) if group.measured else "–"
        )
        minus = against(found[0], group) if i else None
        rows.append(
            (
                *(setting(group.settings, field) for field in fields),
                f"{len(group.measured)} of {len(group.trials)}",
                shown_mean,
                interval(group) if group.measured else "–",
                with_error(minus.value, minus.half_width) if minus else "–",
                "best" if i == 0 else "–" if minus is None else verdict(minus),
            )
        )
    header = (*fields.values(), "seeds", sweep.goal.metric, "95% interval", "minus the best", "result")
    return Table(header, rows, sortable=True)


def verdict(found: Difference) -> str:
    return "different" if found.is_distinguishable else "not distinguishable"


def trial_table(sweep: Sweep) -> Table:
    """A row for each trial."""
    fields = fields_of(sweep)
    rows = [
        (
            *(setting(trial.overrides, field) for field in fields),
            str(trial.seed),
            trial.status + (", confirms" if trial.confirms else ""),
            with_error(trial.value, trial.error),
            number(trial.step),
            duration(trial.seconds or None),  # 0 of one that waits, or that SLURM runs
            trial.name,
        )
        for trial in sweep.trials
    ]
    header = (*fields.values(), "seed", "status", sweep.goal.metric, "at step", "time", "folder")
    return Table(header, rows, sortable=True)


def to_csv(sweep: Sweep) -> str:
    """Every trial with full precision."""
    fields = list(fields_of(sweep))
    columns = ("seed", "status", "confirms", "step", "value", "error", "seconds", "name")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*fields, *(sweep.goal.metric if column == "value" else column for column in columns)])
    for trial in sweep.trials:
        cells = [trial.overrides.get(field) for field in fields]
        writer.writerow([*cells, *(getattr(trial, column) for column in columns)])
    return file.getvalue()
