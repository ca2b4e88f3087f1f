"""What all tokenizers have in common: their methods, whatever the files that define them."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxllm.data.tokenizer_files import GENERATION_FILE, Files, generation_ids
from jaxllm.errors import DataError

HF_TOKENIZER_FILE = "tokenizer.json"


class BaseTokenizer:
    """The methods of all tokenizers. A token stands for its bytes; a special token has none, and `encode`
    never produces it."""

    pieces: list[str]  # the name of each token
    special_ids: dict[str, int]  # by name
    special_tokens_map: dict[str, str]  # "bos_token", "eos_token" -> name, as chat templates use them
    token_bytes: list[bytes]  # of each token
    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]  # EOS, and what else generation_config.json lets a text end with
    chat_template: str | None = None  # the Jinja source that came with it
    chat_templates: Mapping[str, str] = MappingProxyType({})  # all that came with it, by name
    one_thread = False  # whether `encode_batch` uses one core instead of all
    _prefix: str  # the space that some tokenizers put before each text, or ""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process is made from the files, and uses one core, as its siblings do."""
        return _one_threaded, (type(self), self.files())

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "BaseTokenizer":
        """The tokenizer with these `files()`."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """Its files by name. A folder of these files is loaded as the same tokenizer."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores, or on one with `one_thread`."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS; the code that packs rows adds exactly one."""
        return self.encode_batch([text])[0]

    def encode_markup(self, text: str, *, after: str = "") -> list[int]:
        """The ids of a text in which the name of a special token means that token, as in chat templates.

        `after` is the special token or newline that the text follows, or "". A tokenizer that puts a space
        before each text needs it, in order to add no space that it would not add to the joined text.
        """
        if self._prefix and after:
            before, ids = self._parse(after), self._parse(after + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._parse(text)

    def _parse(self, text: str) -> list[int]:
        parts = self.special_pattern.split(text)
        return [
            i
            for part in parts
            for i in ([self.special_ids[part]] if part in self.special_ids else self.encode(part))
        ]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches each part of a text that `encode_markup` reads as a special token."""
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def decode(self, ids: Iterable[int], *, from_start: bool = True) -> str:
        """The text of `ids`. Special tokens give no text; incomplete or invalid UTF-8 becomes U+FFFD, as do
        ids outside the vocabulary.

        `from_start=False`: the ids continue others, so the first space is kept even by a tokenizer that puts
        one before each text.
        """
        in_range, unknown = range(self.vocab_size), "\ufffd".encode()
        text = b"".join(self.token_bytes[i] if i in in_range else unknown for i in map(int, ids))
        decoded = text.decode("utf-8", errors="replace")
        return decoded.removeprefix(self._prefix) if from_start else decoded

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        return np.array([len(token) for token in self.token_bytes], np.int32)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of its files, in the order of their names, without what only concerns generation."""
        files = sorted(self.files().items())
        return hashlib.sha256(b"".join(x for name, x in files if name != GENERATION_FILE)).hexdigest()

    def _stop_ids(self, files: Files) -> tuple[int, ...]:
        """EOS and the EOS ids of generation_config.json. Raises DataError for one that is no token."""
        ids = [self.eos_id, *generation_ids(files, "eos_token_id")]
        if (largest := max(ids)) >= self.vocab_size:
            raise DataError(
                f"{GENERATION_FILE}: eos_token_id={largest} is not one of the {self.vocab_size} tokens"
            )
        return tuple(dict.fromkeys(ids))


def _one_threaded(kind: type[BaseTokenizer], files: Mapping[str, bytes]) -> BaseTokenizer:
    tokenizer = kind.from_files(files)
    tokenizer.one_thread = True
    return tokenizer


def without_lone_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone halves replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
