"""Which texts, questions and pairs of numbers are for training, and which are always held out."""

import hashlib
from typing import Literal, get_args

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

_HELD_OUT = 5  # one key in five


def split_of(key: str) -> Split:
    """The split that owns this key: a stable hash, so that the two can never share one, whatever the seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % _HELD_OUT == 0 else "train"


def check_split(split: str) -> None:
    """Refuse a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist: choose one of {', '.join(SPLITS)}")
