"""The files that hold rows: text, JSON lines, JSON, Parquet and Arrow, also compressed.

At most one batch of rows, or 16 MiB of a text or JSON file, is in memory at a time; a longer line or row as a
whole.
"""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxllm.data.raw_rows import (
    Row,
    check_column,
    checked_object,
    checked_record,
    checked_text,
    decoded,
    without_bom,
)
from jaxllm.errors import DataError

_BLOCK = 16 * 2**20  # bytes
_TABLE_ROWS = 256  # of a batch of Parquet or Arrow
_SUFFIXES: tuple[str, ...] = (".txt", ".jsonl", ".json", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")
_LINES = _SUFFIXES[:3]  # which may be compressed
_LONGEST_ELEMENT = 16 * _BLOCK  # characters of an array's element; what is longer is taken for damage
_ARRAY_START, _NEXT_ELEMENT = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*")
_ARRAY_END = re.compile(r"\s*(\[\s*)?\]\s*")


def suffix(path: str) -> str:
    """`.txt` of `a.b.txt.gz`."""
    return os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1]


def can_read(path: str) -> bool:
    """Whether there is a reader for a file of this name."""
    return suffix(path) in (_LINES if path.endswith(_COMPRESSED) else _SUFFIXES)


def reader(path: str) -> Callable[[str, str | None], Iterator[Row]]:
    """The function that reads (path, text key) to rows. Raises DataError for a name that tells of none."""
    if not can_read(path):
        raise DataError(
            f"{path}: only {', '.join(_LINES)} files (also {' and '.join(_COMPRESSED)}), .parquet and .arrow "
            "files can be read"
        )
    readers = (_text_rows, _json_lines, _json_rows, _parquet_rows, _arrow_rows)
    return dict(zip(_SUFFIXES, readers, strict=True))[suffix(path)]


@contextmanager
def opened(path: str, decompress: bool = True) -> Iterator[tuple[Any, io.BufferedIOBase]]:
    """The file to read from, and the file on disk, whose position is the progress."""
    try:
        with open(path, "rb") as raw:
            yield (_decompressed(path, raw) if decompress else raw), raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is truncated or damaged ({error})") from error
    except OSError as error:
        if error.errno is None and path.endswith(".zst"):  # pyarrow's
            raise DataError(f"{path}: the zstd file is truncated or damaged ({error})") from error
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decompressed(path: str, raw: io.BufferedReader) -> Any:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".zst"):
        import pyarrow

        stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 2**20)
    return raw


def _text_rows(path: str, text_key: str | None) -> Iterator[Row]:
    """The whole file as one document; a file larger than 16 MiB is cut at ends of lines."""
    with opened(path) as (file, raw):
        line = 1
        while block := file.read(_BLOCK):
            block += file.readline()
            row = checked_text(decoded(path, line, raw.tell(), block))
            as_record = text_key is None and row.value is not None
            yield row._replace(value={"text": row.value}) if as_record else row
            line += block.count(b"\n")


def _json_lines(path: str, text_key: str | None) -> Iterator[Row]:
    """One JSON object per line."""
    with opened(path) as (file, raw):
        for line, content in enumerate(file, 1):
            if content.strip(b"\xef\xbb\xbf \t\r\n"):
                yield _parsed_json(decoded(path, line, raw.tell(), content), text_key)


def _parsed_json(row: Row, text_key: str | None) -> Row:
    if row.value is None:
        return row
    try:
        return checked_object(row, json.loads(without_bom(row.value).rstrip("\n")), text_key)
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
            unread = check_column(path, file.schema_arrow.names, text_key)
            for batch in file.iter_batches(
                batch_size=_TABLE_ROWS, columns=None if text_key is None else [text_key]
            ):
                for i in range(batch.num_rows):
                    row += 1
                    done = size * row // file.metadata.num_rows
                    yield checked_record(Row(f"{path}:{row}", done, "", unread=unread), batch, i, text_key)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the parquet file is damaged ({str(error).splitlines()[0]})") from error


def _arrow_rows(path: str, text_key: str | None) -> Iterator[Row]:
    """Arrow's IPC format, as a stream (what datasets writes) or a file."""
    import pyarrow

    row = 0
    try:
        with pyarrow.memory_map(path) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            found: Any = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            names = found.schema.names
            unread = check_column(path, names, text_key)
            batches = map(found.get_batch, range(found.num_record_batches)) if is_file else found
            for batch in batches:
                table = batch if text_key is None else batch.select([text_key])
                for i in range(table.num_rows):
                    row += 1
                    yield checked_record(
                        Row(f"{path}:{row}", file.tell(), "", unread=unread), table, i, text_key
                    )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the arrow file is damaged ({str(error).splitlines()[0]})") from error


def _json_rows(path: str, text_key: str | None) -> Iterator[Row]:
    """One array of objects, however it is laid out; or one object per line."""
    with opened(path) as (file, _):
        start = without_bom(file.read(4096).decode("utf-8", "replace")).lstrip()
    return (_json_array if start.startswith("[") else _json_lines)(path, text_key)


def _json_array(path: str, text_key: str | None) -> Iterator[Row]:
    """The elements of one array, of which a block at a time is in memory. After one that is not JSON the
    others cannot be told apart."""
    decode = json.JSONDecoder().raw_decode
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    with opened(path) as (file, raw):
        text, at, line, ended, separator = "", 0, 1, False, _ARRAY_START
        while True:
            value, end, problem = None, 0, "Expecting ',' delimiter"
            if before := separator.match(text, at):
                try:
                    value, end = decode(text, before.end())
                except (ValueError, RecursionError) as error:
                    problem = getattr(error, "msg", str(error))
            if end in (0, len(text)) and not ended and len(text) - at < _LONGEST_ELEMENT:
                block = file.read(_BLOCK)
                ended = not block
                text, at = text[at:] + decoder.decode(block, final=ended), 0
                continue
            start = before.end() if before else at
            line += text.count("\n", at, start)
            row = Row(f"{path}:{line}", raw.tell(), "")
            if end in (0, len(text)):
                if not _ARRAY_END.fullmatch(text, at):
                    yield row.rejected("invalid JSON", problem if end == 0 else "the array does not end")
                return
            try:
                text[start:end].encode()
                yield checked_object(row, value, text_key)
            except UnicodeEncodeError as error:
                byte = ord(error.object[error.start]) - 0xDC00  # as surrogateescape writes it
                yield row.rejected("invalid UTF-8", f"byte 0x{byte:02x}")
            line += text.count("\n", start, end)
            at, separator = end, _NEXT_ELEMENT
