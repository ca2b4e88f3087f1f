"""Files that survive a crash, and files that one process holds alone."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO


def write_file(path: Path, content: bytes) -> None:
    """Write atomically: whenever the machine stops, `path` holds all of `content` or its previous content.

    A file that is replaced keeps its mode.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        if path.exists():
            shutil.copymode(path, temporary)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def to_json(value: Any) -> bytes:
    """`value` as indented JSON."""
    return json.dumps(value, indent=1).encode()


def locked(path: Path) -> BinaryIO:
    """Open the file for writing and lock it until it is closed or the process ends.

    Raises BlockingIOError where another process holds the lock.
    """
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
