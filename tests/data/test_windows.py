"""Windows: no token lost, none a target twice, no attention from one document to another."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.batches import TokenBatch
from jaxllm.data.windows import (
    Windows,
    cut_documents,
    fraction_of_tokens,
    keep_apart,
    pack,
    pack_documents,
)
from jaxllm.errors import ConfigError

BOS, EOS, PAD = 1, 2, 9


def windows_of(lengths, sequence_length) -> Windows:
    """Documents of `lengths` tokens, BOS and EOS included; the tokens between them are all different."""
    documents, number = [], 100
    for length in lengths:
        inner = list(range(number, number + length - 2))
        number += length
        documents += [BOS, *inner, EOS]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    return pack(
        np.array(documents, np.uint16),
        starts,
        np.array(lengths),
        sequence_length=sequence_length,
        pad_id=PAD,
    )


def test_a_hand_worked_example():
    """Documents 1 100 101 102 2 and 1 105 2 in windows of four."""
    windows = windows_of([5, 3], 4)
    assert len(windows) == 2
    first, second = windows[0], windows[1]
    assert first.tokens.tolist() == [1, 100, 101, 102]
    assert first.targets.tolist() == [100, 101, 102, 2]
    assert first.mask.tolist() == [True] * 4
    assert first.segment_ids.tolist() == [1] * 4
    assert first.positions.tolist() == [0, 1, 2, 3]
    assert second.tokens.tolist() == [2, 1, 105, 2]
    assert second.targets.tolist() == [1, 105, 2, PAD]
    assert second.mask.tolist() == [
        False,
        True,
        True,
        False,
    ]  # BOS after the EOS of another document, and padding
    assert second.segment_ids.tolist() == [1, 2, 2, 2]
    assert second.positions.tolist() == [0, 0, 1, 2]


def test_types_are_those_of_a_token_batch():
    row = windows_of([5, 3], 4)[1]
    assert isinstance(row, TokenBatch)
    assert [values.dtype.name for values in row] == ["int32", "int32", "bool", "int32", "int32"]
    assert {values.shape for values in row} == {(4,)}


@pytest.mark.parametrize("sequence_length", [1, 2, 3, 7, 16, 64, 1000])
def test_every_token_is_a_target_once_except_the_first_of_each_document(sequence_length):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, size=50)
    windows = windows_of(lengths, sequence_length)
    rows = [windows[i] for i in range(len(windows))]
    targets = np.concatenate([row.targets[row.mask] for row in rows])
    expected = windows.tokens[np.setdiff1d(np.arange(windows.num_tokens), windows.starts)]
    assert targets.tolist() == expected.tolist()


@pytest.mark.parametrize("sequence_length", [1, 5, 16, 64])
def test_segments_and_positions_follow_the_documents(sequence_length):
    lengths = np.random.default_rng(1).integers(2, 20, size=30)
    windows = windows_of(lengths, sequence_length)
    document_of = np.repeat(np.arange(30), lengths)
    for i in range(len(windows)):
        row = windows[i]
        place = np.arange(i * sequence_length, (i + 1) * sequence_length)
        real = place < windows.num_tokens
        place = place[real]
        documents = document_of[place]
        assert row.tokens[real].tolist() == windows.tokens[place].tolist()
        assert (row.segment_ids[real] == 1 + documents - documents[0]).all()
        begins = np.maximum(windows.starts[documents], i * sequence_length)
        assert (row.positions[real] == place - begins).all()
        assert not row.segment_ids[~real].any()
        assert not row.mask[~real].any()
        assert (row.tokens[~real] == PAD).all()


def test_only_the_last_window_is_padded_and_padded_fraction_counts_it():
    windows = windows_of([5, 6], 4)  # 10 targets in 3 windows
    assert [int((~row.mask & (row.segment_ids == 0)).sum()) for row in windows] == [0, 0, 1]
    assert windows.padded_fraction == pytest.approx(2 / 12)
    assert windows_of([5, 4], 4).padded_fraction == 0


def test_a_blank_row_is_all_padding_and_outside_the_loss():
    blank = windows_of([5], 4).blank()
    assert not blank.mask.any()
    assert not blank.segment_ids.any()
    assert [values.dtype for values in blank] == [values.dtype for values in windows_of([5], 4)[0]]


@pytest.mark.parametrize("i", [-1, 2])
def test_an_index_out_of_range_raises_index_error(i):
    with pytest.raises(IndexError, match=f"window {i} of 2"):
        windows_of([5, 3], 4)[i]


def cache_of(lengths, hashes, keys=None):
    """A token cache whose tokens are 0, 1, 2, ...; texts with equal keys differ in spelling alone."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(
        tokens=np.arange(offsets[-1]),
        offsets=offsets,
        text_hashes=np.array(hashes, np.uint64),
        text_keys=np.array(hashes if keys is None else keys, np.uint64),
        bad_rows=Path(),
    )


def spans(windows: Windows) -> list[int]:
    """The index in the cache of every token of the stream."""
    lengths = np.diff(windows.offsets)
    return [
        i for start, length in zip(windows.starts, lengths, strict=True) for i in range(start, start + length)
    ]


def split(cache, fraction) -> tuple[list[int], list[int]]:
    cuts = cut_documents(cache, fraction)
    train, held_out = pack_documents(cache, cuts, sequence_length=4, pad_id=PAD)
    return spans(train), spans(held_out)


def test_documents_are_held_out_by_the_hash_of_their_text():
    hashes = np.linspace(0, 2**64 - 2**12, 200).astype(np.uint64)[np.random.default_rng(0).permutation(200)]
    train, held_out = split(cache_of([5] * 200, hashes), 0.1)
    assert sorted(train + held_out) == list(range(1000))
    assert {i // 5 for i in held_out} == set(np.flatnonzero(hashes < 2**64 // 10).tolist())
    assert len(held_out) == 100


def test_the_same_text_is_never_on_both_sides():
    hashes = np.random.default_rng(0).integers(0, 2**63, 150, np.uint64) * np.uint64(2)
    train, held_out = split(cache_of([3] * 300, np.tile(hashes, 2)), 0.3)
    sides = [{hashes[i // 3 % 150] for i in side} for side in (train, held_out)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_of_few_documents_the_tail_of_each_is_held_out():
    train, held_out = split(cache_of([40, 10, 20], [0, 0, 0]), 0.1)
    assert held_out == [
        36,
        37,
        38,
        39,
        68,
        69,
    ]  # of the ten tokens one would be held out, without an input token
    assert sorted(train + held_out) == list(range(70))


def test_tails_are_held_out_where_no_hash_is_low_enough():
    train, held_out = split(cache_of([40] * 100, [2**63] * 100), 0.05)
    assert len(held_out) == 200
    assert len(train) == 3800


def test_a_fraction_of_zero_holds_out_nothing():
    train, held_out = split(cache_of([40, 10], [0, 0]), 0.0)
    assert held_out == []
    assert train == list(range(50))


def sides(caches, fractions, named=()):
    """The documents of each cache that are trained on, and those that are held out, at least in part."""
    cuts = [cut_documents(cache, fraction) for cache, fraction in zip(caches, fractions, strict=True)]
    kept = keep_apart(caches, cuts, set(named))
    return [(np.flatnonzero(cut.trained).tolist(), np.flatnonzero(cut.held_out).tolist()) for cut in kept]


def test_a_document_that_is_validated_on_is_not_trained_on_in_another_spelling():
    train, validation = cache_of([5, 6, 7], [1, 2, 3], keys=[1, 2, 3]), cache_of([6, 4], [20, 4], keys=[2, 4])
    assert sides([train, validation], [0.0, 1.0]) == [([0, 2], []), ([], [0, 1])]
    assert sides([train], [0.0], named=[3]) == [([0, 1], [])]


def test_a_document_whose_tail_one_source_holds_out_is_not_trained_on_in_another():
    few = cache_of([40], [2**63])
    many = cache_of([40] * 100, [2**63, *range(2**62, 2**62 + 98), 0])
    (trained, held_out), (elsewhere, _) = sides([few, many], [0.1, 0.1])
    assert (trained, held_out) == ([0], [0])
    assert elsewhere == list(range(1, 99))
    assert sides([few, few], [0.1, 0.1]) == [([0], [0]), ([0], [])]  # the same tail, evaluated once


def test_a_repeated_held_out_document_is_evaluated_once():
    train, validation = cache_of([5], [1]), cache_of([6, 6, 4], [2, 2, 3])
    assert sides([train, validation], [0.0, 1.0])[1] == ([], [0, 2])


@pytest.mark.parametrize("wanted", [2, 500, 10_000])
def test_a_number_of_tokens_is_held_out_of_all_sources_together(wanted):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, size=(2, 300), dtype=np.uint64)
    hashes[1, :40] = hashes[0, :40]  # copies, which are on one side
    caches = [cache_of(rng.integers(3, 99, size=300), each) for each in hashes]
    fraction = fraction_of_tokens(caches, wanted)
    held_out = [cut_documents(cache, fraction).held_out for cache in caches]
    assert wanted <= sum(map(np.sum, held_out)) < wanted + 2 * 99
    assert ((held_out[0] > 0) == (held_out[1] > 0))[:40].all()
    fraction = fraction_of_tokens(caches, 2 * wanted)
    for cache, before in zip(caches, held_out, strict=True):
        assert (cut_documents(cache, fraction).held_out >= before).all()


def test_of_few_documents_the_tails_have_about_that_many_tokens():
    caches = [cache_of([4000, 2000], [1, 2]), cache_of([10] * 200, range(200))]
    fraction = fraction_of_tokens(caches[:1], 600)
    assert cut_documents(caches[0], fraction).held_out.tolist() == [400, 200]
    assert fraction_of_tokens(caches, 800) == 0.1


def test_more_tokens_than_there_are_cannot_be_held_out():
    with pytest.raises(ConfigError, match=r"data.validation_tokens=6000 must be less than the 6000 tokens"):
        fraction_of_tokens([cache_of([4000, 2000], [1, 2])], 6000)
