"""Who a rater is: the same person types "Ann", "ann " and "ANN"."""

import unicodedata
from collections.abc import Collection
from difflib import get_close_matches

NEAR = 0.7  # difflib's ratio: ann and anna have 0.86, jose and josé 0.75, tom and tim 0.67


def normalized(name: str) -> str:
    """One spelling of a name, which is recorded as the rater: NFKC, case-folded, with single spaces."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def near_names(name: str, known: Collection[str]) -> list[str]:
    """The known names that a new name may be a misspelling of, the nearest first; none for a known name."""
    return [] if name in known else get_close_matches(name, known, n=3, cutoff=NEAR)
