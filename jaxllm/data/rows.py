"""Rows of a source as token sequences, with an account of the rows that cannot be used.

The config decides whether a bad row stops the run or is dropped. No row is dropped silently: all are counted
by reason and written to `bad_rows.jsonl`.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash

from jaxllm.data.held_out import canonical, is_held_out, read_keys, text_key
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

    def hold_out(self, parts: "list[Examples]") -> "tuple[list[list[Example]], list[list[Example]]]":
        """The rows to train on, a list per train source, and the rows to validate on, without empty lists.

        `parts`: the sources in the order of `splits`. Raises DataError where rows should be held out and the
        sources are too small.
        """
        count = len(self.train)
        train, held_out = zip(*(part.split(self.held_out_fraction) for part in parts[:count]), strict=True)
        validation = [rows for rows in (*held_out, *(part.rows for part in parts[count:])) if rows]
        if self.held_out_fraction and not validation:
            raise nothing_held_out(self.validation_fraction)
        return list(train), validation

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


class Example(NamedTuple):
    """The token sequences of one row, and the key by which it is held out."""

    ids: tuple[np.ndarray, ...]  # int32, one array per sequence
    loss_mask: tuple[np.ndarray, ...]  # bool, of the same lengths: whether a token is a target
    group: str  # the question, or the whole text: rows of one group are held out together
    kind: str  # the format that the row was read as, for the report
    numbers: tuple[float, ...] = ()
    row: Mapping[str, Any] | None = None  # the record itself, where rewards need it
    unread: tuple[str, ...] = ()  # columns that hold something and are not read
    turns: tuple[str, ...] = ()  # every user message: trained on only if none of them is a held-out question

    @property
    def content(self) -> bytes:
        """Equal for two rows that are the same in all that training and evaluation see of them."""
        arrays = (*self.ids, *self.loss_mask, np.array([len(self.ids), *self.numbers]))
        record = b"" if self.row is None else json.dumps(self.row, sort_keys=True, default=str).encode()
        return (
            b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
            + self.group.encode("utf-8", "replace")
            + record
        )


@dataclass(frozen=True)
class Examples:
    """All usable rows of one source."""

    name: str
    rows: list[Example]
    counts: SourceCounts
    fingerprint: str  # a hash of every token and number

    def describe(self) -> str:
        """One line of the start-up report: rows read, kept and dropped, their formats, their tokens."""
        kinds = ", ".join(f"{n:,} [{kind}]" for kind, n in Counter(row.kind for row in self.rows).items())
        text = f"{self.name}: {self.counts}; formats: {kinds}; {self.counts.tokens:,} tokens"
        for_rewards = self.rows[0].row is not None
        text += self.counts.describe_unread(*["columns for rewards only"] if for_rewards else [])
        too_long = sum(n for reason, n in self.counts.dropped.items() if reason.startswith(TOO_LONG))
        if too_long > 0.2 * self.counts.rows:
            fraction = too_long / self.counts.rows
            text += f"\nwarning: {fraction:.0%} of the rows of {self.name} are {TOO_LONG}; raise it"
        held_out = self.counts.dropped.get(HELD_OUT, 0) / self.counts.rows
        if held_out > 0.2:
            text += (
                f"\nwarning: {held_out:.0%} of the rows of {self.name} are not trained on: "
                f"data.validation, data.held_out or another source holds out their question"
            )
        return text

    def without(self, problems: Sequence[str]) -> "Examples":
        """The rows whose problem is "". The others are counted by it.

        Repeated held-out rows do not change what is trained on, and therefore not the fingerprint.
        """
        if not any(problems):
            return self
        rows = [row for row, problem in zip(self.rows, problems, strict=True) if not problem]
        dropped = Counter(self.counts.dropped) + Counter(filter(None, problems))
        tokens = sum(len(ids) for row in rows for ids in row.ids)
        counts = replace(self.counts, dropped=dict(dropped), documents=len(rows), tokens=tokens)
        fingerprint = self.fingerprint
        if held_out := [i for i, problem in enumerate(problems) if problem == HELD_OUT]:
            fingerprint = xxhash.xxh3_128_hexdigest(f"{fingerprint} without {held_out}".encode())
        return replace(self, rows=rows, counts=counts, fingerprint=fingerprint)

    def split(self, held_out_fraction: float) -> tuple[list[Example], list[Example]]:
        """(train, held out), by a hash of the group, so that it does not depend on any other row."""
        sides: tuple[list[Example], list[Example]] = ([], [])
        for row in self.rows:
            sides[is_held_out(row.group, held_out_fraction)].append(row)
        return sides


def read_examples(
    source: Source,
    encode: Callable[[Any], Example],
    policy: BadRowPolicy,
    bad_rows: list[str] | None = None,
) -> Examples:
    """Every row of `source` through `encode`, which raises BadRow for a row that it cannot use. For each of
    these a line of bad_rows.jsonl is appended to `bad_rows`.

    Raises DataError where the policy does not allow the bad rows, or no row is left.
    """
    counts, rows, content = SourceCounts(), [], xxhash.xxh3_128()
    bad_rows = [] if bad_rows is None else bad_rows
    for row in source.rows():
        counts.rows += 1
        example = None
        if row.value is not None:
            try:
                example = encode(row.value)
                example = example._replace(group=canonical(example.group))
            except BadRow as error:
                row = row.rejected(error.problem, error.detail, fault=error.fault)
        if example is None:
            counts.drop(row)
            bad_rows.append(bad_row_line(row))
            if policy.on_bad_row == "stop" or counts.rows % ENOUGH_ROWS == 0:
                counts.check(source.name, policy)
            continue
        rows.append(example._replace(unread=()))
        counts.leave_unread(example.unread)
        counts.tokens += sum(map(len, example.ids))
        content.update(example.content)
    counts.documents = len(rows)
    counts.check(source.name, policy)
    if not rows:
        raise DataError(f"{source.name} has no usable row: {counts}")
    return Examples(source.name, rows, counts, content.hexdigest())


def write_bad_rows(lines: Sequence[str], folder: Path) -> None:
    """Write the lines of all sources to `bad_rows.jsonl`, in place of those of an earlier start."""
    (folder / "bad_rows.jsonl").unlink(missing_ok=True)
    if any(lines):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "bad_rows.jsonl", "".join(lines))


def read_sources(
    config: RecordConfig, encode: Callable[[Record], Example], *, seed: int, run_folder: Path | None
) -> list[Examples]:
    """`read_examples` of every source of the config, without training rows that ask what is held out.

    Bad rows are written to `run_folder`. Raises ConfigError where an entry of `data.rename` matches nothing
    in any source.
    """
    rename = Rename(config.rename)

    def encode_row(row: Mapping[str, Any]) -> Example:
        record = Record(rename(row))
        return encode(record)._replace(unread=record.unread())

    sources = (config.open(name, split, text_key=None, seed=seed) for name, split in config.splits)
    bad_rows: list[str] = []
    try:
        parts = [read_examples(source, encode_row, config.bad_row_policy, bad_rows) for source in sources]
    except DataError as error:
        raise DataError("; ".join(filter(None, [str(error), rename.problem()]))) from error
    finally:  # also where they stop the run
        if run_folder is not None:
            write_bad_rows(bad_rows, run_folder)
    rename.check()
    named = read_keys(config.held_out or (), synthetic_rows=config.synthetic_rows, seed=seed)
    return keep_apart(parts, len(config.train), config.held_out_fraction, named)


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


def keep_apart(parts: list[Examples], num_train: int, fraction: float, named: set[int]) -> list[Examples]:
    """The sources without training rows that ask a held-out question, and without repeated held-out rows.

    Held out are, besides the questions `named` by their keys, those of every row that is evaluated: the
    fraction of the first `num_train` sources, and all of the others. Without overlap nothing changes, nor
    does a fingerprint. Raises DataError where a source has no row left to train on.
    """
    sides = [
        [i >= num_train or is_held_out(row.group, fraction) for row in part.rows]
        for i, part in enumerate(parts)
    ]
    evaluated = (
        row
        for part, side in zip(parts, sides, strict=True)
        for row, is_evaluated in zip(part.rows, side, strict=True)
        if is_evaluated
    )
    held_out = named | {text_key(text) for row in evaluated for text in (row.group, *row.turns[:1])}
    seen: set[bytes] = set()

    def problem(row: Example, is_evaluated: bool) -> str:
        if not is_evaluated:
            return "" if held_out.isdisjoint(map(text_key, {row.group, *row.turns})) else HELD_OUT
        content = xxhash.xxh3_128_digest(row.content)
        repeated = content in seen
        seen.add(content)
        return REPEATED if repeated else ""

    found = []
    for part, side in zip(parts, sides, strict=True):
        problems = [problem(*each) for each in zip(part.rows, side, strict=True)]
        if HELD_OUT in problems and "" not in itertools.compress(problems, (not each for each in side)):
            raise nothing_to_train_on(part.name, problems.count(HELD_OUT))
        found.append(part.without(problems))
    return found
