"""Read run folders and pipeline folders, finished or not: problems are listed, everything else is read.

Only JSON is read (`config.json`, `run.json`, `metrics.jsonl`, `evals/`, `arrays.json` of a checkpoint, and a
pipeline's `pipeline.json`, `gates.json` and `shown.json`), never a log. Old folders are read under today's
names of config fields and stages.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import parse
from jaxllm.config_versions import current_name, upgrade
from jaxllm.errors import ConfigError
from jaxllm.evaluation.suites import METRICS, SUITES
from jaxllm.models.config import ModelConfig, flops_per_token
from jaxllm.report.document import is_number
from jaxllm.runs.panels import OTHER, Panel, panel
from jaxllm.runs.stage import Stage
from jaxllm.stages import find_stage
from jaxllm.training.metrics import held_out_names, read_metrics

PIPELINE_FILES = ("pipeline.json", "gates.json", "shown.json")
PIPELINE_LOCK = "lock"  # a pipeline creates it first, before it has anything to write


class Point(NamedTuple):
    """A metric at one step."""

    step: int
    value: float
    error: float | None  # standard error; None where the metric has none


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    name: str
    config: dict[str, Any]  # under today's names of the fields
    record: dict[str, Any]  # run.json
    rows: list[dict[str, Any]]  # metrics.jsonl
    entry: dict[str, Any] = field(default_factory=dict)  # of the run in pipeline.json, if a pipeline ran it
    problems: list[str] = field(default_factory=list)  # files that are missing or unreadable

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", "unknown"))

    @property
    def stage_module(self) -> Stage | None:
        """The module of its stage; None where this version has no such stage."""
        try:
            return find_stage(self.stage)
        except ConfigError:
            return None

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The pictures that the report draws."""
        return (*(self.stage_module.panels if self.stage_module else OTHER), *suite_panels(self.rows))

    @property
    def last_start(self) -> dict[str, Any]:
        """The newest of the starts (the first and each resume) that run.json records."""
        starts = objects(self.record.get("starts"))
        return starts[-1] if starts else {}

    @property
    def command(self) -> str | None:
        """The command that started it."""
        starts = objects(self.record.get("starts"))
        return self.entry.get("command") or (starts[0].get("command") if starts else None)

    def points(self, metric: str) -> list[Point]:
        """The finite values of a metric, ordered by step."""
        return [
            Point(row["step"], row[metric], error if is_number(error := row.get(f"{metric}_se")) else None)
            for row in self.rows
            if is_number(row.get(metric))
        ]

    def last(self, metric: str) -> Point | None:
        """The last finite value of a metric."""
        points = self.points(metric)
        return points[-1] if points else None

    @property
    def tokens(self) -> float | None:
        """Tokens trained on."""
        point = self.last("train/tokens")
        return point.value if point else None

    @property
    def flops(self) -> float | None:
        """Of the training updates: tokens times the FLOPs per token by `flops_per_token`."""
        stage, tokens = self.stage_module, self.tokens
        try:
            model = parse(ModelConfig, self.config["model"], "model")
            length = self.config["data"]["sequence_length"]
            generates = float(stage is None or stage.generates)
            unembedded = [generates]
            if "rollout" in self.config:  # the head is applied to completions alone
                unembedded = [self.config["rollout"]["sampling"]["max_new_tokens"] / length]
            if stage is not None and stage.policy_prefix:
                unembedded.append(0.0)  # the critic
            per_token = sum(
                flops_per_token(model, length, unembedded=each, last_block=generates) for each in unembedded
            )
        except (ConfigError, KeyError, TypeError):
            return None
        return None if tokens is None else tokens * per_token

    @property
    def parameters(self) -> int | None:
        """Number of parameters of all trained models, from the shapes in the newest checkpoint."""
        files = [
            path for path in self.folder.glob("checkpoints/*/arrays.json") if path.parent.name.isdecimal()
        ]
        if not files:
            return None
        shapes = read_object(max(files, key=lambda path: int(path.parent.name)), [])
        sizes = [
            re.search(r"\[([\d,]*)\]", str(shapes[name])) for name in shapes if name.startswith("params/")
        ]
        return sum(math.prod(int(n) for n in found[1].split(",") if n) for found in sizes if found) or None

    @property
    def seconds(self) -> float | None:
        """As the pipeline measured them, else the sum of the step times, without evaluation and saving."""
        if is_number(self.entry.get("seconds")):
            return self.entry["seconds"]
        total, before = 0.0, 0
        for row in self.rows:
            if is_number(row.get("perf/step_time")):
                total += row["perf/step_time"] * (row["step"] - before)
            before = row["step"]
        return total or None

    @property
    def peak_memory(self) -> float | None:
        """Bytes: of the process as the pipeline measured it, else of the device where it reports them."""
        if is_number(self.entry.get("peak_memory_bytes")):
            return self.entry["peak_memory_bytes"]
        point = self.last("perf/memory_peak_gb")
        return point.value * 1e9 if point else None


@dataclass(frozen=True)
class Pipeline:
    """The folder of a pipeline, with the runs of its stages."""

    folder: Path
    name: str
    record: dict[str, Any]  # pipeline.json
    entries: list[dict[str, Any]]  # of the finished stages in pipeline.json, under today's names
    gates: list[dict[str, Any]] | None  # None: not written yet
    shown: dict[str, Any]  # shown.json: prompts and what each model generated for them
    stages: list[Run]
    problems: list[str]


def suite_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """A picture for each metric of each suite that the run measured while it trained."""
    panels = []
    for metric in held_out_names(rows):
        if metric.startswith(SUITES):
            suite, _, name = metric.removeprefix(SUITES).rpartition("/")
            unit, best = METRICS.get(name, ("", None))
            panels.append(panel(f"{suite}: {name.replace('_', ' ')}", unit, best, held_out=metric))
    return panels


def current_names(entry: dict[str, Any]) -> dict[str, Any]:
    """A stage's entry in pipeline.json, under today's names of the stages."""
    names = {key: entry.get(key) for key in ("name", "parent")}
    return entry | {key: current_name(name) or name for key, name in names.items() if isinstance(name, str)}


def objects(value: object) -> list[dict[str, Any]]:
    """The objects in a JSON list; [] for any other value."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file; where it cannot be read, {} and an entry in `problems`."""
    where = f"{path.parent.name}/{path.name}"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{where} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{where} cannot be read: {error}")
    else:
        if isinstance(found, dict):
            return found
        problems.append(f"{where} is not a JSON object")
    return {}


def read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that have a step."""
    try:
        rows = [row for row in objects(read_metrics(path)) if isinstance(row.get("step"), int)]
    except (OSError, ValueError) as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be read: {error}")
        return []
    if not rows:
        problems.append(f"{path.parent.name}/{path.name} has no rows yet")
    return rows


def read_run(folder: Path, name: str, entry: dict[str, Any] | None = None) -> Run:
    """A run folder, complete or not."""
    problems: list[str] = []
    record, config = (read_object(folder / file, problems) for file in ("run.json", "config.json"))
    try:
        config = upgrade(config)
    except (TypeError, ValueError) as error:
        problems.append(f"{folder.name}/config.json cannot be read: {error}")
        config = {}
    rows = read_rows(folder / "metrics.jsonl", problems)
    return Run(folder, name, config, record, rows, entry or {}, problems)


def read_pipeline(folder: Path, name: str) -> Pipeline:
    """The folder of a pipeline, complete or not."""
    problems: list[str] = []
    record, gates, shown = (read_object(folder / file, problems) for file in PIPELINE_FILES)
    gate_list = objects(gates["gates"]) if "gates" in gates else None
    if gates and gate_list is None:
        problems.append(f"{folder.name}/gates.json has no gates")
    entries = [current_names(entry) for entry in objects(record.get("stages"))]
    stages, finished_folders = [], set()
    for i, entry in enumerate(entries, 1):
        stage = str(entry.get("name", f"stage {i}"))
        run_folder = folder / str(entry.get("workdir", stage))
        finished_folders.add(run_folder)
        if (run_folder / "run.json").exists():
            stages.append(read_run(run_folder, stage, entry))
        elif stage not in ("synthesize", "gates"):  # they train nothing
            problems.append(f"{stage}/run.json is missing")
    others = [path.parent for path in folder.glob("*/run.json") if path.parent not in finished_folders]
    unfinished = [read_run(path, current_name(path.name) or path.name) for path in others]
    problems += [f"stage {run.name} has not finished" for run in unfinished]
    stages += sorted(unfinished, key=lambda run: str(run.record.get("id")))  # ids sort by time
    problems += [problem for run in stages for problem in run.problems]
    return Pipeline(folder, name, record, entries, gate_list, shown, stages, problems)


def read_all(paths: list[Path]) -> list[Run | Pipeline]:
    """The runs and pipelines in these folders, under distinct names; ConfigError for any other folder."""
    folders = [path.expanduser().absolute() for path in paths]
    found: list[Run | Pipeline] = []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        if (folder / "run.json").exists():
            found.append(read_run(folder, name))
        elif any((folder / file).exists() for file in (*PIPELINE_FILES, PIPELINE_LOCK)):
            found.append(read_pipeline(folder, name))
        else:
            files = [file for kind in ("run", "pipeline") for file in folder.glob(f"*/{kind}.json")]
            inside = sorted({file.parent.name for file in files})
            hint = f"; it contains {', '.join(inside)}" if inside else ""
            raise ConfigError(
                f"{folder} is not a run folder: it has neither run.json nor pipeline.json{hint}"
            )
    return found


def read_trials(paths: list[Path]) -> list[Run]:
    """The runs in these folders, each a run or a folder of runs; ConfigError where there are none."""
    found: list[Path] = []
    for folder in (path.expanduser().absolute() for path in paths):
        inside = sorted(file.parent for file in folder.glob("*/run.json"))
        found += [folder] if (folder / "run.json").exists() else inside
    if not found:
        where = f"{', '.join(map(str, paths))} holds no run" if paths else "no folder given"
        raise ConfigError(f"{where}: pass folders of runs or of a sweep")
    return [read_run(folder, name) for folder, name in zip(found, distinct_names(found), strict=True)]


def distinct_names(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell the paths apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("the same folder is given twice")
