"""The trigram baseline: its probabilities are those of Witten and Bell, and sum to one."""

import numpy as np
import pytest

from jaxllm.batches import TokenBatch
from jaxllm.evaluation.trigram import count_trigrams


def batch(*rows, masked=()):
    """Rows of tokens, each a document of its own; position t predicts t + 1."""
    tokens = np.array(rows, np.int32)
    mask = np.ones((len(rows), tokens.shape[1] - 1), bool)
    for place in masked:
        mask[place] = False
    segment_ids = np.ones_like(mask, np.int32)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, segment_ids, segment_ids)


def test_probabilities_are_those_of_the_formula():
    """After 1 2, of five words, came 3 twice and 4 once; after 2 the same and 0; and so on by hand."""
    trigram = count_trigrams([batch([1, 2, 3], [1, 2, 3], [1, 2, 4], [0, 2, 0])], vocab_size=5)
    one = (2 + 4 * (1 / 5)) / (8 + 4)  # of 8 targets 3 is 2; four different words
    two = (2 + 3 * one) / (4 + 3)
    three = (2 + 2 * two) / (3 + 2)
    found = trigram.log_probs(batch([1, 2, 3]))[0, 1]
    np.testing.assert_allclose(np.exp(found), three, rtol=1e-12)


@pytest.mark.parametrize("history", [(1, 2), (4, 2), (3, 4)], ids=["seen", "half seen", "never seen"])
def test_probabilities_of_all_words_sum_to_one(history):
    trigram = count_trigrams([batch([1, 2, 3], [1, 2, 3], [1, 2, 4], [0, 2, 0])], vocab_size=5)
    rows = batch(*([*history, word] for word in range(5)))
    np.testing.assert_allclose(np.exp(trigram.log_probs(rows)[:, 1]).sum(), 1, rtol=1e-12)


def test_what_is_masked_is_not_counted():
    seen, hidden = batch([1, 2, 3, 4]), batch([1, 2, 3, 4], [0, 0, 0, 0], masked=[1])
    for name in ("grams", "counts"):
        for ours, theirs in zip(
            count_trigrams([seen], 5).orders, count_trigrams([hidden], 5).orders, strict=True
        ):
            np.testing.assert_array_equal(getattr(ours.grams, name), getattr(theirs.grams, name))


def test_no_document_is_history_of_the_next():
    """The token before a document's second one is of another document, and does not matter."""
    trigram = count_trigrams([batch([1, 2, 3, 4], [0, 2, 4, 1])], vocab_size=5)
    scored = []
    for before in (0, 1):
        row = batch([before, 2, 3])
        row = row._replace(segment_ids=np.array([[1, 2]], np.int32))
        scored.append(trigram.log_probs(row)[0, 1])
    assert scored[0] == scored[1]
    assert trigram.log_probs(batch([0, 2, 3]))[0, 1] != trigram.log_probs(batch([1, 2, 3]))[0, 1]


def test_sums_are_of_the_counted_targets():
    trigram = count_trigrams([batch([1, 2, 3])], vocab_size=5)
    row = batch([1, 2, 3], masked=[(0, 0)])
    sums = trigram.row_sums(row, np.array([9, 9, 9, 7, 9]))
    np.testing.assert_allclose(sums.nats, -trigram.log_probs(row)[0, 1])
    assert (sums.tokens, sums.bytes) == (1, 7)
