"""Documents and records as a stream of rows, from files, saved or hosted datasets, or the toy world.

Every row carries its place (`file:line`), and a row that cannot be read carries the reason, so that none is
dropped silently. At most one batch of rows, or 16 MiB of one text file, is in memory at a time.
"""

import difflib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import xxhash

from jaxllm.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

_TEXT_BLOCK = 16 * 2**20  # bytes
_SYNTHETIC_KINDS = ["documents", "chats", "drafts", "preferences", "problems", "additions"]
_SYNTHETIC_SAMPLE = 200  # rows that stand for all in the content hash of a synthetic source
_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


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


@dataclass(frozen=True)
class Source:
    """A stream of rows that can be read any number of times."""

    name: str  # as the user wrote it
    content_hash: str  # of everything that determines the rows
    size: int  # bytes of the files, or rows of a dataset: the total of a progress bar
    rows: Callable[[], Iterator[Row]]


def open_source(name: str, *, split: str, text_key: str | None, synthetic_rows: int, seed: int) -> Source:
    """Open the source `name`. Its rows are the texts under `text_key`, or whole records where that is None.

    `name` is a file or a glob of .txt, .jsonl (both also .gz) and .parquet; a folder saved by datasets;
    `hf:NAME`, `hf:NAME:SUBSET` or `hf:NAME:SUBSET:SPLIT` for the hub; or `synthetic` or `synthetic:KIND` for
    the toy world. `split` ("train" or "validation") is the one to read where the name chooses none. As a
    record, a .txt file or a synthetic document is `{"text": ...}`. Raises DataError.
    """
    if name.partition(":")[0] == "synthetic":
        return _synthetic_source(name, split, text_key, synthetic_rows, seed)
    if name.startswith("hf:"):
        return _dataset_source(name, _load_from_hub(name, split), text_key)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _dataset_source(name, _load_from_folder(path, split), text_key)
    return _files_source(name, _matching_files(path, name), text_key)


def check_source(name: str) -> None:
    """Raise DataError where `open_source` would find a missing file or an unknown kind. Reads no row and does
    not contact the hub."""
    path = os.path.expanduser(name)
    if name.partition(":")[0] == "synthetic":
        open_source(name, split="train", text_key=None, synthetic_rows=1, seed=0)
    elif not name.startswith("hf:") and not os.path.isdir(path):
        _matching_files(path, name)


def _files_source(name: str, paths: list[str], text_key: str | None) -> Source:
    content = xxhash.xxh3_128(repr(text_key).encode())
    for path in paths:
        content.update(f"{_suffix(path)} {os.path.getsize(path)}\n".encode())
        with _opened(path, decompress=False) as (file, _):
            while block := file.read(2**20):
                content.update(block)

    def rows() -> Iterator[Row]:
        before = 0
        for path in paths:
            row = None
            for row in _reader(path)(path, text_key):
                yield row._replace(done=before + row.done)
            before += os.path.getsize(path)
            if row is None:
                yield Row(f"{path}:1", before, "").rejected("empty file")

    return Source(name, content.hexdigest(), sum(map(os.path.getsize, paths)), rows)


def _matching_files(path: str, name: str) -> list[str]:
    paths = [path] if os.path.isfile(path) else []
    if not paths and glob.has_magic(path):
        paths = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not paths:
            raise DataError(f"no file matches {name!r}")
    for file in paths:
        _reader(file)  # fail on an unknown kind before anything is read
    if paths:
        return paths
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    known = [each for each in names if _suffix(each) in _SUFFIXES]
    raise DataError(f"{name!r} does not exist{nearest(os.path.basename(path), known)}")


_SUFFIXES = (".txt", ".jsonl", ".parquet")


def _suffix(path: str) -> str:
    """`.txt` of `a.b.txt.gz`."""
    return os.path.splitext(path.removesuffix(".gz"))[1]


def _reader(path: str) -> Callable[[str, str | None], Iterator[Row]]:
    readers = {".txt": _text_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    reader = readers.get(_suffix(path))
    if reader is None or path.endswith(".parquet.gz"):
        raise DataError(f"{path}: only .txt, .txt.gz, .jsonl, .jsonl.gz and .parquet files can be read")
    return reader


@contextmanager
def _opened(path: str, decompress: bool = True) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """The file to read from, and the file on disk, whose position is the progress."""
    try:
        with open(path, "rb") as raw:
            yield (gzip.GzipFile(fileobj=raw) if decompress and path.endswith(".gz") else raw), raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is truncated or damaged ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _text_rows(path: str, text_key: str | None) -> Iterator[Row]:
    """The whole file as one document; a file larger than 16 MiB is cut at ends of lines."""
    with _opened(path) as (file, raw):
        line = 1
        while block := file.read(_TEXT_BLOCK):
            block += file.readline()
            row = _checked_text(_decoded(path, line, raw.tell(), block))
            as_record = text_key is None and row.value is not None
            yield row._replace(value={"text": row.value}) if as_record else row
            line += block.count(b"\n")


def _json_rows(path: str, text_key: str | None) -> Iterator[Row]:
    """One JSON object per line."""
    with _opened(path) as (file, raw):
        for line, content in enumerate(file, 1):
            if content.strip(b"\xef\xbb\xbf \t\r\n"):
                yield _parsed_json(_decoded(path, line, raw.tell(), content), text_key)


def _parsed_json(row: Row, text_key: str | None) -> Row:
    if row.value is None:
        return row
    try:
        return _checked_object(row, json.loads(without_bom(row.value).rstrip("\n")), text_key)
    except json.JSONDecodeError as error:
        return row.rejected("invalid JSON", f"{error.msg}: column {error.colno}")
    except (ValueError, RecursionError) as error:  # too many digits in a number, too many brackets
        return row.rejected("invalid JSON", str(error))


def _parquet_rows(path: str, text_key: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    size = os.path.getsize(path)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            unread = _check_column(path, file.schema_arrow.names, text_key)
            for batch in file.iter_batches(batch_size=256, columns=None if text_key is None else [text_key]):
                for i in range(batch.num_rows):
                    row += 1
                    done = size * row // file.metadata.num_rows
                    yield _checked_record(Row(f"{path}:{row}", done, "", unread=unread), batch, i, text_key)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the parquet file is damaged ({str(error).splitlines()[0]})") from error


def _dataset_source(name: str, dataset: "datasets.Dataset", text_key: str | None) -> Source:
    """A Hugging Face dataset, read as Arrow batches so that no row is decoded twice."""
    unread = _check_column(name, dataset.column_names, text_key)
    content = xxhash.xxh3_128(f"{text_key} {len(dataset)}\n".encode())
    for file in dataset.cache_files:
        with _opened(file["filename"], decompress=False) as (opened, _):
            while block := opened.read(2**20):
                content.update(block)
    if not dataset.cache_files:  # held in memory only
        content.update(dataset._fingerprint.encode())
    table = (dataset if text_key is None else dataset.select_columns([text_key])).with_format("arrow")

    def rows() -> Iterator[Row]:
        row = 0
        for batch in cast("Iterator[pyarrow.Table]", table.iter(batch_size=256)):
            for i in range(batch.num_rows):
                row += 1
                yield _checked_record(Row(f"{name}:{row}", row, "", unread=unread), batch, i, text_key)

    return Source(name, content.hexdigest(), len(dataset), rows)


def _load_from_folder(path: str, split: str) -> "datasets.Dataset":
    if not any(os.path.exists(os.path.join(path, mark)) for mark in _DATASET_MARKS):
        raise DataError(
            f"{path} is a folder, but not a dataset saved by save_to_disk; for a folder of files "
            f"give a glob such as '{path.rstrip('/')}/*.txt'"
        )
    import datasets

    try:
        return _one_split(path, datasets.load_from_disk(path), split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the saved dataset cannot be read ({_first_line(error)})") from error


def _load_from_hub(name: str, split: str) -> "datasets.Dataset":
    import datasets

    repository, subset, chosen = [*name.removeprefix("hf:").split(":"), "", ""][:3]
    try:
        loaded = datasets.load_dataset(repository, subset or None)
    except Exception as error:  # the hub's client raises a dozen types, from time-outs to missing subsets
        raise DataError(f"{name}: cannot be loaded from the hub ({_first_line(error)})") from error
    return _one_split(name, loaded, chosen or split)


def _one_split(name: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _synthetic_source(name: str, split: str, text_key: str | None, count: int, seed: int) -> Source:
    from jaxllm import toy_world

    kind = name.partition(":")[2] or "documents"
    if kind not in _SYNTHETIC_KINDS:
        raise DataError(f"{name!r} does not exist{nearest(kind, _SYNTHETIC_KINDS)}")
    generate = getattr(toy_world, kind)

    def rows() -> Iterator[Row]:
        for i, made in enumerate(generate(split, count=count, seed=seed), 1):
            record = {"text": made} if kind == "documents" else made
            yield _checked_object(Row(f"{name}:{i}", i, ""), record, "text" if text_key is not None else None)

    # Generating every row only to hash it would take seconds at each start, so the first rows and the word
    # lists stand for all.
    content = xxhash.xxh3_128(f"{kind} {split} {count} {seed} {text_key is None}\n".encode())
    for made in generate(split, count=min(count, _SYNTHETIC_SAMPLE), seed=seed):
        content.update(json.dumps(made).encode())
    for file in sorted(Path(toy_world.__file__).parent.rglob("*.txt")):
        content.update(file.read_bytes())
    return Source(name, content.hexdigest(), count, rows)


def _decoded(path: str, line: int, done: int, content: bytes) -> Row:
    """The row of bytes that start at `line`."""
    try:
        return Row(f"{path}:{line}", done, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad_line = line + content.count(b"\n", 0, error.start)
        return Row(f"{path}:{bad_line}", done, "").rejected(
            "invalid UTF-8", f"byte 0x{content[error.start]:02x}"
        )


def _checked_object(row: Row, value: Any, text_key: str | None) -> Row:
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
    return _checked_text(row._replace(value=text, unread=row.unread or others))


def _checked_record(
    row: Row, table: "pyarrow.RecordBatch | pyarrow.Table", i: int, text_key: str | None
) -> Row:
    """`row` with row `i` of an Arrow table."""
    try:
        return _checked_object(row, table.slice(i, 1).to_pylist()[0], text_key)
    except UnicodeDecodeError as error:
        return row.rejected("invalid UTF-8", f"byte 0x{error.object[error.start]:02x}")


def _checked_text(row: Row) -> Row:
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


def _check_column(where: str, names: list[str], text_key: str | None) -> tuple[str, ...]:
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
