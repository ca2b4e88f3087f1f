"""Rows as formats read them: their columns renamed once, with an account of those that are not read."""

import base64
import datetime
import decimal
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.data.messages import FIELDS
from jaxllm.data.sources import BadRow, is_empty, nearest
from jaxllm.errors import ConfigError

_MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


class Record(dict[str, Any]):
    """The columns of a row that are not null: Arrow fills up the columns of some rows with null."""

    def __init__(self, row: Mapping[str, Any]):
        super().__init__((name, value) for name, value in row.items() if value is not None)
        self.row = dict(row)  # as it is, for rewards
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The column's value, as `dict.get`."""
        self._read.add(name)
        return super().get(name, default)

    def unread(self) -> tuple[str, ...]:
        """The columns that hold something and were not looked up, and `COLUMN.FIELD` of messages."""
        found: dict[str, None] = {}
        for name, value in self.items():
            if name not in self._read:
                found |= {} if is_empty(value) else {name: None}
            elif name in _MESSAGE_COLUMNS and isinstance(value, list):
                found |= {
                    f"{name}.{key}": None
                    for each in value
                    if isinstance(each, Mapping)
                    for key, field in each.items()
                    if key not in FIELDS and not is_empty(field) and not is_tool_name(key, each)
                }
        return tuple(found)


def is_tool_name(key: str, message: Mapping[str, Any]) -> bool:
    """Whether a field says which tool a message is the result of; of other messages a name is not read."""
    return key == "name" and message.get("role") == "tool"


def json_value(value: Any) -> Any:
    """What a column holds that JSON has no type for, as text (`default=` of `json.dumps`): times in ISO 8601,
    decimals as they are written, bytes as UTF-8 or else base64. Raises TypeError for anything else."""
    match value:
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta() | decimal.Decimal() | uuid.UUID():
            return str(value)
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return base64.b64encode(value).decode()
        case np.ndarray() | np.generic():
            return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


class Rename:
    """A config's `rename`, applied to one row after the other, and which of its entries have found something.

    An entry THEIRS=OURS gives a column, or a field of messages, another name. THEIRS may lead into a column,
    as in `reward_model.ground_truth=answer`; that column stays too. All entries apply at once, so that they
    can swap two columns.
    """

    def __init__(self, entries: Sequence[str], field: str = "data.rename"):
        """`field` is what error messages call it. Raises ConfigError where an entry is not THEIRS=OURS."""
        check_rename(entries, field)
        self._field = field
        self._names = [(theirs, ours) for theirs, _, ours in (entry.partition("=") for entry in entries)]
        self._fields = {theirs: ours for theirs, ours in self._names if ours in FIELDS}
        self._unmatched = dict.fromkeys(theirs for theirs, _ in self._names)
        self._known: dict[str, None] = {}  # columns, and those within them, while an entry is unmatched

    def named(self, error: BadRow) -> BadRow:
        """An error of a row, whose hint names the user's field; it has no hint where there is none."""
        if not self._field:
            return BadRow(error.problem, error.detail.partition("; set data.rename")[0])
        return BadRow(error.problem, error.detail.replace("data.rename", self._field))

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under this project's names. Raises BadRow where two columns would have one name."""
        if not self._names:
            return dict(row)
        if self._unmatched:
            inner = [f"{name}.{key}" for name, at in row.items() if isinstance(at, dict) for key in at]
            self._known |= dict.fromkeys([*row, *inner])
        moved = [(theirs, ours, _at(row, theirs)) for theirs, ours in self._names]
        taken = {theirs for theirs, _ in self._names}
        renamed = {name: value for name, value in row.items() if name not in taken}
        for theirs, ours, found in moved:
            for value in found:
                self._unmatched.pop(theirs, None)
                if renamed.get(ours) is None:
                    renamed[ours] = value
                elif value is not None and value != renamed[ours]:
                    raise BadRow(
                        "two columns of one name", f"{self._field} makes {theirs!r} a second {ours!r}"
                    )
        if self._fields:
            for name in _MESSAGE_COLUMNS:
                if isinstance(value := renamed.get(name), list):
                    renamed[name] = [self._message(each) for each in value]
        return renamed

    def _message(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        for theirs in self._fields.keys() & message.keys():
            self._unmatched.pop(theirs, None)
        return {self._fields.get(name, name): value for name, value in message.items()}

    def found(self) -> dict[str, list[str]]:
        """What `merge` takes: the entries that matched, and the columns of the rows while some did not."""
        return {
            "matched": [theirs for theirs, _ in self._names if theirs not in self._unmatched],
            "known": list(self._known) if self._unmatched else [],
        }

    def merge(self, found: Mapping[str, Sequence[str]]) -> None:
        """Count the rows to which another Rename of the same entries was applied."""
        for theirs in found["matched"]:
            self._unmatched.pop(theirs, None)
        self._known |= dict.fromkeys(found["known"])

    def problem(self) -> str:
        """The entries that matched nothing in any row so far, as the end of an error message; else empty."""
        if not (self._unmatched and self._known):
            return ""
        hint = nearest(next(iter(self._unmatched)), list(self._known))
        return f"{self._field}: no row that was read has {', '.join(map(repr, self._unmatched))}{hint}"

    def check(self) -> None:
        """Raise ConfigError where an entry matched nothing in any row."""
        if problem := self.problem():
            raise ConfigError(problem)


def check_rename(entries: Sequence[str], field: str = "data.rename") -> None:
    """Raise ConfigError, which names the field, where an entry is not THEIRS=OURS."""
    for entry in entries:
        theirs, equals, ours = entry.partition("=")
        if not (theirs and equals and ours):
            raise ConfigError(f"{field} has {entry!r}; write THEIRS=OURS, such as question=prompt")


def _at(row: Mapping[str, Any], path: str) -> list[Any]:
    """The value of a column, or at a dotted path into one; an empty list where there is none."""
    if path in row:
        return [row[path]]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return []
        value = value[name]
    return [value]
