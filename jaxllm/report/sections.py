"""What the report of a run, or of a pipeline, is made of."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from jaxllm.report.curves import curve_title, overlaid, panels, stage_gallery
from jaxllm.report.document import (
    Answer,
    Block,
    Card,
    Code,
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
from jaxllm.config import differences

SHOWN_ANSWERS = 4  # of a run that learns by answering
COMMAND_WIDTH = 92  # characters of a line
CURVES_EXPLAINED = (
    "Thin grey lines are measured while training, on what is trained on; points are measured on held-out "
    "rows, with a band of one standard error."
)
FLOPS_EXPLAINED = (
    "FLOPs are those of the updates, by formula: 6 for each parameter in a matrix product and token, and "
    "what attention takes. Sampling, scoring and evaluation come on top, and are part of the time."
)


def run_report(run: Run) -> Report:
    """The report of one run."""
    blocks = [
        *problems(run.problems),
        Heading(2, "Curves"),
        Paragraph(CURVES_EXPLAINED, "note"),
        stage_gallery(run, "curve"),
        *figures(run),
        *before_and_after(run),
        Heading(2, "Cost"),
        *cost([run], None, None),
        Heading(2, "Lineage"),
        *lineage([run]),
        Heading(2, "Command"),
        Code("", typed(run.command or "unknown")),
    ]
    return Report(run.name, None, [run.stage, *facts(run)], blocks)


def pipeline_report(pipeline: Pipeline) -> Report:
    """The report of all stages: what the models say, whether the gates were passed, how it went."""
    blocks: list[Block] = [*problems(pipeline.problems)]
    if cards := answer_cards(pipeline.shown):
        blocks += [Heading(2, "The same prompts, put to every model"), *cards]
    if pipeline.gates:
        blocks += [Heading(2, "Gates"), gate_table(pipeline.gates)]
    blocks += [Heading(2, "Curves"), Paragraph(CURVES_EXPLAINED, "note")]
    for run in pipeline.stages:
        gallery = stage_gallery(run, f"curve-{len(blocks)}")
        blocks += [Heading(3, stage_title(run)), gallery, *figures(run)]
    blocks += [Heading(2, "Cost")]
    total = pipeline.facts
    blocks += cost(pipeline.stages, total.get("seconds"), total.get("peak_memory_bytes"), unlisted(pipeline))
    blocks += [Heading(2, "Lineage"), *lineage(pipeline.stages)]
    blocks += [Heading(2, "Commands"), *commands(pipeline)]
    known = [f"seed {number(total['seed'])}"] if "seed" in total else []
    known += [duration(total["seconds"])] if "seconds" in total else []
    about = facts(pipeline.stages[-1]) if pipeline.stages else []
    known += [fact for fact in about if not fact.startswith(("seed", "step"))]
    return Report(pipeline.name, verdict(pipeline.gates), known, blocks)


def problems(found: Sequence[str]) -> list[Block]:
    """What is missing, first of all."""
    return [Paragraph(f"Not complete: {'; '.join(found)}.", "bad")] if found else []


def facts(run: Run) -> list[str]:
    """A run in a few words."""
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
    """The name, with the stage where that is another word."""
    return run.name if run.name == run.stage else f"{run.name} ({run.stage})"


# What it says


def answer_cards(shown: dict[str, Any]) -> list[Card]:
    """A card for each prompt, with a row for each model that has an answer."""
    prompts = shown.get("prompts")
    cards = []
    for i, prompt in enumerate(prompts if isinstance(prompts, list) else []):
        answers = [
            Answer(number(model.get("name")), str(model.get("kind", "")), str(model["texts"][i]))
            for model in objects(shown.get("answers"))
            if isinstance(model.get("texts"), list) and i < len(model["texts"])
        ]
        cards.append(Card(str(prompt), answers))
    return cards


def before_and_after(run: Run) -> list[Block]:
    """The first answers of the first and of the last evaluation, where their prompts are the same."""
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
            answers = [
                Answer(f"step {path.stem}", f"reward {number(row.get('reward'))}", str(row.get("completion")))
                for path, row in zip((files[0], files[-1]), rows, strict=True)
            ]
            cards.append(Card(str(rows[0].get("prompt")), answers))
    note = "The first held-out prompts, not chosen by how they were answered."
    return [Heading(2, "Before and after"), Paragraph(note, "note"), *cards] if cards else []


def evaluated_rows(text: str) -> list[dict[str, Any]]:
    """The first rows of an evals/STEP.jsonl; a line cut short ends them."""
    rows = []
    for line in text.splitlines()[:SHOWN_ANSWERS]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return objects(rows)


# How it came out


def verdict(gates: list[dict[str, Any]] | None) -> Paragraph:
    """Whether the gates were passed, and what was measured at those that were not."""
    if not gates:
        return Paragraph("The gates have not been measured yet.", "note")
    failed = [gate for gate in gates if gate.get("passed") is False]
    unmeasured = sum(gate.get("passed") is None for gate in gates)
    also = f" {unmeasured} could not be measured." if unmeasured else ""
    if failed:
        said = "; ".join(f"{gate.get('name')}: {gate.get('says', 'failed')}" for gate in failed)
        return Paragraph(f"{len(failed)} of {len(gates)} gates failed. {said}.{also}", "bad")
    passed = len(gates) - unmeasured
    return Paragraph(f"{passed} of {len(gates)} gates passed.{also}", "note" if unmeasured else "good")


def gate_word(gate: dict[str, Any]) -> str:
    return {True: "passed", False: "failed"}.get(gate.get("passed"), "not measured")


def gate_table(gates: list[dict[str, Any]]) -> Table:
    """Each claim with what was found, ± one standard error."""
    rows = [
        (
            number(gate.get("name")),
            gate_word(gate),
            with_error(gate.get("measured"), gate.get("standard_error")),
            number(gate.get("needed")),
            number(gate.get("claim")),
            number(gate.get("says")),
        )
        for gate in gates
    ]
    with_baseline = any("baseline" in gate for gate in gates)
    if with_baseline:
        baselines = [with_error(gate.get("baseline"), gate.get("baseline_error")) for gate in gates]
        rows = [(*row[:4], baseline, *row[4:]) for row, baseline in zip(rows, baselines, strict=True)]
    columns = ("gate", "", "measured", "needed", *(("baseline",) if with_baseline else ()), "claim", "found")
    return Table(columns, rows)


def figures(run: Run) -> list[Block]:
    """The held-out figures of a run at its first and last evaluation, and the best between."""
    rows = []
    for panel in panels(run.stage):
        for curve in overlaid(panel):
            if points := run.points(curve.metric):
                unit = f"{curve_title(panel, curve)}, {panel.unit}" if panel.unit else panel.title
                best = best_point(points, panel.best)
                shown = f"{written(best)} (step {best.step})" if best else "–"
                rows.append((unit, curve.metric, written(points[0]), written(points[-1]), shown))
    columns = ("figure", "metric", "first", "last", "best")
    return [Table(columns, rows, "Figures, ± one standard error", folded=True)] if rows else []


def written(point: Point) -> str:
    return with_error(point.value, point.error)


def best_point(points: Sequence[Point], best: str | None) -> Point | None:
    """The lowest or the highest; None where neither is better."""
    if best is None:
        return None
    return (min if best == "lowest" else max)(points, key=lambda point: point.value)


# What it took


def unlisted(pipeline: Pipeline) -> list[tuple[str, Any, Any]]:
    """Name, seconds and memory of what a pipeline did besides its runs."""
    names = {run.name for run in pipeline.stages}
    return [
        (str(entry.get("name")), entry.get("seconds"), entry.get("peak_memory_bytes"))
        for entry in objects(pipeline.facts.get("stages"))
        if entry.get("name") not in names
    ]


def cost(
    runs: Sequence[Run], seconds: Any, memory: Any, others: Sequence[tuple[str, Any, Any]] = ()
) -> list[Block]:
    """Steps, tokens, FLOPs, time and memory; totals are those given, or added up where every run has one."""
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
    rows += [(name, "–", "–", "–", "–", duration(took), size(most)) for name, took, most in others]
    if len(rows) > 1:
        took = seconds if seconds is not None else total([run.seconds for run in runs])
        most = memory if memory is not None else max((run.peak_memory or 0 for run in runs), default=0)
        tokens, flops = total([run.tokens for run in runs]), total([run.flops for run in runs])
        counted = ("–", "–", number(tokens), scientific(flops), duration(took), size(most or None))
        rows.append(("in all", *counted))
    of_steps = "" if seconds is not None else " Time is that of the steps, evaluation and saving left out."
    columns = ("", "steps", "parameters", "tokens", "FLOPs", "time", "memory")
    return [Table(columns, rows), Paragraph(FLOPS_EXPLAINED + of_steps, "note")]


def total(values: Sequence[float | None]) -> float | None:
    """Their sum; None where one is unknown."""
    return None if None in values else sum(values)


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


# Where it comes from


def lineage(runs: Sequence[Run]) -> list[Block]:
    """Which run begins with whose weights, on what data, by which code; and what changed in the config."""
    names = {run.name: run for run in runs}
    rows = [
        (
            run.name,
            number(run.record.get("id")),
            *parent_of(run),
            short((run.record.get("fingerprints") or {}).get("data")),
            short((run.record.get("fingerprints") or {}).get("tokenizer")),
            number(run.config.get("seed")),
            short(run.last_start.get("git")),
        )
        for run in runs
    ]
    columns = ("", "run", "begins with", "its hash", "data", "tokenizer", "seed", "revision")
    found: list[Block] = [Table(columns, rows)]
    versions = {
        ", ".join(f"{name} {version}" for name, version in run.last_start["versions"].items())
        for run in runs
        if isinstance(run.last_start.get("versions"), dict)
    }
    found += [Paragraph(f"Versions: {text}", "note") for text in sorted(versions)]
    for run in runs:
        parent = names.get(run.entry.get("parent"))
        if parent is not None:
            changed = config_differences(parent.config, run.config)
            title = f"{run.name}: {len(changed)} settings that {parent.name} has otherwise"
            found.append(Table(("setting", parent.name, run.name), changed, title, folded=True))
    return found


def parent_of(run: Run) -> tuple[str, str]:
    """The checkpoint whose weights a run began with, and its hash."""
    parent = run.record.get("parent")
    if not isinstance(parent, dict):
        return "random weights", "–"
    parts = str(parent.get("path")).split("/")  # .../RUN/checkpoints/STEP
    shown = f"{parts[-3]}, step {parts[-1]}" if parts[-2:-1] == ["checkpoints"] else parts[-1]
    return shown, short(parent.get("hash"))


def short(digest: Any) -> str:
    """Enough of a hash to tell it from others; `-dirty` stays."""
    text = number(digest)
    return text[:12] + ("-dirty" if text.endswith("-dirty") else "")


def config_differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Setting by setting, also of sections that one of them lacks."""
    changed = differences(dict(settings(before)), dict(settings(after)))
    return [(path, setting(old), setting(new)) for path, old, new in changed]


def settings(config: Any, path: str = "") -> list[tuple[str, Any]]:
    """A config's values by dotted name."""
    if not isinstance(config, dict):
        return [(path, config)]
    return [
        each for name in config for each in settings(config[name], f"{path}.{name}" if path else str(name))
    ]


def setting(value: Any) -> str:
    """A value of a config as a cell."""
    return "–" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def commands(pipeline: Pipeline) -> list[Block]:
    """The pipeline's, and those of its stages."""
    whole = pipeline.facts.get("command")
    entries = [(str(each.get("name")), each.get("command")) for each in objects(pipeline.facts.get("stages"))]
    listed = {name for name, _ in entries}
    entries += [(run.name, run.command) for run in pipeline.stages if run.name not in listed]
    blocks = [Code("everything", typed(str(whole)))] if whole else []
    return [*blocks, *(Code(name, typed(str(command))) for name, command in entries if command)]


def typed(command: str) -> str:
    """The command over as many lines as it takes, for a shell the same."""
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:  # a quote without its end
        return command
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > COMMAND_WIDTH and lines[-1]:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)
