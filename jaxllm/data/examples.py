"""Rows as token sequences in memory-mapped columns: which are held out, which dropped, and why."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jaxllm.data.held_out import text_key
from jaxllm.data.packing import TokenRow
from jaxllm.data.records import json_value
from jaxllm.data.rows import (
    HELD_OUT,
    REPEATED,
    TOO_LONG,
    DataConfig,
    SourceCounts,
    nothing_held_out,
    nothing_to_train_on,
)


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


# The columns of a cache besides its tokens and their offsets, each as long as its comment says.
COLUMNS: dict[str, str] = {
    "loss_mask": "bool",  # tokens
    "targets": "int64",  # sequences: tokens in the loss, of which the first is never one
    "num_sequences": "int64",  # rows, as all that follow, but turn_keys and records
    "group_hashes": "uint64",  # decides the side of a row: held_out.is_held_out
    "group_keys": "uint64",  # held_out.text_key
    "num_turns": "int64",
    "turn_keys": "uint64",  # text_key of every turn
    "contents": "V16",  # hashes of `Example.content`
    "kinds": "uint64",  # hashes of the names of the formats
    "record_lengths": "int64",
    "records": "uint8",  # numbers and row of each, as JSON
}


def as_columns(examples: Sequence[Example], contents: Sequence[bytes]) -> dict[str, np.ndarray | bytes]:
    """The COLUMNS of these examples, each with its `content`."""
    masks = [mask for each in examples for mask in each.loss_mask]
    records = [json.dumps([each.numbers, each.row], default=json_value).encode() for each in examples]
    values: dict[str, Sequence[Any]] = {
        "targets": [np.count_nonzero(mask[1:]) for mask in masks],
        "num_sequences": [len(each.ids) for each in examples],
        "group_hashes": [_hash(each.group) for each in examples],
        "group_keys": [text_key(each.group) for each in examples],
        "num_turns": [len(each.turns) for each in examples],
        "turn_keys": [text_key(turn) for each in examples for turn in each.turns],
        "kinds": [_hash(each.kind) for each in examples],
        "record_lengths": [len(record) for record in records],
    }
    return {name: np.array(each, COLUMNS[name]) for name, each in values.items()} | {
        "loss_mask": np.concatenate([np.empty(0, bool), *masks]),
        "contents": b"".join(map(xxhash.xxh3_128_digest, contents)),
        "records": b"".join(records),
    }


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))


class Columns:
    """The rows of a source: N tokens in S sequences, which belong to R rows."""

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        columns: Mapping[str, np.ndarray],
        kind_names: Iterable[str],
    ):
        """`tokens` [N], memory-mapped; `offsets` [S + 1]; the arrays of COLUMNS; the names of the kinds."""
        self.tokens, self.offsets = tokens, offsets
        self.loss_mask, self.targets, self.records = (
            columns[name] for name in ("loss_mask", "targets", "records")
        )
        self.group_hashes, self.group_keys = columns["group_hashes"], columns["group_keys"]
        self.turn_keys, self.contents, self.kinds = (
            columns[name] for name in ("turn_keys", "contents", "kinds")
        )
        self.sequence_starts, self.turn_starts, self.record_starts = (
            np.concatenate([[0], np.cumsum(columns[name])])
            for name in ("num_sequences", "num_turns", "record_lengths")
        )
        self.kind_names = {_hash(name): name for name in kind_names}

    def __len__(self) -> int:
        return len(self.kinds)

    def sequence(self, i: int) -> TokenRow:
        """Ids, int32, and loss mask of sequence i."""
        place = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[place].astype(np.int32), np.array(self.loss_mask[place])

    def numbers_and_row(self, i: int) -> tuple[tuple[float, ...], Mapping[str, Any] | None]:
        """What is stored of row i as JSON."""
        place = slice(self.record_starts[i], self.record_starts[i + 1])
        numbers, row = json.loads(self.records[place].tobytes())
        return tuple(numbers), row


@dataclass(frozen=True)
class Sequences(Sequence[TokenRow]):
    """The token sequences of some rows, each read when it is asked for."""

    columns: Columns
    index: np.ndarray  # int64 [S], which sequences of the columns

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Sequences(self.columns, self.index[i])
        return self.columns.sequence(int(self.index[i]))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]."""
        return np.diff(self.columns.offsets)[self.index]

    @property
    def num_targets(self) -> int:
        """Tokens in the loss."""
        return int(self.columns.targets[self.index].sum())


@dataclass(frozen=True)
class ExampleRows(Sequence[Example]):
    """Some rows of a source. An example is read when it is asked for; of its texts it has the kind alone."""

    columns: Columns
    index: np.ndarray  # int64 [R], which rows of the columns

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return ExampleRows(self.columns, self.index[i])
        row = int(self.index[i])
        first, end = self.columns.sequence_starts[row], self.columns.sequence_starts[row + 1]
        ids, masks = zip(*(self.columns.sequence(number) for number in range(first, end)), strict=True)
        numbers, record = self.columns.numbers_and_row(row)
        return Example(ids, masks, "", self.columns.kind_names[int(self.columns.kinds[row])], numbers, record)

    def take(self, mask: np.ndarray) -> "ExampleRows":
        """The rows where `mask` [R] is True."""
        return ExampleRows(self.columns, self.index[mask])

    @property
    def sequences(self) -> Sequences:
        """All their sequences, one after the other."""
        starts = self.columns.sequence_starts
        counts = starts[self.index + 1] - starts[self.index]
        before = np.cumsum(counts) - counts
        return Sequences(
            self.columns, np.arange(counts.sum()) + np.repeat(starts[self.index] - before, counts)
        )

    @property
    def kinds(self) -> dict[str, int]:
        """The number of rows of each kind, in the order of the first one."""
        kinds, first, counts = np.unique(
            self.columns.kinds[self.index], return_index=True, return_counts=True
        )
        return {self.columns.kind_names[int(kinds[i])]: int(counts[i]) for i in np.argsort(first)}

    def is_kind(self, kind: str) -> np.ndarray:
        """bool [R]."""
        return self.columns.kinds[self.index] == np.uint64(_hash(kind))

    def held_out(self, fraction: float) -> np.ndarray:
        """bool [R], `held_out.is_held_out` of each group."""
        return self.columns.group_hashes[self.index] < np.uint64(math.ceil(fraction * 2**64))


@dataclass(frozen=True)
class Examples:
    """All usable rows of one source."""

    name: str
    rows: ExampleRows
    counts: SourceCounts
    fingerprint: str  # a hash of every token and number

    def describe(self) -> str:
        """One line of the start-up report: rows read, kept and dropped, their formats, their tokens."""
        kinds = ", ".join(f"{n:,} [{kind}]" for kind, n in self.rows.kinds.items())
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

    def without(self, held_out: np.ndarray, repeated: np.ndarray) -> "Examples":
        """The rows that are neither; both are bool [R]. The others are counted.

        Repeated held-out rows do not change what is trained on, and therefore not the fingerprint.
        """
        if not (held_out.any() or repeated.any()):
            return self
        rows = self.rows.take(~(held_out | repeated))
        dropped = dict(self.counts.dropped)
        for reason, mask in ((HELD_OUT, held_out), (REPEATED, repeated)):
            if mask.any():
                dropped[reason] = dropped.get(reason, 0) + int(mask.sum())
        tokens = int(rows.sequences.lengths.sum())
        counts = replace(self.counts, dropped=dropped, documents=len(rows), tokens=tokens)
        fingerprint = self.fingerprint
        if held_out.any():
            places = np.flatnonzero(held_out).tolist()
            fingerprint = xxhash.xxh3_128_hexdigest(f"{fingerprint} without {places}".encode())
        return replace(self, rows=rows, counts=counts, fingerprint=fingerprint)

    def split(self, held_out_fraction: float) -> tuple[ExampleRows, ExampleRows]:
        """(train, held out), by a hash of the group, so that it does not depend on any other row."""
        held_out = self.rows.held_out(held_out_fraction)
        return self.rows.take(~held_out), self.rows.take(held_out)


def hold_out(config: DataConfig, parts: Sequence[Examples]) -> tuple[list[ExampleRows], list[ExampleRows]]:
    """The rows to train on, those of each train source, and the rows to validate on, without empty ones.

    `parts`: the sources in the order of `config.splits`. Raises DataError where rows should be held out and
    the sources are too small.
    """
    count = len(config.train)
    train, held_out = zip(*(part.split(config.held_out_fraction) for part in parts[:count]), strict=True)
    validation = [rows for rows in (*held_out, *(part.rows for part in parts[count:])) if len(rows)]
    if config.held_out_fraction and not validation:
        raise nothing_held_out(config.validation_fraction)
    return list(train), validation


def keep_apart(parts: list[Examples], num_train: int, fraction: float, named: set[int]) -> list[Examples]:
    """The sources without training rows that ask a held-out question, and without repeated held-out rows.

    Held out are, besides the questions `named` by their keys, those of every row that is evaluated: the
    fraction of the first `num_train` sources, and all of the others. Without overlap nothing changes, nor
    does a fingerprint. Raises DataError where a source has no row left to train on.
    """
    sides = [
        part.rows.held_out(fraction) if i < num_train else np.ones(len(part.rows), bool)
        for i, part in enumerate(parts)
    ]
    questions = [np.array([*named], np.uint64)]
    for part, evaluated in zip(parts, sides, strict=True):
        columns = part.rows.columns
        asking = evaluated & (np.diff(columns.turn_starts) > 0)
        questions += [columns.group_keys[evaluated], columns.turn_keys[columns.turn_starts[:-1][asking]]]
    held_out = np.unique(np.concatenate(questions))
    seen: set[bytes] = set()
    found = []
    for part, evaluated in zip(parts, sides, strict=True):
        columns = part.rows.columns
        asked = np.isin(columns.turn_keys, held_out)
        asked_before = np.concatenate([[0], np.cumsum(asked)])[columns.turn_starts]
        dropped = ~evaluated & (np.isin(columns.group_keys, held_out) | (np.diff(asked_before) > 0))
        if dropped.any() and not (~evaluated & ~dropped).any():
            raise nothing_to_train_on(part.name, int(dropped.sum()))
        repeated = np.zeros(len(part.rows), bool)
        for i in np.flatnonzero(evaluated):
            content = columns.contents[i].tobytes()
            repeated[i] = content in seen
            seen.add(content)
        found.append(part.without(dropped, repeated))
    return found
