"""Hugging Face tokenizers: a tokenizer.json and the files beside it, with the methods of `BaseTokenizer`.

A text is encoded as the file defines it: some normalize it (Qwen's to NFC), some lack a token for a rare
control character and drop it (SmolLM2's). Nothing else is lost, and nothing is added. One thing differs from
the library: sentencepiece-like files write a space as U+2581 and would read a real U+2581 as one, so it is
encoded as its three bytes, as in tokenizer.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.data.base_tokenizer import HF_TOKENIZER_FILE, BaseTokenizer, without_lone_surrogates
from jaxllm.data.byte_level import byte_of_character
from jaxllm.data.tokenizer_files import (
    CONFIG_FILE,
    Files,
    default_template,
    generation_ids,
    json_object,
    named_token,
    read_beside,
    read_templates,
)
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

_SPACE_MARK = "\u2581"  # how sentencepiece writes a space
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode promises never to use them


def read_hf_tokenizer(file: Path) -> "HFTokenizer":
    """The tokenizer of a tokenizer.json, with the files that lie beside it."""
    return HFTokenizer(read_beside(file.parent) | {HF_TOKENIZER_FILE: file.read_bytes()})


class HFTokenizer(BaseTokenizer):
    """The tokenizer of a tokenizer.json, byte-level or sentencepiece-like with byte fallback."""

    def __init__(self, files: Files):
        """`files`: tokenizer.json and, where they exist, those of `tokenizer_files.BESIDE`, by name.

        Raises DataError for files that cannot be read or a tokenizer that would lose text.
        """
        self._files = dict(files)
        self.chat_templates = read_templates(files)
        self.chat_template = default_template(self.chat_templates)
        self._backend = backend = _backend(files[HF_TOKENIZER_FILE])
        self.special_tokens_map = _named_tokens(backend, files)
        backend.encode_special_tokens = True  # in the library's terms: treat their names as ordinary text
        self._markup_backend = _backend(files[HF_TOKENIZER_FILE])
        for each in (backend, self._markup_backend):
            _mark_special(each, self.special_tokens_map.values())

        ids = backend.get_vocab()
        self.pieces = [backend.id_to_token(i) or "" for i in range(max(ids.values()) + 1)]
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in self._added.items() if token.special}
        self._writes_spaces_as_marks = False
        self.token_bytes = self._all_token_bytes()
        named = {name: ids[token] for name, token in self.special_tokens_map.items()}
        self.eos_id = named["eos_token"]
        # Qwen's have no BOS; their generation_config.json names the token that begins a document.
        bos = next(iter(generation_ids(files, "bos_token_id")), self.eos_id)
        self.bos_id = named.get("bos_token", bos)
        self.pad_id = named.get("pad_token", self.eos_id)
        self.stop_ids = self._stop_ids(files)
        first = [self.token_bytes[i] for i in self.encode("a")[:1]]
        self._prefix = " " if first and first[0].startswith(b" ") else ""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [without_lone_surrogates(text) for text in texts]
        # For a single text, starting threads would take longer than encoding it.
        if len(texts) == 1 or self.one_thread or any(map(self._has_mark, texts)):
            return [self._ids(self._backend, text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _parse(self, text: str) -> list[int]:
        return self._ids(self._markup_backend, without_lone_surrogates(text))

    def _has_mark(self, text: str) -> bool:
        """Whether the backend would read a character of the text as a space that is none."""
        return self._writes_spaces_as_marks and _SPACE_MARK in text

    def _ids(self, backend: "tokenizers.Tokenizer", text: str) -> list[int]:
        if not self._has_mark(text):
            return backend.encode(text, add_special_tokens=False).ids
        # A character in its place that no vocabulary has is encoded as its bytes, which are then replaced.
        stand_in = next((c for c in _NONCHARACTERS if c not in text), None)
        if stand_in is None:
            raise DataError("a text has U+2581 and every one of U+FDD0 to U+FDEF, which no text should have")
        ids = backend.encode(text.replace(_SPACE_MARK, stand_in), add_special_tokens=False).ids
        old, new = (self._byte_ids(character) for character in (stand_in, _SPACE_MARK))
        for at in range(len(ids) - len(old) + 1):
            if ids[at : at + len(old)] == old:
                ids[at : at + len(old)] = new  # as many: both characters have three bytes
        return ids

    def _byte_ids(self, character: str) -> list[int]:
        return [self.pieces.index(f"<0x{byte:02X}>") for byte in character.encode()]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        special = sorted(
            (self._added[i] for i in self.special_ids.values()), key=lambda token: -len(token.content)
        )
        # Some tokens (Phi 3's) include the white space that follows them.
        return re.compile("|".join(re.escape(token.content) + r"\s*" * token.rstrip for token in special))

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "HFTokenizer":
        return cls(dict(files))

    def _all_token_bytes(self) -> list[bytes]:
        special = set(self.special_ids.values())
        if "ByteLevel" in f"{self._backend.pre_tokenizer} {self._backend.decoder}":
            byte_of = byte_of_character()

            def bytes_of(i: int, piece: str) -> bytes:
                # Added tokens are stored as plain text.
                return (
                    piece.encode() if i in self._added else bytes(byte_of[character] for character in piece)
                )

        elif "<0x0A>" in self.pieces:
            self._writes_spaces_as_marks = True

            def bytes_of(i: int, piece: str) -> bytes:
                if re.fullmatch("<0x[0-9A-F]{2}>", piece):
                    return bytes([int(piece[3:-1], 16)])
                return piece.replace(_SPACE_MARK, " ").encode()

        else:
            raise DataError("neither byte-level nor with byte fallback, so it would lose text")
        return [b"" if i in special else bytes_of(i, piece) for i, piece in enumerate(self.pieces)]


def _backend(content: bytes) -> "tokenizers.Tokenizer":
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "tokenizer.path: a Hugging Face tokenizer needs an extra: pip install 'jaxllm[hf]'"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower type
        raise DataError(f"not a tokenizer.json ({str(error).splitlines()[0]})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _named_tokens(backend: "tokenizers.Tokenizer", files: Files) -> dict[str, str]:
    """The names of the BOS, EOS and pad tokens, as far as they exist. Raises DataError without an EOS."""
    named, config = {}, json_object(files, CONFIG_FILE)
    for name in ("bos_token", "eos_token", "pad_token"):
        token = named_token(config, name)
        if token is not None:
            if backend.token_to_id(token) is None:
                raise DataError(f"{CONFIG_FILE}: {name}={token!r} is not in the vocabulary")
            named[name] = token
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    if "eos_token" not in named and len(special) == 1:  # GPT-2's, which has no config
        named["eos_token"] = special[0]
    if "eos_token" not in named:
        raise DataError(f"no EOS token; set eos_token in {CONFIG_FILE} beside it")
    return named


def _mark_special(backend: "tokenizers.Tokenizer", tokens: Iterable[str]) -> None:
    """Make `tokens` special, which the tokenizer.json may not declare them to be."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([token for token in tokens if token not in special])
