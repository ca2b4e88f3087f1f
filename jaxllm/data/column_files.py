"""Arrays that grow in the files of a folder, and survive a kill up to the last `record`."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.caches import remove
from jaxllm.files import naming, write_file

_RECORD = "progress.json"


class ColumnFiles:
    """A context with one file per column, opened at the end of what was recorded."""

    def __init__(self, folder: Path, names: Sequence[str]):
        """`folder` is created, or continued where a killed process recorded a state with these columns."""
        self.folder, self.names = folder, names
        self.state: Any = None  # what was recorded last; None: start from the beginning

    def __enter__(self) -> "ColumnFiles":
        sizes = self._recorded_sizes()
        if self.state is None:
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self.files = {name: stack.enter_context((self.folder / name).open("ab")) for name in self.names}
            for name, file in self.files.items():
                file.truncate(sizes.get(name, 0))
                file.seek(0, os.SEEK_END)
            self._stack = stack.pop_all()
        return self

    def _recorded_sizes(self) -> dict[str, int]:
        try:
            record = json.loads((self.folder / _RECORD).read_bytes())
            sizes = {name: int(record["sizes"][name]) for name in self.names}
            if all((self.folder / name).stat().st_size >= size for name, size in sizes.items()):
                self.state = record["state"]
                return sizes
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {}

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, columns: Mapping[str, np.ndarray | bytes]) -> None:
        """Add to the end of each column."""
        for name, values in columns.items():
            with naming(self.folder / name):
                self.files[name].write(values if isinstance(values, bytes) else values.tobytes())

    def record(self, state: Any) -> None:
        """Make what was appended so far, and `state`, as JSON, what a later context continues from."""
        for name, file in self.files.items():
            with naming(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self.files.items()}
        write_file(self.folder / _RECORD, json.dumps({"sizes": sizes, "state": state}).encode())


def forget_progress(folder: Path) -> None:
    """Remove the record of columns that are complete."""
    (folder / _RECORD).unlink()
