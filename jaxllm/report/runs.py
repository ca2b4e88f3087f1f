"""Run folders and pipeline folders, as far as they are written: what is missing is said, the rest is read.

Only JSON is read (`config.json`, `run.json`, `metrics.jsonl`, `evals/`, `arrays.json` of a checkpoint, and a
pipeline's `pipeline.json`, `gates.json` and `shown.json`), never a log.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig, flops_per_token
from jaxllm.training.metrics import read_metrics

PIPELINE_FILES = ("pipeline.json", "gates.json", "shown.json")


class Point(NamedTuple):
    step: int
    value: float
    error: float | None  # standard error, of what is measured on held-out rows


@dataclass(frozen=True)
class Run:
    """A run folder; `entry` is what the pipeline that made it says of it, if one did."""

    folder: Path
    name: str
    config: dict[str, Any]
    record: dict[str, Any]  # run.json
    rows: list[dict[str, Any]]  # metrics.jsonl
    entry: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", "unknown"))

    @property
    def last_start(self) -> dict[str, Any]:
        starts = objects(self.record.get("starts"))
        return starts[-1] if starts else {}

    @property
    def command(self) -> str | None:
        starts = objects(self.record.get("starts"))
        return self.entry.get("command") or (starts[0].get("command") if starts else None)

    def points(self, metric: str) -> list[Point]:
        """The finite values of a metric, in order of step."""
        return [
            Point(row["step"], row[metric], error if is_number(error := row.get(f"{metric}_se")) else None)
            for row in self.rows
            if is_number(row.get(metric))
        ]

    def last(self, metric: str) -> Point | None:
        points = self.points(metric)
        return points[-1] if points else None

    @property
    def tokens(self) -> float | None:
        point = self.last("train/tokens")
        return point.value if point else None

    @property
    def flops(self) -> float | None:
        """Of the updates: tokens times what the formula of jaxllm.models.config gives for one."""
        try:
            model = parse(ModelConfig, self.config["model"], "model")
            each = flops_per_token(model, self.config["data"]["sequence_length"])
        except (ConfigError, KeyError, TypeError):
            return None
        models = 2 if self.stage == "ppo" else 1  # the policy and its critic
        return None if self.tokens is None else self.tokens * each * models

    @property
    def parameters(self) -> int | None:
        """Of all models that are trained, from the names and shapes beside the newest checkpoint."""
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
        """What the pipeline measured, or the time of the steps, evaluation and saving left out."""
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
        """Bytes: of the process as the pipeline measured it, or of a device that counts them."""
        if is_number(self.entry.get("peak_memory_bytes")):
            return self.entry["peak_memory_bytes"]
        point = self.last("perf/memory_peak_gb")
        return point.value * 1e9 if point else None


@dataclass(frozen=True)
class Pipeline:
    """The folder of a pipeline, with the runs of its stages."""

    folder: Path
    name: str
    facts: dict[str, Any]  # pipeline.json
    gates: list[dict[str, Any]] | None  # None: not written yet
    shown: dict[str, Any]
    stages: list[Run]
    problems: list[str]


def is_number(value: Any) -> bool:
    """Whether JSON gave a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; none of anything else."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file; where there is none, {} and a line in `problems`."""
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
        problems.append(f"{where} is no JSON object")
    return {}


def read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that name their step."""
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
    return Run(
        folder, name, config, record, read_rows(folder / "metrics.jsonl", problems), entry or {}, problems
    )


def read_pipeline(folder: Path, name: str) -> Pipeline:
    """A pipeline's folder, complete or not."""
    problems: list[str] = []
    facts, gates, shown = (read_object(folder / file, problems) for file in PIPELINE_FILES)
    stages, listed_folders = [], set()
    for entry in objects(facts.get("stages")):
        stage = str(entry.get("name", f"stage {len(stages) + 1}"))
        run = folder / str(entry.get("workdir", stage))
        listed_folders.add(run)
        if (run / "run.json").exists():
            stages.append(read_run(run, stage, entry))
        elif stage != "gates":  # measuring them is no run
            problems.append(f"{stage}/run.json is missing")
    others = [path.parent for path in folder.glob("*/run.json") if path.parent not in listed_folders]
    unfinished = [read_run(path, path.name) for path in others]
    stages += sorted(unfinished, key=lambda run: str(run.record.get("id")))  # ids begin with the time
    problems += [f"stage {run.name} is not over" for run in unfinished]
    listed = objects(gates["gates"]) if "gates" in gates else None
    if gates and listed is None:
        problems.append(f"{folder.name}/gates.json has no gates")
    problems += [problem for run in stages for problem in run.problems]
    return Pipeline(folder, name, facts, listed, shown, stages, problems)


def read_all(paths: list[Path]) -> list[Run | Pipeline]:
    """The runs and pipelines in these folders, each with a name of its own; ConfigError for any other."""
    folders = [path.expanduser().absolute() for path in paths]
    found: list[Run | Pipeline] = []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        if (folder / "run.json").exists():
            found.append(read_run(folder, name))
        elif any((folder / file).exists() for file in (*PIPELINE_FILES, "pretrain/run.json")):
            found.append(read_pipeline(folder, name))
        else:
            files = [file for name in ("run", "pipeline") for file in folder.glob(f"*/{name}.json")]
            inside = sorted({file.parent.name for file in files})
            hint = f"; in it are {', '.join(inside)}" if inside else ""
            raise ConfigError(f"{folder} is no run: it has neither run.json nor pipeline.json{hint}")
    return found


def distinct_names(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many parts as it takes to tell them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("the same folder is given twice")
