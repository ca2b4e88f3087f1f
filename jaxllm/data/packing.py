"""Whole sequences packed side by side into rows of one length, none of them cut."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.batches import TokenBatch

TokenRow = tuple[np.ndarray, np.ndarray]  # ids int32 [L], and the loss mask bool [L]

_OPEN_ROWS = 1000  # first fit looks at this many of the latest rows, so that it is linear in time


@dataclass(frozen=True)
class PackedRows:
    """A sequence of `TokenBatch` rows [T], each of one or more sequences that do not attend to each other."""

    sequences: Sequence[TokenRow]
    lengths: np.ndarray  # int64, of the sequences
    bins: list[list[int]]  # which of them share a row, in order
    sequence_length: int  # T
    pad_id: int

    @property
    def num_tokens(self) -> int:
        """Number of positions that are not padding."""
        return int((self.lengths - 1).sum())

    @property
    def padded_fraction(self) -> float:
        """The share of all positions that are padding."""
        return 1 - self.num_tokens / max(1, len(self) * self.sequence_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, i: int) -> TokenBatch:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = self.blank()
        start = 0
        for segment, index in enumerate(self.bins[i], 1):
            ids, loss_mask = self.sequences[index]
            span = slice(start, start + len(ids) - 1)
            row.tokens[span], row.targets[span], row.mask[span] = ids[:-1], ids[1:], loss_mask[1:]
            row.segment_ids[span], row.positions[span] = segment, np.arange(len(ids) - 1)
            start = span.stop
        return row

    def blank(self) -> TokenBatch:
        """A row of padding only, to fill up a batch with."""
        empty = np.zeros((5, self.sequence_length), np.int32)
        tokens, targets, mask, segment_ids, positions = empty
        tokens[:] = targets[:] = self.pad_id
        return TokenBatch(tokens, targets, mask.astype(bool), segment_ids, positions)


def pack_rows(
    sequences: Sequence[TokenRow], *, sequence_length: int, pad_id: int, packing: bool, seed: int
) -> PackedRows:
    """Shuffle sequences of at most `sequence_length` + 1 tokens and pack them; without `packing`, one per
    row."""
    known = getattr(sequences, "lengths", None)  # where reading them all would take long
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64) if known is None else known
    shuffled = np.random.default_rng(seed).permutation(len(sequences))
    order = shuffled.tolist()
    bins = [[i] for i in order]
    if packing:
        fitted = first_fit((lengths[shuffled] - 1).tolist(), sequence_length)
        bins = [[order[i] for i in row] for row in fitted]
    return PackedRows(sequences, lengths, bins, sequence_length, pad_id)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit bin packing: each item goes into the first of the latest thousand rows that has room for it,
    or else into a new row.

    Returns rows as lists of item indices. No item may be longer than `capacity`.

    >>> first_fit([3, 4, 2, 1], capacity=5)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        first_open = max(0, len(rows) - _OPEN_ROWS)
        fits = np.flatnonzero(room[first_open : len(rows)] >= length)
        row = first_open + int(fits[0]) if fits.size else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(item)
        room[row] -= length
    return rows
