"""Documents packed end to end and cut into windows, each of which is computed from its index alone.

The documents form one long stream. Window i reads the `sequence_length` tokens from i * sequence_length
on and predicts the next token of each, so that every token is a target exactly once. Only the first token
of a document is not in the loss: the tokens before it belong to another document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxllm.batches import TokenBatch
from jaxllm.data.token_cache import TokenCache
from jaxllm.errors import ConfigError

_FEW_DOCUMENTS = 100  # a fraction of fewer documents may be empty, or one very long book


@dataclass(frozen=True)
class Windows:
    """A sequence of `TokenBatch` rows [T] over a stream of S spans, each a document or a part of one."""

    tokens: np.ndarray  # ids, memory-mapped
    starts: np.ndarray  # int64 [S], where each span begins in `tokens`
    offsets: np.ndarray  # int64 [S + 1], where each span begins in the stream, and the stream's length
    sequence_length: int  # T
    pad_id: int

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def padded_fraction(self) -> float:
        """The share of all positions that are padding."""
        return 1 - max(0, self.num_tokens - 1) / max(1, len(self) * self.sequence_length)

    def __len__(self) -> int:
        return max(0, -(-(self.num_tokens - 1) // self.sequence_length))

    def __getitem__(self, i: int) -> TokenBatch:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        first = i * self.sequence_length
        index = np.arange(first, min(first + self.sequence_length + 1, self.num_tokens))
        low, high = np.searchsorted(self.offsets, index[[0, -1]], side="right")
        segment_ids = 1 + np.searchsorted(self.offsets[low:high], index, side="right")
        span = low - 2 + segment_ids
        span_starts = self.offsets[span]
        row = np.zeros((4, self.sequence_length + 1), np.int32)
        row[0] = self.pad_id
        row[:, : index.size] = (
            self.tokens[self.starts[span] + index - span_starts],
            segment_ids,
            index - np.maximum(span_starts, first),
            index > span_starts,
        )
        tokens, segment_ids, positions, loss_mask = row
        return TokenBatch(tokens[:-1], tokens[1:], loss_mask[1:] > 0, segment_ids[:-1], positions[:-1])

    def blank(self) -> TokenBatch:
        """A row of padding only, to fill up a batch with."""
        empty = np.zeros(self.sequence_length, np.int32)
        return TokenBatch(empty + self.pad_id, empty + self.pad_id, empty.astype(bool), empty, empty)


def pack(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, *, sequence_length: int, pad_id: int
) -> Windows:
    """The windows over the spans `tokens[start : start + length]`, in this order."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Windows(tokens, starts, offsets, sequence_length, pad_id)


class Cuts(NamedTuple):
    """Which tokens of the D documents of a cache are trained on, from the start of each, and which are held
    out: those from `start` on, up to its end."""

    trained: np.ndarray  # int64 [D]
    start: np.ndarray  # int64 [D]
    held_out: np.ndarray  # int64 [D]


def cut_documents(cache: TokenCache, held_out_fraction: float) -> Cuts:
    """Hold out a fraction of the documents.

    A hash of a document's text decides whether it is held out, so that copies of a text are all on the same
    side, in whichever source they are. Of fewer than a hundred documents the tail of each is held out.
    """
    lengths = np.diff(cache.offsets)
    held_out = cache.text_hashes / 2**64 < held_out_fraction
    if len(lengths) < _FEW_DOCUMENTS or not held_out.any():
        tails = (lengths * held_out_fraction).astype(np.int64)
        tails[tails < 2] = 0  # too short for one input token and its target
    else:
        tails = np.where(held_out, lengths, 0)
    return Cuts(lengths - tails, lengths - tails, tails)


def fraction_of_tokens(caches: Sequence[TokenCache], num_tokens: int) -> float:
    """The smallest `held_out_fraction` of `cut_documents` that holds out `num_tokens` of these sources.

    Raises ConfigError where they have no more tokens than that.
    """
    lengths = np.concatenate([np.diff(cache.offsets) for cache in caches])
    total = int(lengths.sum())
    if num_tokens >= total:
        raise ConfigError(
            f"data.validation_tokens={num_tokens} must be less than the {total} tokens of data.train"
        )
    if any(len(cache.text_hashes) < _FEW_DOCUMENTS for cache in caches):  # of which the tails are held out
        return num_tokens / total
    places = np.concatenate([cache.text_hashes for cache in caches]) / 2**64
    order = np.argsort(places)
    last = order[np.searchsorted(np.cumsum(lengths[order]), num_tokens)]
    return float(np.nextafter(places[last], 1))


def keep_apart(caches: Sequence[TokenCache], cuts: Sequence[Cuts], named: set[int]) -> list[Cuts]:
    """The cuts without training documents that are held out elsewhere, and without repeated held-out parts.

    Held out are the documents with a key in `named`, and those of which any source holds out all, or a tail
    where this source would train on it. They are compared by `held_out.text_key`.
    """
    keys, lengths = [cache.text_keys for cache in caches], [len(cut.start) for cut in cuts]
    start, part = (np.concatenate([getattr(cut, name) for cut in cuts]) for name in ("start", "held_out"))
    all_keys = np.concatenate(keys)
    whole = np.array([*named, *all_keys[(part > 0) & (start == 0)]], np.uint64)
    tails = all_keys[(part > 0) & (start > 0)]
    places = np.flatnonzero(part)
    hashes = np.concatenate([cache.text_hashes for cache in caches])
    distinct = np.zeros(len(part), bool)
    distinct[places[np.unique(hashes[places], return_index=True)[1]]] = True
    kept = []
    for key, cut, first in zip(keys, cuts, np.split(distinct, np.cumsum(lengths)[:-1]), strict=True):
        elsewhere = np.isin(key, whole) | (np.isin(key, tails) & (cut.held_out == 0))
        kept.append(Cuts(np.where(elsewhere, 0, cut.trained), cut.start, np.where(first, cut.held_out, 0)))
    return kept


def pack_documents(
    cache: TokenCache, cuts: Cuts, *, sequence_length: int, pad_id: int
) -> tuple[Windows, Windows]:
    """Training windows and held-out windows."""
    starts = np.asarray(cache.offsets[:-1])
    spans = (starts, cuts.trained), (starts + cuts.start, cuts.held_out)
    train, validation = (
        pack(cache.tokens, begin[size > 0], size[size > 0], sequence_length=sequence_length, pad_id=pad_id)
        for begin, size in spans
    )
    return train, validation
