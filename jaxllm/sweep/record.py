"""sweep.json: the trials of a sweep, what has become of each, and what they share."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm.config import differences, first_few
from jaxllm.errors import ConfigError
from jaxllm.files import is_leftover, to_json, write_file
from jaxllm.sweep.goal import Goal
from jaxllm.sweep.trials import Trial
from jaxllm.training.metrics import held_out_names, read_metrics
from jaxllm.training.workdir import LOCK, held

FILE, LOGS = "sweep.json", "logs"
JOURNAL = "search.journal"  # of Optuna


@dataclasses.dataclass
class Sweep:
    """What sweep.json holds."""

    folder: Path
    config_file: str
    command: str
    goal: Goal
    base: dict[str, Any]  # the config that the trials override, resolved
    flags: dict[str, str]  # more flags of every trial
    trials: list[Trial]

    def save(self) -> None:
        """Write sweep.json atomically."""
        value = {"version": 1} | {
            k: v for k, v in vars(self).items() if k not in ("folder", "goal", "trials")
        }
        value |= {"goal": self.goal._asdict(), "trials": [dataclasses.asdict(each) for each in self.trials]}
        write_file(self.folder / FILE, to_json(value))

    def observe(self, trial: Trial) -> None:
        """Read the metric of a trial's run; of one that was started elsewhere, whether it has finished."""
        found = evaluations(self.folder / trial.name, self.goal)
        trial.step, trial.value, trial.error = found[-1] if found else (None, None, None)
        if trial.status in ("waiting", "submitted") and is_complete(self.folder / trial.name):
            trial.status = "finished"


def read(folder: Path) -> Sweep | None:
    """The sweep of a folder, as it was written; None where there is none."""
    try:
        value = json.loads((folder / FILE).read_bytes())
        del value["version"]
        value |= {"goal": Goal(**value["goal"]), "trials": [Trial(**each) for each in value["trials"]]}
        sweep = Sweep(folder, **value)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise ConfigError(f"--workdir={folder} is a file: name a folder") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / FILE} cannot be read: {error!r}") from None
    return sweep


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder that is empty or holds a sweep. ConfigError for any other, or where one is running."""
    with held(folder, "another sweep is running", check_folder):
        yield


def check_folder(folder: Path) -> None:
    """ConfigError for a folder that holds something and no sweep."""
    names = {each.name for each in folder.iterdir() if not is_leftover(each.name)} - {LOCK, LOGS}
    if names and FILE not in names:
        raise ConfigError(f"--workdir={folder} holds {min(names)} and no sweep: choose another --workdir")


def open_sweep(new: Sweep, *, resume: bool) -> Sweep:
    """The sweep that the folder of `new` holds, under the command of `new`; `new` where it holds none.

    Trials with the same config keep their name and what is known of them; those that `new` lacks are kept if
    they were started, and all of them where it names none. Raises ConfigError where the folder holds a sweep
    of another config, or any and not `resume`.
    """
    old = read(new.folder)
    if old is None:
        return new
    place = f"--workdir={new.folder} holds a sweep"
    if not resume:
        raise ConfigError(f"{place}: leave out --noresume to continue it, or choose another --workdir")
    if old.config_file != new.config_file:
        raise ConfigError(f"{place} of {old.config_file}, not of {new.config_file}: choose another --workdir")
    found = differences({**old.base, "flags": old.flags}, {**new.base, "flags": new.flags})
    if found:
        raise ConfigError(f"{place} with another config: {first_few(found)}; choose another --workdir")
    known = {trial.hash: trial for trial in old.trials}
    wanted = {trial.hash for trial in new.trials}
    others = [each for each in old.trials if each.hash not in wanted]
    kept = [each for each in others if each.status != "waiting" or not wanted]
    new.trials = [known.get(trial.hash, trial) for trial in new.trials] + kept
    for trial in new.trials:
        new.observe(trial)
    return new


def evaluations(folder: Path, goal: Goal) -> list[tuple[int, float, float | None]]:
    """(step, value, standard error) of every evaluation of a trial so far."""
    rows = read_metrics(folder / goal.run / "metrics.jsonl")
    found = [(row["step"], row.get(goal.logged), row.get(f"{goal.logged}_se")) for row in rows]
    return [(step, value, error) for step, value, error in found if value is not None]


def logged_metrics(folder: Path, goal: Goal) -> list[str]:
    """The names of the held-out metrics of a trial, for a message."""
    return held_out_names(read_metrics(folder / goal.run / "metrics.jsonl"))


def is_complete(folder: Path) -> bool:
    """Whether a run has saved its last step, or a pipeline has measured its gates."""
    if (folder / "gates.json").exists():
        return True
    try:
        steps = json.loads((folder / "config.json").read_bytes())["training"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (folder / "checkpoints" / str(steps)).is_dir()
