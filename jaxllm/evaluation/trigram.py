"""A trigram model of tokens with Witten-Bell smoothing: the baseline that a trained model must beat."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxllm.batches import TokenBatch
from jaxllm.evaluation.perplexity import RowSums


class Counts(NamedTuple):
    """How often each n-gram, written as one number, was seen: int64 [N] both, the first sorted."""

    grams: np.ndarray
    counts: np.ndarray

    def of(self, grams: np.ndarray) -> np.ndarray:
        """The counts of these, 0 where one was never seen."""
        places = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        return np.where(self.grams[places] == grams, self.counts[places], 0)


class Order(NamedTuple):
    """The n-grams of one n: themselves, their histories, and how many words were seen after each history."""

    grams: Counts
    histories: Counts
    followers: Counts


class Trigram(NamedTuple):
    """Counts of one, two and three tokens in a row, smoothed as Witten and Bell (1991) have it:

    P(w | h) = (c(h w) + n(h) P(w | h')) / (c(h) + n(h)), where n(h) is how many different words follow h and
    h' is h without its first word; all words are equally likely before anything is known.
    """

    orders: tuple[Order, Order, Order]
    vocab_size: int

    def log_probs(self, batch: TokenBatch) -> np.ndarray:
        """Float64 [B, T], in nats, of the targets."""
        probs: np.ndarray | float = 1 / self.vocab_size
        for order, grams in zip(self.orders, _grams(batch, self.vocab_size), strict=True):
            histories = grams // self.vocab_size
            followers, seen = order.followers.of(histories), order.histories.of(histories)
            backed_off = (order.grams.of(grams) + followers * probs) / np.maximum(seen + followers, 1)
            probs = np.where(seen > 0, backed_off, probs)
        return np.log(probs)

    def row_sums(self, batch: TokenBatch, byte_lengths: np.ndarray) -> RowSums:
        """As `perplexity.row_sums` scores a batch; nothing is counted as correct."""
        mask = np.asarray(batch.mask)
        nats = np.where(mask, -self.log_probs(batch), 0).sum(1)
        num_bytes = np.where(mask, byte_lengths[batch.targets], 0).sum(1)
        return RowSums(nats, mask.sum(1), num_bytes, np.zeros(len(mask)))


def count_trigrams(batches: Iterable[TokenBatch], vocab_size: int) -> Trigram:
    """The trigram of all targets that count in these batches [B, T]."""
    columns = [[grams[np.asarray(batch.mask)] for grams in _grams(batch, vocab_size)] for batch in batches]
    orders = []
    for column in zip(*columns, strict=True):
        grams = np.concatenate(column)
        counts = Counts(*np.unique(grams, return_counts=True))
        histories = Counts(*np.unique(grams // vocab_size, return_counts=True))
        followers = Counts(*np.unique(counts.grams // vocab_size, return_counts=True))
        orders.append(Order(counts, histories, followers))
    return Trigram(tuple(orders), vocab_size)


def _grams(batch: TokenBatch, vocab_size: int) -> list[np.ndarray]:
    """The one, two and three tokens that end with each target, as numbers [B, T] in base `vocab_size`. A
    trigram whose first token lies before its window or its document has the second one in its place."""
    tokens, segment_ids = np.asarray(batch.tokens, np.int64), np.asarray(batch.segment_ids)
    targets = np.asarray(batch.targets, np.int64)
    before = np.roll(tokens, 1, axis=1)
    is_within = np.roll(segment_ids, 1, axis=1) == segment_ids
    is_within[:, 0] = False
    before = np.where(is_within, before, tokens)
    bigrams = tokens * vocab_size + targets
    return [targets, bigrams, before * vocab_size**2 + bigrams]
