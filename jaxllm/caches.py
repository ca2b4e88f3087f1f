"""What is kept between runs, in one folder: tokens and rows, downloads, log-probs of a reference, hashes of
sources, and compiled programs.

A cache is built under a lock, so that two runs that need it build it once, in `NAME.partial`, which becomes
`NAME` when it is complete. A killed build leaves what it has for the next one, which continues it.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from jaxllm.errors import DataError
from jaxllm.files import Lock, is_full_disk, locked

T = TypeVar("T")

KEPT_SECONDS = 7 * 24 * 3600.0  # how long a half-built cache waits for the run that would continue it
_POLL_SECONDS = 0.5

# What builds leave that nobody continues: those of today, and of versions that had no lock.
_HALF_BUILT = re.compile(r".*\.partial|[0-9a-f]{32}\.\d+\.[0-9a-f]{8}|reference-[0-9a-f]{32}\..+\.npy")


def read_or_build(
    path: Path, read: Callable[[Path], T | None], build: Callable[[Path], None], what: str
) -> T:
    """What `read` finds at `path`; where that is None, `build` first writes it to the path that it is given,
    which may hold the part that a killed build recorded.

    `what` completes "waiting for PROCESS, which ..." and "cannot ...". Raises DataError where the folder
    cannot be written to. Reading takes no lock: a cache on a read-only disk can be used.
    """
    found = read(path)
    if found is not None:
        return found
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _waited_for(path.with_name(f"{path.name}.lock"), what):
            found = read(path)  # another process may have built it meanwhile
            if found is None:
                collect(path.parent)
                if path.exists():
                    print(f"note: {path} is damaged, and made again", flush=True)
                build(partial)
                remove(path)
                partial.rename(path)
                found = read(path)
    except OSError as error:
        fix = ("free some space, or " if is_full_disk(error) else "") + "name another folder with --cache_dir"
        raise DataError(
            f"{error.filename or path}: cannot {what} ({error.strerror or error}); {fix}"
        ) from error
    if found is None:
        raise DataError(f"{path}: what was just written cannot be read back; check the disk")
    return found


@contextlib.contextmanager
def _waited_for(path: Path, what: str) -> Iterator[Lock]:
    """The lock `path`, once the process that holds it has released it or ended."""
    told = False
    while True:
        try:
            lock = locked(path)
        except BlockingIOError as error:
            if not told:
                print(f"waiting for {error}, which has the lock to {what}", flush=True)
            told = True
            time.sleep(_POLL_SECONDS)
            continue
        with lock:
            yield lock
        return


def collect(folder: Path) -> None:
    """Delete half-built caches that nobody has touched for a week."""
    for path in folder.iterdir():
        if not _HALF_BUILT.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError), locked(path.with_name(f"{path.stem}.lock")):
            files = path.iterdir() if path.is_dir() else ()
            touched = max(each.stat().st_mtime for each in (path, *files))
            if time.time() - touched > KEPT_SECONDS:
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
