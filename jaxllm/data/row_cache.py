"""Conversations, pairs and prompts tokenized once: the rows of a source as memory-mapped columns.

A cache is a folder in `files.cache_folder()` whose name is a hash of the source's content, the tokenizer, the
chat template, every field of the config that could change a row, and the code that reads rows: an edited
format is read anew.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jaxllm import toy_world
from jaxllm.caches import read_or_build, remove
from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.examples import COLUMNS, Columns, Example, ExampleRows, Examples, as_columns, keep_apart
from jaxllm.data.held_out import canonical, read_keys
from jaxllm.data.records import Record, Rename
from jaxllm.data.rows import BadRowPolicy, RecordConfig, SourceCounts, bad_row_line, write_bad_rows
from jaxllm.data.source_cache import (
    BAD_ROWS,
    Part,
    complete,
    drop_unusable,
    id_dtype,
    in_batches,
    mapped,
    mapped_tokens,
    write_source,
)
from jaxllm.data.sources import BadRow, Row, Source
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError, DataError
from jaxllm.files import cache_folder

_BATCH_CHARACTERS, _BATCH_ROWS = 4_000_000, 1000  # encoded at a time
_NOTES, _CONTENT = "notes.jsonl", "content"  # what a part of the rows had; all that the fingerprint hashes

# The fields of a config that change no encoded row, but which rows are read and what is done with them.
NOT_ENCODED = frozenset(
    (
        "train",
        "weights",
        "validation",
        "validation_fraction",
        "synthetic_rows",
        "batch_size",
        "on_bad_row",
        "max_bad_fraction",
        "held_out",
        "template",  # a path: its content counts
        "packing",
        "reference",
    )
)


class Encoder(NamedTuple):
    """How the records of a config become examples."""

    encode: Callable[[Record], Example]  # picklable, to be called in other processes
    tokenizer: BaseTokenizer
    template: ChatTemplate
    options: Any = None  # what `encode` depends on besides these and the config

    def identity(self, config: RecordConfig) -> tuple[Any, ...]:
        """All that an example depends on besides its record."""
        read = {field.name: getattr(config, field.name) for field in fields(config)}
        kept = sorted((name, value) for name, value in read.items() if name not in NOT_ENCODED)
        template = type(self.template).__name__, self.template.source, self.template.clock
        function = getattr(self.encode, "func", self.encode)
        return (self.tokenizer.hash, template, function.__module__, function.__qualname__, self.options, kept)


def read_sources(
    config: RecordConfig, encoder: Encoder, *, seed: int, run_folder: Path | None
) -> list[Examples]:
    """`cached_examples` of every source of the config, without training rows that ask what is held out.

    Bad rows are written to `run_folder`. Raises ConfigError where an entry of `data.rename` matches nothing
    in any source.
    """
    rename = Rename(config.rename)
    sources = (config.open(name, split, text_key=None, seed=seed) for name, split in config.splits)
    bad_rows: list[str] = []
    try:
        parts = [cached_examples(source, config, encoder, rename, bad_rows) for source in sources]
    except DataError as error:
        raise DataError("; ".join(filter(None, [str(error), rename.problem()]))) from error
    finally:  # also where they stop the run
        if run_folder is not None:
            write_bad_rows(bad_rows, run_folder)
    rename.check()
    named = read_keys(config.held_out or (), synthetic_rows=config.synthetic_rows, seed=seed)
    return keep_apart(parts, len(config.train), config.held_out_fraction, named)


def cached_examples(
    source: Source, config: RecordConfig, encoder: Encoder, rename: Rename, bad_rows: list[str]
) -> Examples:
    """The rows of `source`, from the cache if it has them, else encoded now. A row for which the encoder
    raises BadRow is dropped, and its line of bad_rows.jsonl appended to `bad_rows`.

    `rename` is told what matched. Raises DataError where the policy does not allow the bad rows, or no row is
    left.
    """
    tokenizer, policy = encoder.tokenizer, config.bad_row_policy
    identity = (code_hash(), source.content_hash, *encoder.identity(config))
    key = xxhash.xxh3_128_hexdigest(repr(identity).encode("utf-8", "surrogatepass"))

    def build(folder: Path) -> None:
        dtype = id_dtype(tokenizer.vocab_size)
        options = {"rename": tuple(config.rename), "dtype": dtype, "policy": policy}
        encode = functools.partial(encode_rows, encode=encoder.encode, **options)
        try:
            counts = write_source(folder, source, encode, (*COLUMNS, _NOTES, _CONTENT), policy, _batches)
        except (DataError, ConfigError):
            if (folder / _NOTES).exists():
                rename.merge(_merged(folder / _NOTES))
            drop_unusable(folder, bad_rows)
            raise
        with (folder / _CONTENT).open("rb") as file:
            fingerprint = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        meta = {
            "source": source.name,
            "dtype": dtype.name,
            "fingerprint": fingerprint,
            "sequences": (folder / "offsets").stat().st_size // 8 - 1,
            "notes": _merged(folder / _NOTES),
            "counts": asdict(counts),
        }
        complete(folder, meta)
        remove(folder / _CONTENT)

    read = functools.partial(_read, vocab_size=tokenizer.vocab_size)
    cache = read_or_build(cache_folder() / key, read, build, f"tokenize {source.name}")
    rename.merge(cache.notes)
    bad_rows.append(cache.bad_rows.read_text())
    cache.counts.check(source.name, policy)  # the cache may come from a run with a more lenient policy
    if not cache.counts.documents:
        raise DataError(f"{source.name} has no usable row: {cache.counts}")
    rows = ExampleRows(cache.columns, np.arange(len(cache.columns)))
    return Examples(source.name, rows, cache.counts, cache.fingerprint)


@dataclass(frozen=True)
class RowCache:
    """What a cache folder holds."""

    columns: Columns
    counts: SourceCounts
    fingerprint: str
    notes: Mapping[str, list[str]]  # as `_merged` returns them
    bad_rows: Path


@functools.cache
def code_hash() -> str:
    """A hash of the files that decide what a row is encoded as."""
    content = xxhash.xxh3_128()
    for folder in (Path(__file__).parent, Path(toy_world.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            content.update(file.read_bytes())
    return content.hexdigest()


def _read(folder: Path, vocab_size: int) -> RowCache | None:
    """The cache in `folder`; None where there is none, or a file is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts, notes = SourceCounts(**meta["counts"]), meta["notes"]
        tokens, offsets = mapped_tokens(folder, meta["dtype"], vocab_size, counts.tokens, meta["sequences"])
        sizes = {"loss_mask": counts.tokens, "targets": meta["sequences"], "turn_keys": None, "records": None}
        found = {
            name: mapped(folder / name, dtype, sizes.get(name, counts.documents))
            for name, dtype in COLUMNS.items()
        }
        columns = Columns(tokens, offsets, found, notes["kinds"])
        ends = columns.sequence_starts[-1], columns.turn_starts[-1], columns.record_starts[-1]
        if ends != (meta["sequences"], len(found["turn_keys"]), len(found["records"])):
            raise ValueError(f"{folder} has columns of other lengths than it counts")
        return RowCache(columns, counts, meta["fingerprint"], notes, folder / BAD_ROWS)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode_rows(
    rows: list[Row],
    *,
    encode: Callable[[Record], Example],
    rename: Sequence[str],
    dtype: np.dtype,
    policy: BadRowPolicy,
) -> Part:
    """The examples of a batch of rows, up to the first bad one if that stops the run."""
    counts, bad, renamed = SourceCounts(), [], Rename(rename)
    examples: list[Example] = []
    for row in rows:
        counts.rows += 1
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail, fault=row.fault)
            record = Record(renamed(row.value))
            example = encode(record)
        except BadRow as error:
            dropped = row.rejected(error.problem, error.detail, fault=error.fault)
            counts.drop(dropped)
            bad.append(bad_row_line(dropped))
            if counts.faults and policy.on_bad_row == "stop":
                break
            continue
        counts.leave_unread(record.unread())
        examples.append(example._replace(group=canonical(example.group)))
    sequences = [ids for each in examples for ids in each.ids]
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    counts.documents, counts.tokens = len(examples), int(lengths.sum())
    notes = {"kinds": list(dict.fromkeys(each.kind for each in examples)), **renamed.found()}
    contents = [each.content for each in examples]
    columns = as_columns(examples, contents) | {
        _NOTES: f"{json.dumps(notes)}\n".encode(),
        _CONTENT: b"".join(contents),
    }
    tokens = np.concatenate([np.empty(0, dtype), *sequences]).astype(dtype)
    return Part(counts, "".join(bad), tokens, lengths, columns, rows[-1].done)


def _merged(file: Path) -> dict[str, list[str]]:
    """The notes of all parts: kinds and known columns in their order, and the entries that matched."""
    merged: dict[str, dict[str, None]] = {"kinds": {}, "matched": {}, "known": {}}
    with file.open() as lines:
        for line in lines:
            for name, values in json.loads(line).items():
                merged[name] |= dict.fromkeys(values)
    return {name: list(values) for name, values in merged.items()}


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Lists of consecutive rows, of a few million characters each."""
    return in_batches(rows, lambda row: _characters(row.value), _BATCH_CHARACTERS, _BATCH_ROWS)


def _characters(value: Any) -> int:
    """How long the texts in a value are."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
