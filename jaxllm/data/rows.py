"""Rows of a source made into token sequences, and an account of those that could not be.

What a row that cannot be used costs is the config's choice: the run, or the row. None is lost unseen: all are
counted by reason and written to `bad_rows.jsonl`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.sources import BadRow, Row, Source, open_source
from jaxllm.errors import ConfigError, DataError

TOO_LONG = "longer than data.sequence_length"
ENOUGH_ROWS = 1000  # to judge a source by, while it is still being read


@dataclass(frozen=True)
class DataConfig:
    """Which sources to read, and how much of them makes a batch. The stages add what is their own.

    A source is a file or glob (.txt, .jsonl, both also .gz, and .parquet), a folder saved by datasets'
    save_to_disk, `hf:NAME[:SUBSET[:SPLIT]]` on the Hugging Face hub, or `synthetic[:KIND]`.
    """

    train: tuple[str, ...]  # sources to learn from
    weights: tuple[float, ...]  # share of the batches, one a train source; empty: by their size
    validation: tuple[str, ...]  # sources to validate on; empty: hold out a part of each train source
    validation_fraction: float  # how much to hold out then; 0 validates on nothing
    synthetic_rows: int  # how many rows `synthetic` makes to learn from
    sequence_length: int  # tokens a row of the batch
    batch_size: int  # rows an optimiser step, over all devices
    on_bad_row: str  # "stop" at the first row that cannot be used, or "skip" it and write it down
    max_bad_fraction: float  # when skipping, a greater share of bad rows than this stops the run

    def __post_init__(self):
        if not self.train:
            raise ConfigError("data.train names no source")
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
    def roles(self) -> list[tuple[str, str]]:
        """(source, "train" or "validation") of all that is read."""
        return [(name, "train") for name in self.train] + [(name, "validation") for name in self.validation]

    @property
    def held_out_fraction(self) -> float:
        """What to hold out of each train source."""
        return 0.0 if self.validation else self.validation_fraction

    @property
    def bad_row_policy(self) -> "BadRowPolicy":
        return BadRowPolicy(self.on_bad_row, self.max_bad_fraction)

    def hold_out(self, parts: "list[Examples]") -> "tuple[list[list[Example]], list[list[Example]]]":
        """What to train on, a list a train source, and to validate on. `parts`: the sources as in `roles`.

        Raises DataError where something should be held out and the sources are too small.
        """
        count = len(self.train)
        train, held_out = zip(*(part.split(self.held_out_fraction) for part in parts[:count]), strict=True)
        validation = [rows for rows in (*held_out, *(part.rows for part in parts[count:])) if rows]
        if self.held_out_fraction and not validation:
            raise DataError(
                f"data.validation_fraction={self.validation_fraction} of the rows is too little to validate "
                f"on: raise it, name a validation source, or set it to 0"
            )
        return list(train), validation

    def open(self, name: str, role: str, *, text_key: str | None, seed: int) -> Source:
        """A source of this config; DataError naming the field where there is none."""
        rows = self.synthetic_rows
        if role == "validation":
            rows = max(1, round(rows * self.validation_fraction))
        try:
            return open_source(name, split=role, text_key=text_key, synthetic_rows=rows, seed=seed)
        except DataError as error:
            raise DataError(f"data.{role}: {error}") from error


@dataclass(frozen=True)
class BadRowPolicy:
    """What becomes of rows that cannot be used."""

    on_bad_row: str  # "stop" at the first, or "skip" them and write them down
    max_bad_fraction: float  # more than this share of bad rows stops the run all the same


@dataclass
class SourceCounts:
    """What was found in a source."""

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    faults: int = 0  # dropped rows that are somebody's mistake, rather than of no use to this run
    first_fault: str = ""
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def drop(self, row: Row) -> None:
        self.dropped[row.problem] = self.dropped.get(row.problem, 0) + 1
        if row.fault:
            self.faults += 1
            self.first_fault = self.first_fault or str(row)

    def judge(self, name: str, policy: BadRowPolicy) -> None:
        """Stop at the bad rows that the policy does not allow."""
        if self.faults and policy.on_bad_row == "stop":
            raise DataError(f"{self.first_fault}; mend the row, or set data.on_bad_row=skip")
        if self.faults > policy.max_bad_fraction * self.rows:
            raise DataError(
                f"{name}: {self.faults} of {self.rows} rows are bad, more than data.max_bad_fraction="
                f"{policy.max_bad_fraction}: mend them or raise it; the first: {self.first_fault}"
            )

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        dropped = f", {sum(self.dropped.values())} dropped ({reasons})" if reasons else ""
        return f"{self.rows:,} rows read, {self.documents:,} kept{dropped}"


def bad_row_line(row: Row) -> str:
    """The row's line in bad_rows.jsonl."""
    return json.dumps({"where": row.where, "reason": row.problem, "detail": row.detail}) + "\n"


@dataclass(frozen=True)
class Dataset:
    """What a stage trains and validates on: rows, any of which can be made from its number (see `loader`)."""

    train: tuple[Any, ...]  # one a train source
    weights: tuple[float, ...]  # their shares of the batches, or ()
    validation: tuple[Any, ...]  # may be ()
    fingerprint: str  # changes whenever a row or a weight does
    report: str  # what was read and what became of it, for people
    template: ChatTemplate | None = None  # of the conversations in it
    complete: Callable[[Any], Any] = lambda batch: batch  # fills in what only the devices can compute


class Example(NamedTuple):
    """What one row becomes: token sequences, and where it belongs."""

    ids: tuple[np.ndarray, ...]  # int32, one array a sequence
    loss_mask: tuple[np.ndarray, ...]  # bool, as long: whether a token is a target
    group: str  # rows that share it are held out together, such as those with one prompt
    kind: str  # how the row was understood, for the report
    numbers: tuple[float, ...] = ()
    row: Mapping[str, Any] | None = None  # the record itself, where something else will want to read it


@dataclass(frozen=True)
class Examples:
    """All that could be used of one source."""

    name: str
    rows: list[Example]
    counts: SourceCounts
    bad_rows: str  # lines of bad_rows.jsonl
    fingerprint: str  # of every token and number

    def describe(self) -> str:
        """Rows read, kept and left out, in which shapes, and their tokens."""
        kinds = ", ".join(f"{n:,} of {kind}" for kind, n in Counter(row.kind for row in self.rows).items())
        text = f"{self.name}: {self.counts}: {kinds}; {self.counts.tokens:,} tokens"
        too_long = sum(n for reason, n in self.counts.dropped.items() if reason.startswith(TOO_LONG))
        if too_long > 0.2 * self.counts.rows:
            text += f"\nwarning: {too_long / self.counts.rows:.0%} of {self.name} is {TOO_LONG}: raise it"
        return text

    def split(self, held_out_fraction: float) -> tuple[list[Example], list[Example]]:
        """Those to train on and those held out, by a hash of the group, the same whatever else is read."""
        threshold = held_out_fraction * 2**64
        sides: tuple[list[Example], list[Example]] = ([], [])
        for row in self.rows:
            sides[xxhash.xxh3_64_intdigest(row.group.encode("utf-8", "replace")) < threshold].append(row)
        return sides


def read_examples(source: Source, encode: Callable[[Any], Example], policy: BadRowPolicy) -> Examples:
    """Every row of `source` through `encode`, which raises BadRow for what it cannot use.

    Raises DataError where the policy does not allow the bad rows, or nothing is left.
    """
    counts, rows, bad_rows, content = SourceCounts(), [], [], xxhash.xxh3_128()
    for row in source.rows():
        counts.rows += 1
        if row.value is not None:
            try:
                example = encode(row.value)
            except BadRow as error:
                row = row.rejected(error.problem, error.detail, fault=error.fault)
        if row.value is None:
            counts.drop(row)
            bad_rows.append(bad_row_line(row))
            if policy.on_bad_row == "stop" or counts.rows % ENOUGH_ROWS == 0:
                counts.judge(source.name, policy)
            continue
        rows.append(example)
        counts.tokens += sum(map(len, example.ids))
        for array in (*example.ids, *example.loss_mask, np.array([len(example.ids), *example.numbers])):
            content.update(np.ascontiguousarray(array).tobytes())
        content.update(example.group.encode("utf-8", "replace"))
        if example.row is not None:
            content.update(json.dumps(example.row, sort_keys=True, default=str).encode())
    counts.documents = len(rows)
    counts.judge(source.name, policy)
    if not rows:
        raise DataError(f"{source.name} holds no row that can be used: {counts}")
    return Examples(source.name, rows, counts, "".join(bad_rows), content.hexdigest())


def write_bad_rows(lines: Sequence[str], folder: Path) -> None:
    """Write those of all sources into `bad_rows.jsonl`, if there are any."""
    if any(lines):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bad_rows.jsonl").write_text("".join(lines))


def read_sources(
    config: DataConfig, encode: Callable[[Any], Example], *, seed: int, run_folder: Path | None
) -> list[Examples]:
    """`read_examples` of every source of the config; what was left out is written to `run_folder`."""
    parts = [
        read_examples(config.open(name, role, text_key=None, seed=seed), encode, config.bad_row_policy)
        for name, role in config.roles
    ]
    if run_folder is not None:
        write_bad_rows([part.bad_rows for part in parts], run_folder)
    return parts
