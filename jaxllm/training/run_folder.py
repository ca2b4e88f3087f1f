"""The folder of a run: which run it holds, whether a command may resume it, and how it was started.

`WORKDIR/` holds `config.json` (as resolved, with a version), `run.json` (id, parent checkpoint, fingerprints
of the inputs, and every start with its command), `checkpoints/STEP/`, and the other files that a run writes.
Reading it executes nothing and unpickles nothing.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jaxllm
from jaxllm.config import differences, first_few
from jaxllm.config_versions import stamped, upgrade
from jaxllm.errors import ConfigError, DataError, NoCheckpoint
from jaxllm.files import is_leftover, is_url, locked, to_json, write_file
from jaxllm.parallel.processes import NO_TIMEOUT, barrier, first_process_decides, is_first
from jaxllm.store import url_of, working_path
from jaxllm.training.step_folder import MANIFEST, step_folders
from jaxllm.training.workdir import LOCK, stored_folder

# What a start may leave in a run folder besides config.json: tokenizer and chat template.
START_FILES = frozenset(
    (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "template.jinja",
    )
)
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this command may write to."""

    path: Path
    id: str
    resuming: bool  # whether there is a checkpoint to resume from
    step: int | None  # of --resume=STEP; None: the newest
    before: Mapping[str, Any] | None = None  # the config of a run that resumes, as it was last started

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return _read(self.path / "run.json")

    def file(self, *names: str) -> Path:
        """A path inside the folder; its parent folders are created. No name leads out of the run folder."""
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{name!r} is not a valid file name: use only letters, digits, '.', '_', '-'"
                )
        path = self.path.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextlib.contextmanager
def lock_run(workdir: str) -> Iterator[Callable[[], None]]:
    """A context in which no other process uses the run folder. ConfigError that names the one that does.

    Yields a function that uploads what has changed in it, for a folder on an object store.
    """
    path = _run_path(workdir)
    if is_url(workdir):
        ready = functools.partial(barrier, "lock of the run folder", NO_TIMEOUT)
        with stored_folder(workdir, jax.process_index(), ready) as upload:
            yield upload
        return
    if jax.process_index() != 0:
        yield lambda: None
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = locked(path / LOCK)
    except BlockingIOError as error:
        raise ConfigError(f"{path} is in use by {error}; wait for it, or choose another --workdir") from None
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: {error.strerror}") from error
    if lock.left_by is not None:
        print(f"the lock of {lock.left_by} was left behind: that process has ended", flush=True)
    try:
        with lock:
            yield lambda: None
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # if nothing was written


def logs_of(workdir: str) -> Path:
    """Where the processes of a run write what is theirs alone: output, stacks."""
    return _run_path(workdir) / "logs"


def open_run(
    workdir: str, config: Mapping[str, Any], *, resume: str, may_differ: Collection[str] = ()
) -> RunFolder:
    """Open `workdir` for a run of `config` (as `as_dict` returns it). To be called before anything slow.

    Raises ConfigError where the folder holds another run or anything else, and NoCheckpoint where the
    checkpoint to resume from does not exist. A folder whose run never reached `record_start` may be reused
    with any config.

    Args:
      resume: "auto" resumes if the folder holds a checkpoint of this run and otherwise starts the run; "must"
        only resumes; "never" only starts; a number resumes from that step.
      may_differ: dotted names of fields, and of sections of fields, that may change within a run.
    """
    if resume not in ("auto", "must", "never") and not resume.isdecimal():
        raise ConfigError(f"--resume={resume} must be auto, must, never or a step")
    path = _run_path(workdir)
    try:
        resuming, record = first_process_decides(lambda: _claim(path, config, resume, may_differ))
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: {error.strerror}") from error
    if is_url(workdir) and not is_first():  # it has a copy of its own
        write_file(path / "run.json", to_json(record))
    step = int(resume) if resume.isdecimal() else None
    before = _stored_config(path) if resuming and (path / "config.json").exists() else None
    return RunFolder(path, record["id"], resuming, step, before)


def _run_path(workdir: str) -> Path:
    path = working_path(workdir, jax.process_index())
    if not workdir or not _NAME.fullmatch(path.name):
        raise ConfigError(
            f"--workdir={workdir} must be a folder whose name has only letters, digits, '.', '_', '-'"
        )
    return path


def _claim(
    path: Path, config: Mapping[str, Any], resume: str, may_differ: Collection[str]
) -> tuple[bool, dict[str, Any]]:
    """Whether there is a checkpoint of this run to resume from, and its `run.json`, which is created for a
    new run."""
    where = url_of(path)
    if not (path / "run.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()} - {"logs", LOCK}  # a launcher may have created logs/
        if found := [name for name in names if not is_leftover(name)]:
            raise ConfigError(f"{where} is not a run folder, it holds {min(found)}: choose another --workdir")
        run_id = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        record = {"id": run_id, "parent": None, "fingerprints": {}, "starts": []}
        write_file(path / "run.json", to_json(record))
    record = _read(path / "run.json")
    if record["starts"]:
        if resume == "never":
            raise ConfigError(f"--resume=never: {where} holds run {record['id']}; choose another --workdir")
        _check_same_config(path, record["id"], config, may_differ)
    # Damaged ones count too: a run whose checkpoints are all damaged must not start from step 0 unnoticed.
    saved = [folder.name for folder in step_folders(path / "checkpoints") if (folder / MANIFEST).exists()]
    if resume == "must" and not saved:
        raise NoCheckpoint(f"--resume=must: {where} holds no checkpoint; use --resume=auto to start the run")
    if resume.isdecimal() and str(int(resume)) not in saved:
        steps = f"only the steps {', '.join(saved)}" if saved else "no checkpoint"
        raise NoCheckpoint(f"--resume={resume}: {where} holds {steps}")
    return bool(saved), record


def _check_same_config(
    path: Path, run_id: str, config: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    """ConfigError where `config` differs from that of the run in a field that is not in `may_differ`."""
    found = [each for each in differences(_stored_config(path), config) if not each.is_in(may_differ)]
    if found:
        unsaved = not step_folders(path / "checkpoints")
        start_anew = ", or delete the folder, in which no step was saved" if unsaved else ""
        raise ConfigError(
            f"{url_of(path)} holds run {run_id} with another config: {first_few(found)}. "
            f"Choose another --workdir, or set these fields to the values in its config.json{start_anew}"
        )


def _stored_config(path: Path) -> dict[str, Any]:
    """The config of the run in a folder, under today's names."""
    file = path / "config.json"
    try:
        return upgrade(_read(file))
    except ValueError as error:  # of a newer version
        raise ConfigError(f"{file} cannot be read: {error}") from error


def record_start(
    run: RunFolder,
    config: Mapping[str, Any],
    *,
    command: Sequence[str],
    fingerprints: Mapping[str, str],
    parent: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
    clock: str | None = None,
) -> None:
    """Record in the folder that the run starts or resumes. To be called before compiling.

    A run has started once `run.json`, which is written last, has a start. Until then a new start replaces all
    that an earlier one, which failed, wrote.

    Args:
      fingerprints: hashes of what must not change within a run, such as its data and its tokenizer. Raises
        DataError where they differ from those of the run that is resumed.
      parent: path and hash of the checkpoint that a new run is initialized from.
      files: the tokenizer and chat template of a new run, by file name.
      clock: the time that its chat template is told, if it asks.
    """
    record = run.record
    if run.resuming:
        before = record["fingerprints"]
        for name in before | dict(fingerprints):
            if before.get(name) != fingerprints.get(name):
                if name == "data" and _fingerprint_of_code(_read(run.path / "config.json")):
                    print("the data's fingerprint is of version 1, which hashed source code: not compared")
                    before[name] = fingerprints[name]
                    continue
                raise DataError(
                    f"the {name} differs from that of the run in {url_of(run.path)}: fingerprint "
                    f"{before.get(name)} there, {fingerprints.get(name)} here. Choose another --workdir, or "
                    f"restore the {name}"
                )
    else:
        record |= {"fingerprints": dict(fingerprints), "parent": parent, "clock": clock}
    record.setdefault("clock", clock)  # an older version recorded none
    start = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "resuming": run.resuming,
        "command": shlex.join(command),
        "git": _git_revision(),
        "versions": _versions(),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }
    if run.resuming and (moved := _other_machine(record["starts"][-1:], start)):
        print(f"note: {moved} since the last start: the bits may differ from those of an uninterrupted run")
    record["starts"].append(start)
    if jax.process_index() == 0 or is_url(url_of(run.path)):  # where each process has a copy of its own
        if not run.resuming:
            _replace_files(run, files or {})
        write_file(run.path / "config.json", to_json(stamped(config)))
        write_file(run.path / "run.json", to_json(record))


def _replace_files(run: RunFolder, files: Mapping[str, bytes]) -> None:
    """Write the files of a new run in place of those of a start that failed, if there was one."""
    for name in START_FILES - files.keys():
        (run.path / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_file(run.file(name), content)


def _other_machine(last: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> str:
    """How a start differs in what computes from the last one, if there was one."""
    found = [
        str(difference)
        for before in last
        for section in ("devices", "versions")
        for difference in differences(before[section], now[section], section)
        if section == "devices" or difference.path in ("versions.jax", "versions.jaxlib")
    ]
    return ", ".join(found)


def _fingerprint_of_code(config: Mapping[str, Any]) -> bool:
    """Whether the run's data has the fingerprint that version 1 gave synthetic text, that of the generator's
    source code; the text itself is the same (tests/toy_world pins it)."""
    data = config["data"]
    sources = (*data["train"], *data["validation"])
    return "version" not in config and "text_key" in data and any(x.startswith("synthetic") for x in sources)


def _git_revision() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None


def _versions() -> dict[str, str]:
    """Of Python and of the packages that a run depends on most."""
    versions = {"python": platform.python_version(), "jaxllm": jaxllm.__version__}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; ConfigError where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
