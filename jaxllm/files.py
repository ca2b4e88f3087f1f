"""Files that survive a crash, and files that one process holds alone."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names `path`: those of write() and fsync() on a full disk name no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """`path.write_text`, with an OSError that names the file."""
    with naming(path):
        path.write_text(text)


def write_file(path: Path, content: bytes) -> None:
    """Write atomically: whenever the machine stops, `path` holds all of `content` or its previous content.

    A file that is replaced keeps its mode.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # what fills the disk
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def is_url(path: str | Path) -> bool:
    """Whether a path names an object store, such as gs://bucket/run."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(path)) is not None


def to_json(value: Any) -> bytes:
    """`value` as indented JSON."""
    return json.dumps(value, indent=1).encode()


PEFT_CONFIG = "adapter_config.json"


def is_peft_folder(folder: str | Path) -> bool:
    """Whether a folder holds adapters in PEFT's files, as transformers decides it."""
    return (Path(folder).expanduser() / PEFT_CONFIG).is_file()


def is_hf_folder(folder: str | Path) -> bool:
    """Whether a folder is a Hugging Face model: its config.json has a model_type, or it holds the weights of
    one and its config.json is damaged, which reading it then says."""
    folder = Path(folder).expanduser()
    if is_peft_folder(folder):
        return False
    try:
        if "model_type" in json.loads((folder / "config.json").read_bytes()):
            return True
    except (OSError, ValueError, TypeError):
        pass
    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return any((folder / name).exists() for name in names)


# What file systems and file browsers add to any folder, and what a killed `write_file` or `locked` leaves.
_LEFTOVER = re.compile(
    r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*|\.fuse_hidden.*|\..*\.tmp|\.lock\..*"
)


def is_leftover(name: str) -> bool:
    """Whether a file of this name belongs to nothing that a run wrote."""
    return _LEFTOVER.fullmatch(name) is not None


def is_full_disk(error: OSError) -> bool:
    """Whether a disk or a quota was full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


# The folder for what is kept between runs

CACHE_VARIABLE = "JAXLLM_CACHE_DIR"  # the environment variable that --cache_dir sets


def cache_folder() -> Path:
    """What --cache_dir or JAXLLM_CACHE_DIR names, else ~/.cache/jaxllm."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/jaxllm").expanduser()


def use_cache_folder(path: str) -> None:
    """Make `path` the cache folder of this process and those that it starts, also for what the Hugging Face
    libraries download, unless their own variable HF_HOME is set."""
    folder = os.environ[CACHE_VARIABLE] = os.path.abspath(os.path.expanduser(path))
    if "HF_HOME" not in os.environ:  # not set here, since it moves the user's access token as well
        os.environ.setdefault("HF_HUB_CACHE", f"{folder}/huggingface/hub")
        os.environ.setdefault("HF_DATASETS_CACHE", f"{folder}/huggingface/datasets")


# Locks

BEAT = 15.0  # seconds between two signs of life of a holder
SILENCE = 120.0  # seconds without one, after which a holder on another host counts as ended


class Lock:
    """A file that this process holds, until `close` or its end. `left_by` names a holder that ended without
    `close`, and was replaced."""

    def __init__(self, path: Path, file: BinaryIO, left_by: str | None):
        self.path, self.file, self.left_by = path, file, left_by
        self.closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def _beat(self) -> None:
        while not self.closed.wait(BEAT):
            with contextlib.suppress(OSError, ValueError):  # it may be closed just now
                os.utime(self.file.fileno())

    def close(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        if _is_at(self.file, self.path):
            self.path.unlink()
        self.file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locked(path: Path) -> Lock:
    """Hold the file `path`, which says by whom. Processes of this host are told apart by flock, which the
    kernel releases when one ends; those of other hosts, where flock may not reach, by their signs of life.

    Raises BlockingIOError, whose message names the holder, where another process holds it.
    """
    mine = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
    file = mine.open("w+b")
    try:
        _flock(file)
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(to_json({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        file.flush()
        while True:
            try:
                os.link(mine, path)  # appears as a whole, and locked, or not at all
                return Lock(path, file, None)
            except FileExistsError:
                pass
            except OSError:  # no hard links here: two starts at the same instant are not told apart
                if not path.exists():
                    mine.replace(path)
                    return Lock(path, file, None)
            # "+", because NFS locks only files that are open for writing.
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as other:
                holder = _ended_holder(other, path, now=mine.stat().st_mtime)
                if _is_at(other, path):  # and not replaced meanwhile
                    mine.replace(path)
                    return Lock(path, file, holder)
    except BaseException:
        file.close()
        raise
    finally:
        mine.unlink(missing_ok=True)


def _ended_holder(file: BinaryIO, path: Path, now: float) -> str | None:
    """Who held the open lock file, if it says so. Raises BlockingIOError where that process may still run."""
    is_free = _flock(file)
    silent = now - os.fstat(file.fileno()).st_mtime  # both by the clock of the disk
    try:
        found = json.loads(file.read())
        host, pid, since = found["host"], int(found["pid"]), found["since"]
    except (ValueError, KeyError, TypeError):
        if is_free is False:
            raise BlockingIOError("another process") from None
        return None
    holder = f"process {pid} on {host} since {since}"
    if host == socket.gethostname():
        if is_free is False or (is_free is None and is_running(pid)):
            raise BlockingIOError(holder)
    elif is_free is False or silent < SILENCE:
        raise BlockingIOError(f"{holder}, seen {silent:.0f} s ago; if it has ended, remove {path}")
    return holder


def _flock(file: BinaryIO) -> bool | None:
    """Whether this process has the file's lock now; None where the file system has no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def is_running(pid: int) -> bool:
    """Whether a process of this host runs; one that was killed and not waited for does not."""
    with contextlib.suppress(OSError):  # of Linux: "PID (NAME) STATE ..."
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
