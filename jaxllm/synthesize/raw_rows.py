"""rows.jsonl: all that was written, a line for each row in their order, before any filter. It only grows."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import DataError
from jaxllm.files import naming

Row = dict[str, Any]


class RawRows:
    """The rows of a file, and a place to append others.

    A kill may leave a line without its end: it is dropped, and its row written again.
    """

    def __init__(self, path: Path):
        """Raises DataError for a file with a row that is damaged, lost or there twice."""
        self.path = path
        self.rows: list[Row] = []
        content = path.read_bytes() if path.exists() else b""
        lines, torn = content.split(b"\n")[:-1], content.rpartition(b"\n")[2]
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                found = row["row"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}:{number + 1}: not a row: delete the file, or restore it") from None
            if found != number:
                raise DataError(f"{path}:{number + 1}: is row {found}, not {number}: restore the file")
            self.rows.append(row)
        if torn:
            print(
                f"{path.name}: a torn last line dropped, {len(torn)} bytes; row {len(lines)} is written again"
            )
            os.truncate(path, len(content) - len(torn))

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows, which are on disk when this returns."""
        with naming(self.path), self.path.open("ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
