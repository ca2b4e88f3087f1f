"""pipeline.json: which stages of a pipeline are done, and the time and memory that they took."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import Difference, as_dict, differences, first_few
from jaxllm.config_versions import upgrade
from jaxllm.errors import ConfigError
from jaxllm.files import to_json, write_file
from jaxllm.pipeline.config import PARENTS, PipelineConfig

# Fields of a stage that change nothing about the model that it trained.
HARMLESS = (
    "mesh",
    "training.log_every",
    "training.hang_timeout",
    "checkpoint.keep",
    "wandb_project",
    "trackio_project",
)
# The pipeline sets these itself, to files that may have moved.
OWN = ("reward.model", "data.held_out")


class Record:
    """The content of pipeline.json, which is written whenever it changes.

    Raises ConfigError where a stage that is done was trained with another config than today's. It is compared
    as resolved, with the config.json of the stage's run: neither an edited config file goes unnoticed, nor is
    another spelling of a path a difference.
    """

    def __init__(self, folder: Path, config: PipelineConfig, config_file: str):
        self.folder, self.config = folder, config
        self.file = folder / "pipeline.json"
        self.value: dict[str, Any] = {"stages": []}
        if self.file.exists():
            try:
                self.value = json.loads(self.file.read_bytes())
            except ValueError as error:
                raise ConfigError(f"{self.file} cannot be read: {error}") from None
        self.value |= {
            "seed": config.seed,
            "config_file": config_file,
            "command": shlex.join(["python", *sys.argv]),
        }
        done = [name for name in PARENTS if self.is_done(name)]
        for name in done:
            self._check_parents(name)
            self._check_config(name)

    @property
    def gates_config(self) -> dict[str, Any]:
        """What the gates were measured with."""
        return {"seed": self.config.seed, **as_dict(self.config.gates)}

    def is_done(self, name: str) -> bool:
        """Whether a stage has finished and its folder is there; gates and a set of another config are
        not done."""
        entry = self._entry(name)
        if name == "gates":
            measured = (self.folder / "gates.json").exists()
            return measured and entry is not None and entry.get("config") == self.gates_config
        written = as_dict(self.config.synthesize) if name == "synthesize" else None
        is_same = entry is not None and entry.get("config") == written
        return is_same and (self.folder / name / "config.json").exists()

    def spend(self, name: str, seconds: float, memory: int) -> None:
        """Record what a stage that has not finished took in this invocation and those before it."""
        self.value.setdefault("unfinished", {})[name] = {"seconds": seconds, "peak_memory_bytes": memory}
        self._write()

    def spent(self, name: str) -> tuple[float, int]:
        """Seconds and peak bytes of the invocations of a stage so far."""
        took = self.value.get("unfinished", {}).get(name) or self._entry(name) or {}
        return took.get("seconds", 0.0), took.get("peak_memory_bytes", 0)

    def add(self, name: str, command: Sequence[str], seconds: float, memory: int) -> None:
        """Record a stage that has finished; seconds and memory are those of all its invocations."""
        entry = {"name": name, "workdir": name, "parent": PARENTS.get(name), "command": shown(command)}
        if name == "gates":
            entry["config"] = self.gates_config
        elif name == "synthesize":
            entry["config"] = as_dict(self.config.synthesize)
        else:  # they were those of other models
            (self.folder / "gates.json").unlink(missing_ok=True)
        self.value.get("unfinished", {}).pop(name, None)
        replaced = (name, "synthesize") if name in PARENTS else (name,)
        self.value["stages"] = [each for each in self.value["stages"] if each["name"] not in replaced]
        self.value["stages"].append(entry | {"seconds": seconds, "peak_memory_bytes": memory})
        self._write()

    def _write(self) -> None:
        took = [*self.value["stages"], *self.value.get("unfinished", {}).values()]
        self.value["seconds"] = sum(each["seconds"] for each in took)
        self.value["peak_memory_bytes"] = max(each["peak_memory_bytes"] for each in took)
        write_file(self.file, to_json(self.value))

    def _entry(self, name: str) -> dict[str, Any] | None:
        return next((stage for stage in self.value["stages"] if stage["name"] == name), None)

    def _check_parents(self, name: str) -> None:
        needed = [PARENTS[name]] if PARENTS[name] else []
        if rewarded_by_model(getattr(self.config, name)):
            needed.append("reward_model")
        for parent in needed:
            if not self.is_done(parent):
                raise ConfigError(
                    f"{self.folder}: {name} is done but {parent}, which it was trained from, is not: delete "
                    f"{self.folder / name} as well, or choose another --workdir"
                )

    def _check_config(self, name: str) -> None:
        file = self.folder / name / "config.json"
        try:
            trained_with = upgrade(json.loads(file.read_bytes()))
        except ValueError as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None
        found = [
            each
            for each in differences(trained_with, as_dict(getattr(self.config, name)))
            if not each.is_in(OWN)
        ]
        harmless = [each for each in found if each.is_in(HARMLESS)]
        if harmful := [each for each in found if each not in harmless]:
            raise ConfigError(
                f"{self.folder}: {name} was trained with another config: {listed(name, harmful)}; choose "
                f"another --workdir, or delete {self.folder / name} and the stages trained from it"
            )
        if harmless:
            print(f"{name} is done and not run again for {listed(name, harmless)}")


def listed(name: str, found: Sequence[Difference]) -> str:
    """The first few differences of a stage, with the names that a command line would use."""
    return first_few([f"{name}.{each}" for each in found])


def rewarded_by_model(section: Any) -> bool:
    """Whether a run's completions are scored by a reward model: here the pipeline's own."""
    return hasattr(section, "reward") and section.reward.model is not None


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python", *command[1:]])
