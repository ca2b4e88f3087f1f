"""From `sweep()` of a config file to trials: every field checked, each named, duplicates left out."""

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import as_dict, as_flag, load_config, override, parse, use_config_file
from jaxllm.errors import ConfigError
from jaxllm.sweep.overrides import Overrides

LONGEST_NAME, LONGEST_VALUE = 80, 24  # characters of a trial's name without its hash, of a value in it
DONE = ("finished", "pruned", "diverged")  # what the same command again does not run again


@dataclass
class Trial:
    """One run of a sweep: a row of sweep.json."""

    name: str  # of its folder
    overrides: Overrides
    seed: int
    hash: str  # of the resolved config
    status: str = "waiting"  # submitted, running, stopped, failed, or one of DONE
    attempts: int = 0
    exit_code: int | None = None
    message: str = ""  # the last line of a process that failed
    seconds: float = 0.0  # of all its processes
    step: int | None = None  # of the last evaluation
    value: float | None = None  # of the metric there
    error: float | None = None  # its standard error over held-out rows
    confirms: bool = False  # whether it re-runs the best config with a fresh seed
    number: int | None = None  # in Optuna's study

    @property
    def is_done(self) -> bool:
        return self.status in DONE

    @property
    def settings(self) -> Overrides:
        """The overrides without the seed: trials that share them are averaged."""
        return {field: value for field, value in self.overrides.items() if field != "seed"}


class Base(NamedTuple):
    """What all trials share."""

    config_file: str  # FILE.py or FILE.py:ARG
    config_class: type
    fields: Mapping[str, str]  # overrides of the command line, as text
    script: Path  # experiments/train.py or pipeline.py
    flags: Mapping[str, str]  # more flags of that script

    def resolve(self, overrides: Overrides) -> dict[str, Any]:
        """The whole config of a trial, its fields read as the command line reads them."""
        if any(field.rpartition(".")[2] == "stage" for field in overrides):
            raise ConfigError("the stage is that of the config file: sweep another file for another stage")
        config = load_config(self.config_file)
        for field, text in {**self.fields, **_texts(overrides)}.items():
            override(config, self.config_class, field, text)
        return as_dict(parse(self.config_class, config))

    def command(self, trial: Trial, workdir: str) -> list[str]:
        """The process that a trial is."""
        fields = {**self.fields, **_texts(trial.overrides)}
        flags = {"config": self.config_file, "workdir": f"{workdir}/{trial.name}", **self.flags}
        flags |= {f"config.{field}": text for field, text in fields.items()}
        path = os.path.relpath(self.script)
        return [sys.executable, path, *(f"--{name}={value}" for name, value in flags.items())]


def _texts(overrides: Overrides) -> dict[str, str]:
    return {field: as_flag(value) for field, value in overrides.items()}


def read_sweep(config_file: str) -> list[Overrides]:
    """What `sweep()`, or `sweep(ARG)`, yields in FILE.py:ARG. ConfigError where there is none."""

    def use(module: Any, given: Sequence[str]) -> list[Any]:
        takes_argument = bool(inspect.signature(module.sweep).parameters)
        trials = module.sweep(*given) if takes_argument else module.sweep()
        if trials is None:
            raise ConfigError("sweep() returns None; yield or return the trials")
        return list(trials)

    found = _use_function(config_file, "sweep", use)
    for i, each in enumerate(found, 1):
        if not isinstance(each, dict):
            raise ConfigError(f"sweep(): trial {i} is {each!r}; yield a dict of overrides")
    if not found:
        raise ConfigError(f"{config_file}: sweep() yields no trial")
    return found


def call_search(config_file: str, trial: Any) -> Overrides:
    """What `search(trial)` returns in FILE.py for one of Optuna's trials. ConfigError where there is none."""
    found = _use_function(config_file, "search", lambda module, _: module.search(trial))
    if not isinstance(found, dict):
        raise ConfigError(f"search() returned a {type(found).__name__}; return a dict of overrides")
    return found


def _use_function(config_file: str, name: str, use: Any) -> Any:
    def checked(module: Any, given: Sequence[str]) -> Any:
        if not hasattr(module, name):
            raise ConfigError(f"defines no {name}(); docs/how-to/sweep.md shows one")
        return use(module, given)

    return use_config_file(config_file, checked)


def check_both(base: Base, overrides: Overrides, where: str) -> None:
    """ConfigError for a field that both the command line and a trial set."""
    for field in base.fields.keys() & overrides.keys():
        raise ConfigError(f"--config.{field}: {where} sets it too; remove one of the two")


def make_trials(base: Base, sweep: Iterable[Overrides]) -> tuple[list[Trial], list[str]]:
    """The trials, and a line for each that is left out because its config is that of an earlier one.

    Raises ConfigError, which names the trial and the field, for the first value that does not fit."""
    trials: dict[str, Trial] = {}
    duplicates = []
    for i, overrides in enumerate(sweep, 1):
        check_both(base, overrides, "sweep()")
        trial = make_trial(base, overrides, f"sweep(): trial {i}")
        if (same := trials.setdefault(trial.hash, trial)) is not trial:
            duplicates.append(f"trial {i} ({shown(overrides)}) has the config of {same.name}")
    return list(trials.values()), duplicates


def make_trial(base: Base, overrides: Overrides, place: str) -> Trial:
    """A trial with its name: its overrides in safe characters, and a hash of its resolved config."""
    try:
        config = base.resolve(overrides)
    except ConfigError as error:
        raise ConfigError(f"{place} ({shown(overrides)}): {error}") from None
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    labels = short_names(overrides)
    parts = [f"{labels[field]}_{_safe(value)}" for field, value in overrides.items()]
    name = "-".join(parts)[:LONGEST_NAME] or "plain"
    values = json.loads(json.dumps(overrides, default=_plain))
    return Trial(f"{name}-{digest}", values, config["seed"], digest)


def _plain(value: Any) -> Any:
    """A number of numpy as Python's, and a path as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _safe(value: Any) -> str:
    return (
        re.sub(r"[^A-Za-z0-9.+]+", "_", short_value(value)).strip("_").replace("+", "")[:LONGEST_VALUE]
        or "empty"
    )


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted field, or as many parts as tell the fields apart.

    >>> list(short_names(["sft.optimizer.beta1", "dpo.optimizer.beta1", "dpo.objective.beta"]).values())
    ['sft.optimizer.beta1', 'dpo.optimizer.beta1', 'beta']
    """
    fields = list(fields)

    def endings(field: str) -> Iterator[str]:
        parts = field.split(".")
        return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))

    def is_unique(ending: str) -> bool:
        return sum(f".{each}".endswith(f".{ending}") for each in fields) == 1

    return {field: next(filter(is_unique, endings(field)), field) for field in fields}


def short_value(value: Any) -> str:
    """As the command line takes it, numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else as_flag(value)


def shown(overrides: Overrides) -> str:
    """learning_rate=0.003, seed=1"""
    labels = short_names(overrides)
    return ", ".join(f"{labels[field]}={short_value(value)}" for field, value in overrides.items())
