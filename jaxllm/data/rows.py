"""Rows of a source as token sequences, with an account of the rows that cannot be used.

The config decides whether a bad row stops the run or is dropped. No row is dropped silently: all are counted
by reason and written to `bad_rows.jsonl`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from jaxllm.config import check_local
from jaxllm.data.records import Record, Rename, check_rename
from jaxllm.data.sources import BadRow, Row, Source, open_source
from jaxllm.errors import ConfigError, DataError
from jaxllm.files import write_text

TOO_LONG = "longer than data.sequence_length"
HELD_OUT = "whose question is held out"
REPEATED = "repeated in the held-out rows"
ENOUGH_ROWS = (
    1000  # max_bad_fraction is first checked after this many rows, before the source is read to its end
)
MOST_COLUMNS = 12  # named in the report

RowT = TypeVar("RowT", covariant=True)


class Rows(Protocol[RowT]):
    """A sequence of rows, each computed from its index alone: prompts, or the rows of a batch."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> RowT: ...


class BatchRows(Rows[RowT], Protocol[RowT]):
    """Rows of a batch: windows of text, packed conversations, pairs."""

    @property
    def sequence_length(self) -> int: ...

    def blank(self) -> RowT:
        """A row of weight 0, to fill up a batch with."""
        ...


RowsT = TypeVar("RowsT", bound=Rows[Any], covariant=True)


@dataclass(frozen=True)
class DataConfig:
    """Which sources to read, and how many of their rows form a batch. Each stage adds its own fields.

    A source is a file or glob (.txt, .jsonl, .json, also .gz and .zst; .parquet, .arrow), a folder saved by
    datasets' save_to_disk, `hf:NAME[:SUBSET[:SPLIT]]` on the Hugging Face hub (`hf-stream:` keeps no file of
    it), or `synthetic[:KIND]`.
    """

    train: tuple[str, ...]  # sources to train on
    weights: tuple[float, ...]  # each train source's share of the rows of a batch; empty: by their sizes
    validation: tuple[str, ...]  # sources to validate on; empty: hold out a part of each train source
    validation_fraction: float  # the part to hold out where `validation` is empty; 0: no validation
    synthetic_rows: int  # training rows that `synthetic` generates
    sequence_length: int  # tokens per row of the batch
    batch_size: int  # rows per optimizer step, over all devices
    on_bad_row: str  # "stop" at the first bad row, or "skip" it and write it to bad_rows.jsonl
    max_bad_fraction: float  # when skipping: stop the run if more than this fraction of rows is bad
    # Sources of `prompt`, `messages` or `text`, such as benchmarks: no row that asks the same is trained on.
    held_out: tuple[str, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if not self.train:
            raise ConfigError("data.train is empty; name at least one source")
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) <= 0):
            raise ConfigError(
                f"data.weights={self.weights} must be one positive number for each of the {len(self.train)} "
                f"train sources, or ()"
            )
        if self.on_bad_row not in ("stop", "skip"):
            raise ConfigError(f"data.on_bad_row={self.on_bad_row!r} must be 'stop' or 'skip'")
        for name in ("validation_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("synthetic_rows", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least 1")

    @property
    def splits(self) -> list[tuple[str, str]]:
        """(source, "train" or "validation") for every source, train sources first."""
        return [(name, "train") for name in self.train] + [(name, "validation") for name in self.validation]

    @property
    def held_out_fraction(self) -> float:
        """The fraction of each train source to hold out: 0 where `validation` names sources."""
        return 0.0 if self.validation else self.validation_fraction

    @property
    def bad_row_policy(self) -> "BadRowPolicy":
        return BadRowPolicy(self.on_bad_row, self.max_bad_fraction)

    def open(self, name: str, split: str, *, text_key: str | None, seed: int) -> Source:
        """A source of this config, as `open_source` opens it. Raises DataError that names the field."""
        rows = self.synthetic_rows
        if split == "validation":
            rows = max(1, round(rows * self.validation_fraction))
        try:
            return open_source(name, split=split, text_key=text_key, synthetic_rows=rows, seed=seed)
        except DataError as error:
            raise DataError(f"data.{split}: {error}") from error


@dataclass(frozen=True)
class RecordConfig(DataConfig):
    """Sources whose rows are records: conversations, pairs, prompts."""

    rename: tuple[str, ...]  # "THEIRS=OURS" for each column with another name, such as "question=prompt"
    template: str | None  # path of a Jinja chat template; None: the tokenizer's own
    template_options: tuple[str, ...] = field(default=(), kw_only=True)  # "NAME=VALUE", as `load_template`

    def __post_init__(self):
        super().__post_init__()
        check_local(self.template, "data.template")
        check_rename(self.rename)


def nothing_held_out(fraction: float) -> DataError:
    """The error for sources too small to hold out `fraction` of them."""
    return DataError(
        f"data.validation_fraction={fraction} of the train sources holds no row to validate on; raise it, "
        f"name a source in data.validation, or set it to 0"
    )


def nothing_to_train_on(name: str, rows: int) -> DataError:
    """The error for a train source all of whose rows are held out elsewhere."""
    return DataError(
        f"data.train: {name} has no row left to train on: data.validation, data.held_out or another source "
        f"holds out all {rows:,}; name other rows there"
    )


@dataclass(frozen=True)
class BadRowPolicy:
    """Which bad rows stop the run."""

    on_bad_row: str  # "stop" at the first one, or "skip" them
    max_bad_fraction: float  # a greater fraction of bad rows stops the run in either case


@dataclass
class SourceCounts:
    """The rows of a source in numbers. The fields are those of a token cache's meta.json."""

    rows: int = 0  # read, dropped ones included
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    faults: int = 0  # dropped because they are malformed, not merely of no use to this run
    first_fault: str = ""
    documents: int = 0  # kept
    text_bytes: int = 0
    tokens: int = 0
    unread: dict[str, int] = field(default_factory=dict)  # kept rows by the columns that are not read

    def drop(self, row: Row) -> None:
        self.dropped[row.problem] = self.dropped.get(row.problem, 0) + 1
        if row.fault:
            self.faults += 1
            self.first_fault = self.first_fault or str(row)

    def leave_unread(self, columns: Iterable[str]) -> None:
        for column in columns:
            self.unread[column] = self.unread.get(column, 0) + 1

    def add(self, other: "SourceCounts") -> None:
        """Count the rows of a later part of the source too."""
        for mine, theirs in ((self.dropped, other.dropped), (self.unread, other.unread)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for name in ("rows", "faults", "documents", "text_bytes", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_fault = self.first_fault or other.first_fault

    def describe_unread(self, what: str = "columns that are not read") -> str:
        """The columns, after `what`, the most frequent ones first; empty where there are none."""
        found = sorted(self.unread.items(), key=lambda item: -item[1])
        names = [
            name if count >= self.documents else f"{name} ({count:,} of {self.documents:,} rows)"
            for name, count in found[:MOST_COLUMNS]
        ]
        more = [f"{len(found) - MOST_COLUMNS} others"] if len(found) > MOST_COLUMNS else []
        return f"\n  {what}: {', '.join(names + more)}" if names else ""

    def check(self, name: str, policy: BadRowPolicy) -> None:
        """Raise DataError for malformed rows that the policy does not allow."""
        if self.faults and policy.on_bad_row == "stop":
            raise DataError(f"{self.first_fault}; fix the row, or set data.on_bad_row=skip")
        if self.faults > policy.max_bad_fraction * self.rows:
            raise DataError(
                f"{name}: {self.faults} of {self.rows} rows are bad, more than data.max_bad_fraction="
                f"{policy.max_bad_fraction}; fix them or raise it; the first: {self.first_fault}"
            )

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        dropped = f", {sum(self.dropped.values())} dropped ({reasons})" if reasons else ""
        return f"{self.rows:,} rows read, {self.documents:,} kept{dropped}"


def bad_row_line(row: Row) -> str:
    """The row's line in bad_rows.jsonl."""
    return json.dumps({"where": row.where, "reason": row.problem, "detail": row.detail}) + "\n"


@dataclass(frozen=True)
class Dataset(Generic[RowsT]):
    """The rows that a stage trains and validates on."""

    train: tuple[RowsT, ...]  # one per train source
    weights: tuple[float, ...]  # their shares of the rows of a batch, or ()
    validation: tuple[RowsT, ...]  # may be ()
    fingerprint: str  # a hash that changes whenever a row or a weight does
    report: str  # the start-up report: rows read, kept and dropped, tokens, an example
    # (params, batch) -> batch: adds fields that are computed on the devices.
    complete: Callable[[Any, Any], Any] = lambda params, batch: batch


def write_bad_rows(lines: Sequence[str], folder: Path) -> None:
    """Write the lines of all sources to `bad_rows.jsonl`, in place of those of an earlier start."""
    (folder / "bad_rows.jsonl").unlink(missing_ok=True)
    if any(lines):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "bad_rows.jsonl", "".join(lines))


def training_texts(
    config: RecordConfig, texts: Callable[[Record], Iterable[str]], *, seed: int
) -> Iterator[str]:
    """What `texts` gives of the rows of the train sources, to train a tokenizer on; rows for which it raises
    BadRow are left out. Raises DataError, with the first problem, where that is all of them."""
    rename = Rename(config.rename)
    found, problem = False, ""
    for name in config.train:
        for row in config.open(name, "train", text_key=None, seed=seed).rows():
            try:
                if row.value is None:
                    raise BadRow(row.problem, row.detail)
                made = list(texts(Record(rename(row.value))))
            except BadRow as error:
                problem = problem or f"; the first: {row.where}: {error}"
                continue
            found = True
            yield from made
    if not config.validation:  # else an entry may be for those sources alone
        rename.check()
    if not found:
        raise DataError(f"no row of data.train can be used{problem}")
