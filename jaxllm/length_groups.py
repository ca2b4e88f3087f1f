"""Rows grouped by length, so that short rows are not computed at the width of the longest."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

WIDTHS = 4  # that rows may be cut to: each compiles a program of its own


def widths(length: int, multiple: int) -> tuple[int, ...]:
    """At most WIDTHS widths, ascending: multiples of `multiple`, and `length` itself.

    >>> widths(256, 8), widths(100, 32)
    ((64, 128, 192, 256), (32, 64, 96, 100))
    """
    step = -(-length // (WIDTHS * multiple)) * multiple
    return (*range(step, length, step), length)


def by_length(lengths: np.ndarray, size: int, widths: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of rows, the longest first and `size` at a time, with the first of `widths` that holds them."""
    order = np.argsort(-lengths, kind="stable")
    for rows in np.split(order, range(size, len(order), size)):
        yield rows, widths[int(np.searchsorted(widths, lengths[rows[0]]))]


def cut(tree: Any, length: int, width: int) -> Any:
    """Arrays [B, ...] with their last axis, where it is one of `length` positions, cut to `width`."""
    return jax.tree.map(lambda x: x[..., :width] if x.ndim > 1 and x.shape[-1] == length else x, tree)
