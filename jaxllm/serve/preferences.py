"""The file of choices, one JSON object a line. A choice is on disk before it is acknowledged.

Reward models and DPO train on the file as it is (jaxllm/data/preferences.py).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import DataError
from jaxllm.files import locked, write_file

Choice = Literal[0, 1, "tie", "bad"]  # the index of the better answer, both equally good, both bad
CHOICES: tuple[Choice, ...] = (0, 1, "tie", "bad")


class PreferenceFile:
    """The rows of the file, in order. Only one process at a time can write to it.

    Each row is appended and synced. A crash loses at most a row that was not acknowledged: it leaves part of
    a line, which the next start removes. Removing a row rewrites the whole file and renames it, because a
    reward model would not understand a line that cancels an earlier one.
    """

    def __init__(self, path: Path):
        """Reads the file, or creates it. Lines in other formats stay as they are."""
        self.path = path = path.resolve()  # a rename would replace a symbolic link and not its target
        if not path.parent.is_dir():
            raise DataError(f"--preferences={path}: the folder {path.parent} does not exist")
        try:
            # A separate file, because removing a row replaces the file with the rows.
            self._lock = locked(path.with_name(f".{path.name}.lock"))
            self.cut_off = self._repair()  # the incomplete last line that was removed
        except BlockingIOError as error:
            raise DataError(
                f"--preferences={path}: another server writes to it ({error}); use another file"
            ) from None
        except OSError as error:
            raise DataError(f"--preferences={path}: {error.strerror}") from error
        self.rows = [row for row in map(own_row, self._lines()) if row is not None]

    def append(self, row: dict[str, Any]) -> None:
        """Returns when the row is on disk. After an OSError the file is unchanged."""
        line = json.dumps(row).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        self.rows.append(row)

    def remove(self, row: dict[str, Any]) -> None:
        """Removes one of `rows` from the file."""
        kept = [line for line in self._lines() if (own_row(line) or {}).get("id") != row["id"]]
        write_file(self.path, b"".join(kept))
        self.rows.remove(row)

    def close(self) -> None:
        self._lock.close()

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from file

    def _repair(self) -> bytes:
        """Removes and returns an incomplete last line. Creates the file where it does not exist."""
        with self.path.open("ab+", buffering=0) as file:
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            last = content[end:]
            if read_object(last) is not None:  # complete: some editors omit the final newline
                file.write(b"\n")
                last = b""
            elif last:
                file.truncate(end)
            os.fsync(file.fileno())
        return last


def read_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def own_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line that this server wrote."""
    row = read_object(line)
    fields = {"id", "comparison", "prompt", "answers", "choice", "rater", "seeds", "sampling", "checkpoints"}
    if row is None or not fields <= row.keys() or row["choice"] not in CHOICES:
        return None
    whole = isinstance(row["answers"], list) and len(row["answers"]) == 2 and isinstance(row["rater"], str)
    return row if whole else None
