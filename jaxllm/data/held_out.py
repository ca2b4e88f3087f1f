"""What is held out: decided by a hash of a row's question, and kept out of training by normalized text.

Two spellings of one question, which differ in case, blanks or Unicode form alone, count as the same question.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from jaxllm.data.sources import Row, open_source
from jaxllm.errors import DataError


def canonical(text: str) -> str:
    """Unicode's NFKC without blanks at the ends of lines and of the text, and with single blanks in between.

    This is what decides the side of a row. It keeps case and lines, so that it is the text itself for most
    rows, which are then on the side where they have always been.
    """
    text = re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", text).replace("\r\n", "\n"))
    return re.sub(r" ?\n ?", "\n", text).strip()


def text_key(text: str) -> int:
    """A 64-bit hash of the normalized text: NFKC, case folded, every run of white space as one blank."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return xxhash.xxh3_64_intdigest(" ".join(folded.split()).encode("utf-8", "replace"))


def is_held_out(question: str, fraction: float) -> bool:
    """Whether a row with this canonical question belongs to the held-out fraction. No other row matters."""
    return xxhash.xxh3_64_intdigest(question.encode("utf-8", "replace")) < fraction * 2**64


def read_keys(names: Iterable[str], *, synthetic_rows: int, seed: int) -> set[int]:
    """`text_key` of the first question of every row of these sources, or of its text. Raises DataError."""
    keys = set()
    for name in names:
        try:
            source = open_source(
                name, split="validation", text_key=None, synthetic_rows=synthetic_rows, seed=seed
            )
        except DataError as error:
            raise DataError(f"data.held_out: {error}") from error
        keys.update(text_key(_question(row)) for row in source.rows())
    return keys


def _question(row: Row) -> str:
    record: Mapping[str, Any] = row.value or {}
    value = next((record[key] for key in ("prompt", "messages", "text") if record.get(key)), None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = next(
            (m.get("content") for m in value if isinstance(m, Mapping) and m.get("role") == "user"), ""
        )
    if not isinstance(value, str) or not value:
        raise DataError(f"data.held_out: {row.where}: no `prompt`, `messages` or `text`")
    return value
