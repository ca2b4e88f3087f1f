"""A run folder held by one process: on a disk, or on an object store, whose local copy is uploaded."""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import BEAT, SILENCE, is_leftover, is_running, locked, to_json
from jaxllm.store import Store, StoreError, copy_of, update_copy

LOCK = "lock"  # held by the process that uses the folder, and removed by it
UPLOAD_EVERY = 60.0  # seconds; and before each checkpoint, and at the end


@contextlib.contextmanager
def held(folder: Path, what: str, check: Callable[[Path], None] = lambda folder: None) -> Iterator[None]:
    """Lock the folder --workdir, which is made where it is missing, once `check` has not refused it.

    Raises ConfigError, which says `what` there is if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check(folder)
        lock = locked(folder / LOCK)
    except BlockingIOError as error:
        raise ConfigError(f"--workdir={folder}: {what} there ({error})") from None
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: {error.strerror}") from None
    with lock:
        yield


@contextlib.contextmanager
def stored_folder(
    url: str, process: int = 0, locked: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], None]]:
    """A context in which this run alone works on the copy of `url` in `copy_of(url, process)`.

    At the start the copy is made equal to the store; what changes in it is then uploaded, checkpoints aside.
    Yields a function that uploads at once. In a run of several processes each has a copy of its own, and all
    but the first upload their logs only; `locked` is a barrier that they reach once the first has the lock.
    Raises ConfigError where another process holds the folder.
    """
    folder, store, content = copy_of(url, process), Store(url), b""
    if url.startswith("memory://"):
        print(f"note: {url} lasts no longer than this process", flush=True)
    if process == 0:
        try:
            content, left_by = _lock(store)
        except BlockingIOError as error:
            raise ConfigError(
                f"{url} is in use by {error}; wait for it, or choose another --workdir"
            ) from None
        except (StoreError, FileNotFoundError) as error:  # the latter: there is no such bucket
            raise ConfigError(f"--workdir={url}: {error}") from error
        if left_by is not None:
            print(f"the lock of {left_by} was left behind: that process has ended", flush=True)
    locked()
    dropped = update_copy(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if dropped:
        print(
            f"{folder} held {len(dropped)} files that {url} does not have, such as {dropped[0]}: dropped",
            flush=True,
        )
    upload = _Upload(store, folder, content, only="" if process == 0 else "logs/")
    try:
        yield upload
    except BaseException:
        with contextlib.suppress(StoreError, CheckpointError):  # what ends the run is more to the point
            upload.close()
        raise
    upload.close()


class _Upload:
    """Uploads the changed files of a copy when it is called, and every so often."""

    def __init__(self, store: Store, folder: Path, content: bytes, only: str) -> None:
        self.store, self.folder, self.content = store, folder, content
        self.only = only  # what other names do not begin with is not uploaded
        # Logs of a killed process may not be on the store yet.
        self.known = {name: state for name, state in self._files().items() if not name.startswith("logs/")}
        self.lost = False
        self.alone = threading.Lock()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="upload")
        self.thread.start()

    def __call__(self) -> None:
        with self.alone:
            if self.lost:
                raise CheckpointError(f"{self.store.url} has been taken over by another process")
            found = self._files()
            for name in [name for name, state in found.items() if self.known.get(name) != state]:
                with contextlib.suppress(FileNotFoundError):  # it may be replaced or deleted just now
                    self.store.write(name, (self.folder / name).read_bytes())
            gone = self.known.keys() - found.keys()
            self.store.delete(name for name in gone if not (self.folder / name).exists())
            self.known = found

    def close(self) -> None:
        """Upload what is left, and release the folder."""
        self.closed.set()
        self.thread.join()
        try:
            self()
        finally:
            if self.content and not self.lost:
                self.store.delete([LOCK])

    def _beat(self) -> None:
        uploaded, failed = time.monotonic(), False
        while not self.closed.wait(BEAT):
            try:
                if self.content:
                    self.lost = self.store.read(LOCK) != self.content
                    if not self.lost:
                        self.store.write(LOCK, self.content)  # which renews its time
                if time.monotonic() - uploaded > UPLOAD_EVERY:
                    uploaded = time.monotonic()
                    self()
                failed = False
            except FileNotFoundError:  # somebody removed it
                self.lost = True
            except (StoreError, CheckpointError) as error:
                if not failed:
                    print(f"warning: not uploaded, will be tried again: {error}", file=sys.stderr, flush=True)
                failed = True

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file that is uploaded from here: not those of checkpoints, nor those of a
        run inside a pipeline's folder, whose own process does that."""
        found = {}
        for parent, folders, files in os.walk(self.folder):
            here = Path(parent)
            folders[:] = [
                name for name in folders if name != "checkpoints" and not (here / name / "run.json").exists()
            ]
            for file in files:
                name = (here / file).relative_to(self.folder).as_posix()
                if name != LOCK and name.startswith(self.only) and not is_leftover(file):
                    with contextlib.suppress(FileNotFoundError):
                        state = (here / file).stat()
                        found[name] = (state.st_size, state.st_mtime_ns)
        return found


def _lock(store: Store) -> tuple[bytes, str | None]:
    """The content of the object LOCK, which this process has created, and who left one behind, if anybody.
    Raises BlockingIOError where another process may still run."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "id": secrets.token_hex(8)}
    content, left_by = to_json(holder), None
    while not store.create(LOCK, content):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            found = store.read(LOCK)
            left_by = _ended_holder(store, found)
            if store.read(LOCK) == found:
                store.delete([LOCK])
    return content, left_by


def _ended_holder(store: Store, content: bytes) -> str:
    """Who held the lock. Raises BlockingIOError where that process may still run."""
    mine = f".{LOCK}.{secrets.token_hex(8)}.tmp"
    store.write(mine, b"now")
    silent = store.modified(mine) - store.modified(LOCK)  # both by the clock of the store
    store.delete([mine])
    try:
        found = json.loads(content)
        host, pid, since = found["host"], int(found["pid"]), found["since"]
    except (ValueError, KeyError, TypeError):
        host, pid, since = "", 0, ""
    holder = f"process {pid} on {host} since {since}" if host else "another process"
    if silent < SILENCE and not (host == socket.gethostname() and not is_running(pid)):
        raise BlockingIOError(
            f"{holder}, seen {silent:.0f} s ago; if it has ended, remove {store.url}/{LOCK}"
        )
    return holder
