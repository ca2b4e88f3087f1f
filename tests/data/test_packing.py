"""Packing: every sequence once and whole, no row too long, little padding."""

import numpy as np
import pytest

from jaxllm.data.packing import PackedRows, first_fit, pack_rows


def sequences(lengths, seed=0):
    """Token rows of these lengths, with about half of the tokens in the loss."""
    draw = np.random.default_rng(seed)
    return [(draw.integers(1, 1000, n).astype(np.int32), draw.random(n) < 0.5) for n in lengths]


def pack(rows, length=16, packing=True, seed=0, pad_id=7):
    return pack_rows(rows, sequence_length=length, pad_id=pad_id, packing=packing, seed=seed)


def segments(packed):
    """(ids, loss mask) of every sequence, recovered from the rows."""
    for i in range(len(packed)):
        row = packed[i]
        for number in range(1, row.segment_ids.max() + 1):
            here = np.flatnonzero(row.segment_ids == number)
            assert (np.diff(here) == 1).all()
            np.testing.assert_array_equal(row.positions[here], np.arange(len(here)))
            np.testing.assert_array_equal(row.tokens[here[1:]], row.targets[here[:-1]])
            yield [*row.tokens[here], row.targets[here[-1]]], [False, *row.mask[here]]


# First fit


def test_an_item_goes_to_the_first_row_with_room():
    assert first_fit([3, 4, 2, 1, 5, 1], capacity=5) == [[0, 2], [1, 3], [4], [5]]


@pytest.mark.parametrize("capacity", [50, 64, 1000])
def test_no_row_is_too_long_and_every_item_is_in_one(capacity):
    lengths = np.random.default_rng(0).integers(1, 51, 2000).tolist()
    rows = first_fit(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(2000))
    assert max(sum(lengths[item] for item in row) for row in rows) <= capacity


def test_random_lengths_leave_less_than_five_percent_padding():
    lengths = np.random.default_rng(1).integers(20, 500, 20_000).tolist()  # also: not quadratic in time
    rows = first_fit(lengths, 1024)
    assert sum(lengths) / (len(rows) * 1024) > 0.95


def test_a_row_is_closed_once_a_thousand_later_ones_are_open():
    lengths = [60] + [100] * 1000 + [40]
    assert first_fit([*lengths[:-2], 40], 100)[0] == [0, 1000]
    assert first_fit(lengths, 100)[0] == [0]


def test_no_items_make_no_rows():
    assert first_fit([], 10) == []


# Rows


@pytest.mark.parametrize("packing", [True, False])
def test_every_sequence_is_in_the_rows_once_and_whole(packing):
    rows = sequences([2, 17, 9, 5, 3, 12, 8, 2, 6, 15, 4, 10])
    found = segments(pack(rows, packing=packing))
    expected = [(ids.tolist(), [False, *loss_mask[1:].tolist()]) for ids, loss_mask in rows]
    assert sorted(found) == sorted(expected)


def test_a_hand_worked_row():
    first = np.array([1, 11, 12, 2], np.int32), np.array([True, False, True, True])
    second = np.array([3, 4], np.int32), np.array([False, True])
    packed = PackedRows([first, second], np.array([4, 2]), bins=[[0, 1]], sequence_length=6, pad_id=7)
    row = packed[0]
    assert [field.tolist() for field in row] == [
        [1, 11, 12, 3, 7, 7],  # tokens
        [11, 12, 2, 4, 7, 7],  # targets
        [False, True, True, True, False, False],  # mask
        [1, 1, 1, 2, 0, 0],  # segment ids
        [0, 1, 2, 0, 0, 0],  # positions
    ]
    assert [field.dtype for field in row] == [np.int32, np.int32, bool, np.int32, np.int32]
    assert packed.num_tokens == 4
    assert packed.padded_fraction == pytest.approx(2 / 6)


def test_the_seed_determines_the_order():
    rows = sequences([9] * 20)
    first, again, other = (pack(rows, seed=seed).bins for seed in (0, 0, 1))
    assert first == again != other


def test_without_packing_each_sequence_has_its_own_row():
    packed = pack(sequences([4, 4, 4]), packing=False)
    assert len(packed) == 3
    assert all(packed[i].segment_ids.max() == 1 for i in range(3))


def test_a_blank_row_is_all_padding_and_outside_the_loss():
    blank = pack(sequences([4])).blank()
    assert (blank.tokens == 7).all()
    assert not blank.mask.any()
    assert not blank.segment_ids.any()


@pytest.mark.parametrize("i", [-1, 1])
def test_an_index_out_of_range_raises_index_error(i):
    with pytest.raises(IndexError, match=rf"row {i} of 1"):
        pack(sequences([4]))[i]
