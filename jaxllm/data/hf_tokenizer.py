"""Hugging Face tokenizers: a tokenizer.json and the files beside it, with the methods of `BaseTokenizer`.

A text is encoded as the file defines it: some normalize it (Qwen's to NFC), some lack a token for a rare
control character and drop it (SmolLM2's). Nothing else is lost, and nothing is added. One thing differs from
the library: sentencepiece-like files write a space as U+2581 and would read a real U+2581 as one, so it is
encoded as its three bytes, as in tokenizer.py.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.data.base_tokenizer import HF_TOKENIZER_FILE, BaseTokenizer, without_lone_surrogates
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_SPACE_MARK = "\u2581"  # how sentencepiece writes a space
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode promises never to use them


def read_hf_tokenizer(file: Path) -> "HFTokenizer":
    """The tokenizer of a tokenizer.json, with its config and chat template where they lie beside it."""
    files = {name: file.parent / name for name in (CONFIG_FILE, TEMPLATE_FILE)} | {HF_TOKENIZER_FILE: file}
    return HFTokenizer({name: path.read_bytes() for name, path in files.items() if path.is_file()})


class HFTokenizer(BaseTokenizer):
    """The tokenizer of a tokenizer.json, byte-level or sentencepiece-like with byte fallback."""

    def __init__(self, files: dict[str, bytes]):
        """`files`: tokenizer.json and, where they exist, CONFIG_FILE and TEMPLATE_FILE, by name.

        Raises DataError for files that cannot be read or a tokenizer that would lose text.
        """
        self._files = dict(files)
        config = _read_config(files.get(CONFIG_FILE, b"{}"))
        self.chat_template = _read_template(files, config)
        self._backend = backend = _backend(files[HF_TOKENIZER_FILE])
        self.special_tokens_map = _named_tokens(backend, config)
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
        eos = self.special_tokens_map["eos_token"]
        self.eos_id = ids[eos]
        self.bos_id = ids[self.special_tokens_map.get("bos_token", eos)]
        self.pad_id = ids[self.special_tokens_map.get("pad_token", eos)]
        first = [self.token_bytes[i] for i in self.encode("a")[:1]]
        self._prefix = " " if first and first[0].startswith(b" ") else ""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [without_lone_surrogates(text) for text in texts]
        # For a single text, starting threads would take longer than encoding it.
        if len(texts) == 1 or any(map(self._has_mark, texts)):
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

    def _all_token_bytes(self) -> list[bytes]:
        special = set(self.special_ids.values())
        if "ByteLevel" in f"{self._backend.pre_tokenizer} {self._backend.decoder}":
            byte_of = _byte_of_character()

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


def _read_config(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise DataError(f"{CONFIG_FILE} beside it is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"{CONFIG_FILE} beside it is not a JSON object")
    return config


def _read_template(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """The chat template: that of its own file, else the config's, which may name several: its "default"."""
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{TEMPLATE_FILE} beside it is not UTF-8 ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


def has_chat_template(folder: Path) -> bool:
    """Whether the files beside a tokenizer.json have a chat template. Builds no tokenizer."""
    files = {n: (folder / n).read_bytes() for n in (CONFIG_FILE, TEMPLATE_FILE) if (folder / n).is_file()}
    return _read_template(files, _read_config(files.get(CONFIG_FILE, b"{}"))) is not None


def _named_tokens(backend: "tokenizers.Tokenizer", config: dict[str, Any]) -> dict[str, str]:
    """The names of the BOS, EOS and pad tokens, as far as they exist. Raises DataError without an EOS."""
    named = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        token = token["content"] if isinstance(token, dict) else token
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


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as it is, the other bytes as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
