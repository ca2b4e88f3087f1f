"""The sections of the report on one run or one pipeline."""

import itertools
import json
import shlex
from collections.abc import Sequence
from typing import Any

from jaxllm.config import differences
from jaxllm.report.curves import compared_curves, curve_title, stage_gallery
from jaxllm.report.document import (
    Block,
    Card,
    Code,
    Completion,
    Heading,
    Paragraph,
    Report,
    Table,
    duration,
    number,
    size,
    with_error,
)
from jaxllm.report.runs import Pipeline, Point, Run, objects
from jaxllm.runs.panels import Panel

SHOWN_COMPLETIONS = 4  # of a run that generates at evaluation
COMMAND_WIDTH = 92  # characters per line
CURVES_EXPLAINED = (
    "Lines with markers are measured on held-out rows, with a band of ± one standard error; lines without "
    "markers are measured during training."
)
COST_EXPLAINED = (
    "FLOPs are those of the training updates, by formula: 6 per token for each parameter in a matrix "
    "product, plus attention. Generation, scoring and evaluation are not counted. Time is that of the whole "
    "process where a pipeline measured it, otherwise the sum of the step times without evaluation and saving."
)


def run_report(run: Run) -> Report:
    """The report on one run."""
    blocks = [
        *problems(run.problems),
        Heading(2, "Curves"),
        Paragraph(CURVES_EXPLAINED, "note"),
        stage_gallery(run, "curve"),
        *metric_table(run),
        *before_and_after(run),
        Heading(2, "Cost"),
        *cost([run], None, None),
        Heading(2, "Lineage"),
        *lineage([run]),
        Heading(2, "Command"),
        Code("", wrap_command(run.command or "unknown")),
    ]
    return Report(run.name, None, [run.stage, *facts(run)], blocks)


def pipeline_report(pipeline: Pipeline) -> Report:
    """The report on all stages: completions of every model, gates, curves, cost, lineage and commands."""
    blocks: list[Block] = [*problems(pipeline.problems)]
    if cards := completion_cards(pipeline.shown):
        blocks += [Heading(2, "Completions of every model"), *cards]
    if pipeline.gates:
        blocks += [Heading(2, "Gates"), gate_table(pipeline.gates)]
    blocks += [Heading(2, "Curves"), Paragraph(CURVES_EXPLAINED, "note")]
    for run in pipeline.stages:
        gallery = stage_gallery(run, f"curve-{len(blocks)}")
        blocks += [Heading(3, stage_title(run)), gallery, *metric_table(run)]
    record = pipeline.record
    seconds, memory = record.get("seconds"), record.get("peak_memory_bytes")
    blocks += [Heading(2, "Cost"), *cost(pipeline.stages, seconds, memory, other_costs(pipeline))]
    blocks += [Heading(2, "Lineage"), *lineage(pipeline.stages)]
    blocks += [Heading(2, "Commands"), *commands(pipeline)]
    known = [f"seed {number(record['seed'])}"] if "seed" in record else []
    known += [duration(record["seconds"])] if "seconds" in record else []
    last = facts(pipeline.stages[-1]) if pipeline.stages else []
    known += [fact for fact in last if not fact.startswith(("seed", "step"))]
    return Report(pipeline.name, verdict(pipeline.gates), known, blocks)


def problems(found: Sequence[str]) -> list[Block]:
    """What is missing, at the top of the report."""
    return [Paragraph(f"Incomplete: {'; '.join(found)}.", "bad")] if found else []


def facts(run: Run) -> list[str]:
    """The line below the title: seed, steps, size, devices, revision and date."""
    start, step = run.last_start, run.rows[-1]["step"] if run.rows else 0
    devices = start.get("devices") or {}
    parameters = run.parameters
    return [
        *([f"seed {run.config['seed']}"] if "seed" in run.config else []),
        f"step {step:,} of {number(run.config.get('training', {}).get('steps'))}",
        *([f"{parameters:,} parameters"] if parameters else []),
        *([f"{devices.get('count')} × {devices.get('kind')}"] if devices else []),
        *([f"revision {str(start['git'])[:10]}"] if start.get("git") else []),
        *([str(start["time"])[:10]] if start.get("time") else []),
    ]


def stage_title(run: Run) -> str:
    """The name, with the stage where it has another name."""
    return run.name if run.name == run.stage else f"{run.name} ({run.stage})"


# Completions


def completion_cards(shown: dict[str, Any]) -> list[Card]:
    """A card for each prompt of shown.json, with a row for each model that completed it."""
    prompts = shown.get("prompts")
    cards = []
    for i, prompt in enumerate(prompts if isinstance(prompts, list) else []):
        completions = [
            Completion(number(model.get("name")), str(model.get("kind", "")), str(model["texts"][i]))
            for model in objects(shown.get("answers"))
            if isinstance(model.get("texts"), list) and i < len(model["texts"])
        ]
        cards.append(Card(str(prompt), completions))
    return cards


def before_and_after(run: Run) -> list[Block]:
    """The first completions of the first and of the last evaluation, where their prompts are the same."""
    files = sorted(
        (path for path in run.folder.glob("evals/*.jsonl") if path.stem.isdecimal()),
        key=lambda path: int(path.stem),
    )
    if len(files) < 2:
        return []
    found = [evaluated_rows(path.read_text()) for path in (files[0], files[-1])]
    cards = []
    for rows in zip(*found, strict=False):
        if rows[0].get("prompt") == rows[1].get("prompt"):
            completions = [
                Completion(
                    f"step {path.stem}", f"reward {number(row.get('reward'))}", str(row.get("completion"))
                )
                for path, row in zip((files[0], files[-1]), rows, strict=True)
            ]
            cards.append(Card(str(rows[0].get("prompt")), completions))
    note = "Completions of the first held-out prompts, not selected by reward."
    heading = Heading(2, "Completions before and after training")
    return [heading, Paragraph(note, "note"), *cards] if cards else []


def evaluated_rows(text: str) -> list[dict[str, Any]]:
    """The first rows of an evals/STEP.jsonl, up to an incomplete line."""
    rows = []
    for line in text.splitlines()[:SHOWN_COMPLETIONS]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return objects(rows)


# Results


def verdict(gates: list[dict[str, Any]] | None) -> Paragraph:
    """How many gates were passed, and what was measured at those that failed."""
    if not gates:
        return Paragraph("The gates have not been measured yet.", "note")
    failed = [gate for gate in gates if gate.get("passed") is False]
    unmeasured = sum(gate.get("passed") is None for gate in gates)
    also = f" {unmeasured} could not be measured." if unmeasured else ""
    if failed:
        details = "; ".join(f"{gate.get('name')}: {gate.get('says', 'failed')}" for gate in failed)
        return Paragraph(f"{len(failed)} of {len(gates)} gates failed. {details}.{also}", "bad")
    passed = len(gates) - unmeasured
    return Paragraph(f"{passed} of {len(gates)} gates passed.{also}", "note" if unmeasured else "good")


def gate_result(gate: dict[str, Any]) -> str:
    """passed, failed or not measured"""
    results: dict[object, str] = {True: "passed", False: "failed"}
    return results.get(gate.get("passed"), "not measured")


def gate_table(gates: list[dict[str, Any]]) -> Table:
    """Each gate with what was measured, ± one standard error."""
    rows = [
        (
            number(gate.get("name")),
            gate_result(gate),
            with_error(gate.get("measured"), gate.get("standard_error")),
            number(gate.get("needed")),
            number(gate.get("claim")),
            number(gate.get("says")),
        )
        for gate in gates
    ]
    return Table(("gate", "result", "measured", "threshold", "criterion", "details"), rows)


def metric_table(run: Run) -> list[Block]:
    """The held-out metrics of a run at its first and last evaluation, and the best of all."""
    rows = []
    for panel in run.panels:
        for curve in compared_curves(panel):
            if points := run.points(curve.metric):
                first, last = (with_error(point.value, point.error) for point in (points[0], points[-1]))
                names = (curve_title(panel, curve), panel.unit, curve.metric)
                rows.append((*names, first, last, best_cell(points, panel)))
    header = ("metric", "unit", "logged as", "first", "last", "best")
    return [Table(header, rows, "Metrics, ± one standard error", folded=True)] if rows else []


def best_cell(points: Sequence[Point], panel: Panel) -> str:
    """The lowest or the highest value with its step; a dash where neither is better."""
    if panel.best is None:
        return "–"
    best = (min if panel.best == "lowest" else max)(points, key=lambda point: point.value)
    return f"{with_error(best.value, best.error)} (step {best.step})"


# Cost

ProcessCost = tuple[str, object, object]  # name, seconds, bytes of memory


def other_costs(pipeline: Pipeline) -> list[ProcessCost]:
    """The cost of what a pipeline did besides its runs, such as measuring the gates."""
    names = {run.name for run in pipeline.stages}
    return [
        (str(entry.get("name")), entry.get("seconds"), entry.get("peak_memory_bytes"))
        for entry in pipeline.entries
        if entry.get("name") not in names
    ]


def cost(
    runs: Sequence[Run], seconds: object, memory: object, others: Sequence[ProcessCost] = ()
) -> list[Block]:
    """Steps, tokens, FLOPs, time and memory of each run, with totals. `seconds` and `memory` are the totals
    that a pipeline measured; where they are None, they are computed from the runs."""
    rows = [
        (
            run.name,
            number(run.rows[-1]["step"] if run.rows else None),
            number(run.parameters),
            number(run.tokens),
            scientific(run.flops),
            duration(run.seconds),
            size(run.peak_memory),
        )
        for run in runs
    ]
    rows += [(name, "–", "–", "–", "–", duration(took), size(peak)) for name, took, peak in others]
    if len(rows) > 1:
        took = seconds if seconds is not None else total([run.seconds for run in runs])
        peak = memory if memory is not None else max((run.peak_memory or 0 for run in runs), default=0)
        tokens, flops = total([run.tokens for run in runs]), total([run.flops for run in runs])
        rows.append(
            ("total", "–", "–", number(tokens), scientific(flops), duration(took), size(peak or None))
        )
    header = ("run", "steps", "parameters", "tokens", "FLOPs", "time", "memory")
    return [Table(header, rows), Paragraph(COST_EXPLAINED, "note")]


def total(values: Sequence[float | None]) -> float | None:
    """Their sum; None where one is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def scientific(value: float | None) -> str:
    """1.23e+15"""
    return "–" if value is None else f"{value:.2e}"


# Lineage and commands


def lineage(runs: Sequence[Run]) -> list[Block]:
    """The parent checkpoint, data and code of each run, and how its config differs from its parent's."""
    rows = [
        (
            run.name,
            number(run.record.get("id")),
            *parent_of(run),
            short_hash((run.record.get("fingerprints") or {}).get("data")),
            short_hash((run.record.get("fingerprints") or {}).get("tokenizer")),
            number(run.config.get("seed")),
            short_hash(run.last_start.get("git")),
        )
        for run in runs
    ]
    header = "run", "id", "initialized from", "parent hash", "data hash", "tokenizer hash", "seed", "revision"
    found: list[Block] = [Table(header, rows)]
    versions = {
        ", ".join(f"{name} {version}" for name, version in run.last_start["versions"].items())
        for run in runs
        if isinstance(run.last_start.get("versions"), dict)
    }
    found += [Paragraph(f"Versions: {text}", "note") for text in sorted(versions)]
    for run, parent in itertools.product(runs, runs):
        if parent.name == run.entry.get("parent"):
            changed = config_differences(parent.config, run.config)
            title = f"{run.name}: settings that differ from {parent.name} ({len(changed)})"
            found.append(Table(("setting", parent.name, run.name), changed, title, folded=True))
    return found


def parent_of(run: Run) -> tuple[str, str]:
    """The checkpoint that a run was initialized from, and its hash."""
    parent = run.record.get("parent")
    if not isinstance(parent, dict):
        return "random weights", "–"
    parts = str(parent.get("path")).split("/")  # .../RUN/checkpoints/STEP
    shown = f"{parts[-3]}, step {parts[-1]}" if parts[-2:-1] == ["checkpoints"] else parts[-1]
    return shown, short_hash(parent.get("hash"))


def short_hash(digest: object) -> str:
    """The first 12 digits, and the `-dirty` of a git revision with uncommitted changes."""
    text = number(digest)
    return text[:12] + ("-dirty" if text.endswith("-dirty") else "")


def config_differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each field that differs, with both values; also fields of sections that only one config has."""
    changed = differences(flatten(before), flatten(after))
    return [(path, config_cell(old), config_cell(new)) for path, old, new in changed]


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted name."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= {f"{name}.{path}": inner for path, inner in flatten(value).items()}
        else:
            values[name] = value
    return values


def config_cell(value: object) -> str:
    """A config value as the text of a table cell."""
    return "–" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def commands(pipeline: Pipeline) -> list[Block]:
    """The command of the pipeline and those of its stages."""
    whole = pipeline.record.get("command")
    entries = [(str(entry.get("name")), entry.get("command")) for entry in pipeline.entries]
    listed = {name for name, _ in entries}
    entries += [(run.name, run.command) for run in pipeline.stages if run.name not in listed]
    blocks = [Code("whole pipeline", wrap_command(str(whole)))] if whole else []
    return [*blocks, *(Code(name, wrap_command(str(command))) for name, command in entries if command)]


def wrap_command(command: str) -> str:
    """The command broken into lines, with the same meaning to a shell."""
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:  # an unclosed quote
        return command
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > COMMAND_WIDTH and lines[-1]:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)
