"""Whole sequences laid side by side in rows of one length, none of them cut."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.batches import TokenBatch

TokenRow = tuple[np.ndarray, np.ndarray]  # ids int32, and bool: whether each is a target

_OPEN_ROWS = 1000  # rows looked at for a gap; one that so many later ones were opened after is closed


@dataclass(frozen=True)
class PackedRows:
    """A sequence of `TokenBatch` rows [T], each of one or more texts that do not see each other."""

    texts: Sequence[TokenRow]
    bins: list[list[int]]  # which of them share a row, in order
    sequence_length: int  # T
    pad_id: int

    @property
    def num_tokens(self) -> int:
        """Targets and what is read before them, pads left out."""
        return sum(len(ids) - 1 for ids, _ in self.texts)

    @property
    def padded_fraction(self) -> float:
        return 1 - self.num_tokens / max(1, len(self) * self.sequence_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, i: int) -> TokenBatch:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = self.blank()
        start = 0
        for number, text in enumerate(self.bins[i], 1):
            ids, loss_mask = self.texts[text]
            span = slice(start, start + len(ids) - 1)
            row.tokens[span], row.targets[span], row.mask[span] = ids[:-1], ids[1:], loss_mask[1:]
            row.segment_ids[span], row.positions[span] = number, np.arange(len(ids) - 1)
            start = span.stop
        return row

    def blank(self) -> TokenBatch:
        """A row of padding alone."""
        empty = np.zeros((5, self.sequence_length), np.int32)
        tokens, targets, mask, segment_ids, positions = empty
        tokens[:] = targets[:] = self.pad_id
        return TokenBatch(tokens, targets, mask.astype(bool), segment_ids, positions)


def pack_rows(
    texts: Sequence[TokenRow], *, sequence_length: int, pad_id: int, packing: bool, seed: int
) -> PackedRows:
    """Texts of at most `sequence_length` + 1 tokens in rows, in an order of the seed's; one a row without
    packing."""
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    bins = [[i] for i in order]
    if packing:
        lengths = [len(texts[i][0]) - 1 for i in order]
        bins = [[order[i] for i in row] for row in first_fit(lengths, sequence_length)]
    return PackedRows(texts, bins, sequence_length, pad_id)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item into the first row that has room for it (of the latest thousand), else into a new one.

    Rows are lists of item numbers. No item may be longer than `capacity`.

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
