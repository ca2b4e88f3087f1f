"""The assignment of texts, prompts and pairs of numbers to the training or the validation split."""

import hashlib
from typing import Literal, get_args

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

_HELD_OUT = 5  # one key in five is for validation


def split_of(key: str) -> Split:
    """The split of a key, by a stable hash: no key is ever in both splits, whatever the seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % _HELD_OUT == 0 else "train"


def check_split(split: str) -> None:
    """Raise ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; use one of {', '.join(SPLITS)}")
