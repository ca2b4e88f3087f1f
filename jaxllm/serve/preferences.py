"""The file of choices: a line each, on disk before it is acknowledged; reward models train on it as it is."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.files import locked
from jaxllm.errors import DataError
from jaxllm.training.checkpoint import write_file

CHOICES = (0, 1, "tie", "bad")


class PreferenceFile:
    """Rows in the order of the file, which one process at a time may write.

    A row is appended and synced, so a machine that stops loses at most a row that nobody was promised: half a
    line, which the next start cuts off. To take a row back the whole file is written anew and renamed: a line
    that says "not that one" would mean nothing to a reward model.
    """

    def __init__(self, path: Path):
        """Reads what is there. Lines that are not ours stay as they are."""
        self.path = path = path.resolve()  # behind a link, rows taken back would leave the link's file
        if not path.parent.is_dir():
            raise DataError(f"--preferences={path}: there is no folder {path.parent}")
        try:
            # Not the file with the rows, which is another one after each row taken back.
            self._lock = locked(path.with_name(f".{path.name}.lock"))
            self.cut_off = self._repair()
        except BlockingIOError:
            raise DataError(f"--preferences={path}: another server writes to it, give another file") from None
        except OSError as error:
            raise DataError(f"--preferences={path}: {error.strerror}") from error
        self.rows = [row for row in map(own_row, self._lines()) if row is not None]

    def append(self, row: dict[str, Any]) -> None:
        """Returns when the row is on disk. OSError: it is not, and the file is as it was."""
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
        """Take back one of `rows`."""
        kept = [line for line in self._lines() if (own_row(line) or {}).get("id") != row["id"]]
        write_file(self.path, b"".join(kept))
        self.rows.remove(row)

    def close(self) -> None:
        self._lock.close()

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from file

    def _repair(self) -> bytes:
        """Cut off and return a last line that was never finished; make the file if there is none."""
        with self.path.open("ab+", buffering=0) as file:
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            last = content[end:]
            if read_object(last) is not None:  # a whole row: not everybody ends the last line
                file.write(b"\n")
                last = b""
            elif last:
                file.truncate(end)
            os.fsync(file.fileno())
        return last


def read_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def own_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line that this server wrote."""
    row = read_object(line)
    fields = {"id", "comparison", "prompt", "answers", "choice", "rater", "seeds", "sampling", "checkpoints"}
    ours = row is not None and fields <= row.keys() and row["choice"] in CHOICES
    return row if ours and isinstance(row["answers"], list) and len(row["answers"]) == 2 else None
