"""Rows in groups of similar length."""

import numpy as np
import pytest

from jaxllm.length_groups import WIDTHS, by_length, cut, widths


@pytest.mark.parametrize(
    ("length", "multiple", "expected"),
    [
        (256, 8, (64, 128, 192, 256)),
        (86, 8, (24, 48, 72, 86)),
        (100, 32, (32, 64, 96, 100)),
        (64, 128, (64,)),
        (300, 128, (128, 256, 300)),
    ],
)
def test_widths_are_few_multiples_and_the_length(length, multiple, expected):
    assert widths(length, multiple) == expected
    assert len(expected) <= WIDTHS


def test_every_row_is_in_one_group_that_is_wide_enough():
    lengths = np.random.default_rng(0).integers(1, 101, 37)
    groups = list(by_length(lengths, 8, widths(100, 8)))
    assert sorted(np.concatenate([rows for rows, _ in groups])) == list(range(37))
    for rows, width in groups:
        assert lengths[rows].max() <= width
        assert width - lengths[rows].max() < 32  # the next width below would not do
    assert [len(rows) for rows, _ in groups] == [8, 8, 8, 8, 5]
    assert [width for _, width in groups] == sorted((width for _, width in groups), reverse=True)


def test_only_axes_of_positions_are_cut():
    tree = (np.zeros((3, 2, 10)), np.zeros((3, 10)), np.zeros((3, 2)), np.zeros(10))
    assert [x.shape for x in cut(tree, 10, 4)] == [(3, 2, 4), (3, 4), (3, 2), (10,)]
