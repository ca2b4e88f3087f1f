"""The folder of a run: which run it holds, whether this command may go on with it, and how it came about.

`WORKDIR/` holds `config.json` (as resolved), `run.json` (id, parent checkpoint, fingerprints of what the run
reads, and its starts), `checkpoints/STEP/`, and what the parts of a run write beside them. Reading it
executes nothing and unpickles nothing.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
import secrets
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jaxllm
from jaxllm.config import differences
from jaxllm.errors import CheckpointError, ConfigError, DataError
from jaxllm.training.checkpoint import MANIFEST, first_process_decides, step_folders, to_json, write_file

_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class RunFolder:
    path: Path
    id: str
    resuming: bool  # there is a checkpoint to go on from
    step: int | None  # the one --resume=STEP asks for; None is the newest

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def file(self, *names: str) -> Path:
        """A path inside the folder, its parents made. No name leads out of it."""
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} cannot name a file: use only letters, digits and '.', '_', '-'")
        path = self.path.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def open_run(
    workdir: str, config: Mapping[str, Any], *, resume: str, may_differ: Collection[str] = ()
) -> RunFolder:
    """Take `workdir` for a run of `config` (what `as_dict` gives), or refuse; call it before anything slow.

    A folder whose run never came to `record_start` may be taken with any config.

    Args:
      resume: "auto" goes on if the folder holds this run, else starts it; "must" refuses to start, "never"
        refuses to go on; a number goes on from that step.
      may_differ: dotted names of the fields, and sections of fields, that may change within a run.
    """
    if resume not in ("auto", "must", "never") and not resume.isdecimal():
        raise ConfigError(f"--resume={resume}: must be auto, must, never or a step")
    path = Path(workdir).expanduser().absolute()
    if not workdir or "://" in workdir or not _NAME.fullmatch(path.name):
        raise ConfigError(
            f"--workdir={workdir}: must be a local folder whose own name has only letters, digits, '.', '_' "
            f"and '-'"
        )
    try:
        resuming = first_process_decides(lambda: _claim(path, config, resume, may_differ))
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: {error.strerror}") from error
    step = int(resume) if resume.isdecimal() else None
    return RunFolder(path, _read(path / "run.json")["id"], bool(resuming), step)


def _claim(path: Path, config: Mapping[str, Any], resume: str, may_differ: Collection[str]) -> bool:
    """Whether there is a checkpoint of this run to go on from. Begins the record of a new run."""
    if not (path / "run.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        if found := {entry.name for entry in path.iterdir()} - {"logs"}:  # a launcher's may be there already
            raise ConfigError(f"{path} holds {min(found)} but no run.json: choose another --workdir")
        run_id = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        record = {"id": run_id, "parent": None, "fingerprints": {}, "starts": []}
        write_file(path / "run.json", to_json(record))
    record = _read(path / "run.json")
    if record["starts"]:
        if resume == "never":
            raise ConfigError(f"--resume=never: {path} holds run {record['id']}, choose another --workdir")
        _refuse_another_run(path, record["id"], config, may_differ)
    # Those with a manifest, whole or not: a run whose checkpoints are all damaged must not start afresh.
    saved = [folder.name for folder in step_folders(path / "checkpoints") if (folder / MANIFEST).exists()]
    if resume == "must" and not saved:
        raise CheckpointError(f"--resume=must: {path} holds no checkpoint")
    if resume.isdecimal() and str(int(resume)) not in saved:
        raise CheckpointError(f"--resume={resume}: {path} holds steps {', '.join(saved) or 'none'}")
    return bool(saved)


def _refuse_another_run(
    path: Path, run_id: str, config: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    found = [
        str(difference)
        for difference in differences(_read(path / "config.json"), config)
        if not any(f"{difference.path}.".startswith(f"{name}.") for name in may_differ)
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigError(
            f"{path} holds run {run_id} of another config: {'; '.join(found[:5])}{more}. "
            f"Choose another --workdir, or give these fields the values in its config.json"
        )


def record_start(
    run: RunFolder,
    config: Mapping[str, Any],
    *,
    command: Sequence[str],
    fingerprints: Mapping[str, str],
    parent: Mapping[str, str] | None = None,
) -> None:
    """Write down that the run starts or goes on; call it before compiling.

    Args:
      fingerprints: hashes of what must not change within a run, such as its data and its tokenizer.
      parent: path and hash of the checkpoint whose weights a new run starts from.
    """
    record = _read(run.path / "run.json")
    if run.resuming:
        before = record["fingerprints"]
        for name in before | dict(fingerprints):
            if before.get(name) != fingerprints.get(name):
                raise DataError(
                    f"the {name} is not that of the run in {run.path}: fingerprint {before.get(name)} there, "
                    f"{fingerprints.get(name)} here. Choose another --workdir, or restore the {name}"
                )
    else:
        record |= {"fingerprints": dict(fingerprints), "parent": parent}
    record["starts"].append(
        {
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
    )
    if jax.process_index() == 0:
        write_file(run.path / "config.json", to_json(config))
        write_file(run.path / "run.json", to_json(record))


def _git_revision() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "jaxllm": jaxllm.__version__}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
