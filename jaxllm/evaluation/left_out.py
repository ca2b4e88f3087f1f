"""Which rows of a source are not evaluated, and why, on stderr."""

import sys
from collections import defaultdict
from collections.abc import Sequence

from jaxllm.data.sources import BadRow

SHOWN = 3  # rows of each problem


def print_left_out(rows: Sequence[tuple[str, BadRow]]) -> None:
    """A line for each of the first rows (place, problem) with one problem, and one that counts the rest."""
    by_problem: dict[str, list[tuple[str, BadRow]]] = defaultdict(list)
    for place, error in rows:
        by_problem[error.problem].append((place, error))
    for problem, found in by_problem.items():
        for place, error in found[:SHOWN]:
            print(f"left out: {place}: {error}", file=sys.stderr)
        if len(found) > SHOWN:
            print(f"left out: {len(found) - SHOWN} more rows: {problem}", file=sys.stderr)
