"""One row of a source: its text or record, or the reason why it cannot be used."""

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.errors import DataError

if TYPE_CHECKING:
    import pyarrow


class Row(NamedTuple):
    """One document or record, or the reason why it cannot be used."""

    where: str  # "file:line"
    done: int  # progress: the part of `Source.size` up to and including this row
    value: Any  # the text, or the whole record where the source was opened without a text key; None: unusable
    problem: str = ""  # the kind of problem, where value is None: rows are counted by it
    detail: str = ""  # what is special to this row
    fault: bool = True  # False: the row is well-formed, but of no use to this run
    unread: tuple[str, ...] = ()  # the columns besides the text key, where the source was opened with one

    def rejected(self, problem: str, detail: str = "", fault: bool = True) -> "Row":
        return self._replace(value=None, problem=problem, detail=detail, fault=fault)

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (f" ({self.detail})" if self.detail else "")


class BadRow(Exception):
    """Why a row cannot be used. Raised where rows are interpreted, caught where they are counted."""

    def __init__(self, problem: str, detail: str = "", *, fault: bool = True):
        super().__init__(problem + (f" ({detail})" if detail else ""))
        self.problem, self.detail, self.fault = problem, detail, fault  # as in Row


def decoded(path: str, line: int, done: int, content: bytes) -> Row:
    """The row of bytes that start at `line`."""
    try:
        return Row(f"{path}:{line}", done, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad_line = line + content.count(b"\n", 0, error.start)
        return Row(f"{path}:{bad_line}", done, "").rejected(
            "invalid UTF-8", f"byte 0x{content[error.start]:02x}"
        )


def checked_object(row: Row, value: Any, text_key: str | None) -> Row:
    """`row` with a JSON value, which must be an object, or with the text that it has under `text_key`."""
    if not isinstance(value, dict):
        return row.rejected("wrong type", f"the row is {json_type(value)}, not an object")
    value = {without_bom(name): each for name, each in value.items()}
    if text_key is None:
        return row._replace(value=value)
    if text_key not in value:
        return row.rejected("missing key", f"no {text_key!r}{nearest(text_key, list(value))}")
    text = value[text_key]
    if not isinstance(text, str):
        return row.rejected("wrong type", f"{text_key!r} is {json_type(text)}, not a string")
    others = tuple(name for name, each in value.items() if name != text_key and not is_empty(each))
    return checked_text(row._replace(value=text, unread=row.unread or others))


def checked_record(
    row: Row, table: "pyarrow.RecordBatch | pyarrow.Table", i: int, text_key: str | None
) -> Row:
    """`row` with row `i` of an Arrow table."""
    try:
        return checked_object(row, table.slice(i, 1).to_pylist()[0], text_key)
    except UnicodeDecodeError as error:
        return row.rejected("invalid UTF-8", f"byte 0x{error.object[error.start]:02x}")


def checked_text(row: Row) -> Row:
    if row.value is None:
        return row
    text = without_bom(row.value)
    return row._replace(value=text) if text.strip() else row.rejected("empty text")


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def without_bom(text: str) -> str:
    """The text without the byte-order marks that begin a file, and a line where files were joined."""
    return text.replace("\n\ufeff", "\n").removeprefix("\ufeff")


def check_column(where: str, names: list[str], text_key: str | None) -> tuple[str, ...]:
    """The columns besides the text key. Raises DataError where there is no such column."""
    if text_key is None:
        return ()
    if text_key not in names:
        raise DataError(f"{where}: no column {text_key!r}{nearest(text_key, names)}; set text_key")
    return tuple(name for name in names if name != text_key)


def json_type(value: Any) -> str:
    """The JSON type of a value in words: "an object", "a list", ..."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def nearest(wanted: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or the known ones."""
    if matches := difflib.get_close_matches(wanted, known, n=1, cutoff=0.5):
        return f"; did you mean {matches[0]!r}?"
    return f"; available: {', '.join(map(repr, known[:8]))}" if known else ""
