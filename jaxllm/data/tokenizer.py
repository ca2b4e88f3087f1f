"""Lossless conversion between text and token ids, by a sentencepiece model that is trained on the run's own
text or loaded. A Hugging Face tokenizer (hf_tokenizer.py) has the same methods, those of `BaseTokenizer`.

`decode(encode(text)) == text` for every Unicode string, except that half a surrogate pair, which is not a
character, becomes U+FFFD. Characters outside the vocabulary are encoded as their UTF-8 bytes. The name of a
special token in a text ("<|user|>", "</s>") is encoded like any other characters.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxllm.config import check_local
from jaxllm.data.base_tokenizer import HF_TOKENIZER_FILE, BaseTokenizer, without_lone_surrogates
from jaxllm.data.byte_level import (
    MERGES_FILE,
    VOCABULARY_FILE,
    from_tiktoken,
    from_vocabulary_and_merges,
    is_tiktoken,
)
from jaxllm.data.tokenizer_files import (
    CONFIG_FILE,
    Files,
    added_tokens,
    default_template,
    json_object,
    named_token,
    read_beside,
    read_templates,
)
from jaxllm.errors import ConfigError, DataError

TOKENIZER_FILE = "tokenizer.model"

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
SPARE_TOKENS = tuple(f"<|spare_{i}|>" for i in range(8))  # for uses that are decided after pretraining
_RESERVED = 4 + len(CHAT_TOKENS) + len(SPARE_TOKENS) + 256  # pad, BOS, EOS, unknown; and one per byte
_SMALLEST_VOCABULARY = 300

# sentencepiece writes a space as U+2581 and cannot tell a real U+2581 from it, so that one character is
# always encoded as its bytes. U+2585 is the trainer's own mark for "unknown": it drops lines that have one.
_SPACE_MARK = "\u2581"
_TRAINER_MARKS = {0x2581: "\n", 0x2585: "\n"}

# A ModelProto's bytes appended to another's override its fields (protobuf's merging rule): here
# normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false }.
_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"
_PROBE = " a  \uff21 \u2460\n\t e\u0301 "  # any normalization other than the identity changes this

_CHUNK = 20_000  # characters encoded at a time; the time per character grows with the length of a text


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    path: str | None  # a sentencepiece .model, a tokenizer.json, or a folder; None: train one
    vocab_size: int  # tokens of a trained one; fewer where the text is too small for so many
    train_bytes: int  # how many bytes of the run's text to train it on

    def __post_init__(self):
        check_local(self.path, "tokenizer.path")


class Tokenizer(BaseTokenizer):
    """A sentencepiece model whose `encode` and `decode` lose nothing."""

    def __init__(self, model: bytes, files: Files = MappingProxyType({})):
        """`model`: the bytes of a sentencepiece model with a token for every byte. `files`: those of
        `tokenizer_files.BESIDE` that lie beside it, by name."""
        from sentencepiece import SentencePieceProcessor

        try:
            original = SentencePieceProcessor(model_proto=model)
            # Models like Llama 2's put a space before a text. We add it, once per text, not once per chunk.
            self._prefix = " " if original.normalize("a") == _SPACE_MARK + "a" else ""
            self._processor = processor = SentencePieceProcessor(model_proto=model + _KEEP_SPACES)
        except RuntimeError as error:
            raise DataError("not a sentencepiece model") from error
        if processor.normalize(_PROBE) != _PROBE.replace(" ", _SPACE_MARK):
            raise DataError("this sentencepiece model normalizes text before encoding, so it would lose some")
        self._model, self._files = model, dict(files)
        self.chat_templates = read_templates(files)
        self.chat_template = default_template(self.chat_templates)
        self.pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
        self.special_ids = {
            piece: i
            for i, piece in enumerate(self.pieces)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        self._added = self._add_tokens()
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        byte_ids = {self.token_bytes[i]: i for i in range(processor.vocab_size()) if processor.is_byte(i)}
        if len(byte_ids) < 256 or _SPACE_MARK not in self.pieces:
            raise DataError(
                "this sentencepiece model lacks tokens for single bytes or the space, so it would lose text"
            )
        # What is encoded by itself, and how.
        self._apart: dict[str, list[int]] = {
            _SPACE_MARK: [byte_ids[bytes([byte])] for byte in _SPACE_MARK.encode()]
        }
        self._apart |= {name: [i] for name, i in self._added.items() if name not in self.special_ids}
        self.bos_id = self._named_id("bos_token", processor.bos_id())
        self.eos_id = self._named_id("eos_token", processor.eos_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError("this sentencepiece model has no BOS token or no EOS token")
        # Masks hide padding, so any valid id will do where a model has no pad id (-1).
        pad_id = self._named_id("pad_token", processor.pad_id())
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.stop_ids = self._stop_ids(files)
        self.special_tokens_map = {
            "bos_token": self.pieces[self.bos_id],
            "eos_token": self.pieces[self.eos_id],
        }

    def _add_tokens(self) -> dict[str, int]:
        """Adds the tokens that the files beside the model add to its vocabulary; returns their ids."""
        added = {}
        for i, token in sorted(added_tokens(self._files).items()):
            if i < len(self.pieces):
                continue  # a piece of the model
            if i > len(self.pieces):
                raise DataError(f"the added token {token['content']!r} has id {i}, not {len(self.pieces)}")
            self.pieces.append(token["content"])
            added[token["content"]] = i
            if token.get("special"):
                self.special_ids[token["content"]] = i
        return added

    def _named_id(self, name: str, default: int) -> int:
        """The id of `eos_token`, say, by the config beside the model, else the model's own."""
        token = named_token(json_object(self._files, CONFIG_FILE), name)
        if token is None:
            return default
        if token not in self.special_ids:
            raise DataError(f"{CONFIG_FILE}: {name}={token!r} is no special token of the vocabulary")
        return self.special_ids[token]

    def _bytes_of(self, i: int) -> bytes:
        if self.pieces[i] in self.special_ids:
            return b""
        if i >= self._processor.vocab_size():
            return self.pieces[i].encode()
        if self._processor.is_byte(i):
            return bytes([int(self.pieces[i][3:-1], 16)])  # <0x0A>
        return self.pieces[i].replace(_SPACE_MARK, " ").encode()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [list(self._parts(text)) for text in texts]
        chunks = [chunk for text_parts in parts for chunk in text_parts]
        # For a single chunk, starting threads would take longer than encoding it.
        encode: Callable[[Any], Any] = self._processor.encode
        together = len(chunks) > 1 and not self.one_thread
        encoded = iter(encode(chunks) if together else map(encode, chunks))
        return [
            [i for chunk in text_parts for i in self._apart.get(chunk, list(next(encoded)))]
            for text_parts in parts
        ]

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self._model, **self._files}

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of the model, and of the tokens that the files beside it add."""
        return hashlib.sha256(self._model + (repr(self._added).encode() if self._added else b"")).hexdigest()

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        return cls(files[TOKENIZER_FILE])

    def _parts(self, text: str) -> Iterator[str]:
        """`text` in chunks that can be encoded separately; what is encoded apart is a chunk of its own."""
        text = without_lone_surrogates(text)
        apart = "|".join(map(re.escape, self._apart))
        for part in re.split(f"({apart})", self._prefix + text if text else ""):
            start = 0
            while len(part) - start > _CHUNK:
                end = self._safe_cut(part, start + _CHUNK)
                yield part[start:end]
                start = end
            if part[start:]:
                yield part[start:]

    def _safe_cut(self, text: str, position: int) -> int:
        """The first position from `position` on that no token spans: cutting there changes no token."""
        while position < len(text) and text[position - 1 : position + 1] in self._joined_pairs:
            position += 1
        return position

    @cached_property
    def _joined_pairs(self) -> set[str]:
        """Every pair of adjacent characters inside some token."""
        pieces = (piece.replace(_SPACE_MARK, " ") for piece in self.pieces)
        return {a + b for piece in pieces for a, b in pairwise(piece)}


def build_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> BaseTokenizer:
    """The tokenizer of `config`: loaded from its path, or trained on `documents` where that is None."""
    if config.path is not None:
        return load_tokenizer(config.path)
    return train_tokenizer(documents, vocab_size=config.vocab_size, max_bytes=config.train_bytes)


def load_tokenizer(path: str | Path) -> BaseTokenizer:
    """Read a sentencepiece .model file, a Hugging Face tokenizer.json, or a folder with either, with
    tiktoken's ranks as tokenizer.model (Llama 3's), or with vocab.json and merges.txt (GPT-2's, Qwen's).

    A folder with both (Llama 2's) is read as Hugging Face's if it also has a tokenizer_config.json, which
    names the special tokens and often includes a chat template. Raises DataError.
    """
    path = Path(path).expanduser()
    model, hf_model = path / TOKENIZER_FILE, path / HF_TOKENIZER_FILE
    beside = read_beside(path)
    if not path.is_dir():
        file = path
    elif hf_model.is_file() and (CONFIG_FILE in beside or not model.is_file()):
        file = hf_model
    elif not model.is_file() and (path / MERGES_FILE).is_file():
        file = path / MERGES_FILE
    else:
        file = model
    if not file.is_file():
        raise DataError(
            f"tokenizer: {file} does not exist; give a sentencepiece .model, a tokenizer.json, or a folder "
            f"with one or with {VOCABULARY_FILE} and {MERGES_FILE}"
        )
    try:
        return _read_tokenizer(file, beside)
    except DataError as error:
        raise DataError(f"tokenizer {file}: {error}") from error


def _read_tokenizer(file: Path, beside: Files) -> BaseTokenizer:
    """`beside`: the files beside it, where they belong to it. A tokenizer.json always has them."""
    from jaxllm.data.hf_tokenizer import HFTokenizer, read_hf_tokenizer

    if file.suffix == ".json":
        return read_hf_tokenizer(file)
    if file.name == MERGES_FILE:
        return HFTokenizer({**beside, HF_TOKENIZER_FILE: from_vocabulary_and_merges(file.parent, beside)})
    content = file.read_bytes()
    if is_tiktoken(content):
        return HFTokenizer({**beside, HF_TOKENIZER_FILE: from_tiktoken(content, beside)})
    return Tokenizer(content, beside)


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, max_bytes: int) -> Tokenizer:
    """Train byte-pair encoding with byte fallback on the first `max_bytes` of `documents`.

    The same text gives the same tokenizer. Where the text has too few repeated words for `vocab_size`, the
    vocabulary is smaller, which is printed. Raises ConfigError or DataError.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} is too small: {_RESERVED} tokens are reserved (every byte "
            f"and the special ones); use at least {_SMALLEST_VOCABULARY}"
        )
    lines = _training_lines(documents, vocab_size, max_bytes)
    if not lines:
        raise DataError("no text to train a tokenizer on")
    tokenizer = Tokenizer(_train(lines, vocab_size))
    if tokenizer.vocab_size < vocab_size:
        print(
            f"tokenizer: the text is too small for vocab_size={vocab_size}; it gives {tokenizer.vocab_size}",
            flush=True,
        )
    return tokenizer


def _train(lines: list[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        required_chars=_SPACE_MARK,  # even if the text has no space
        allow_whitespace_only_pieces=True,  # indentation
        split_digits=True,  # one token per digit, which makes arithmetic easier to learn
        control_symbols=[*CHAT_TOKENS, *SPARE_TOKENS],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece=PAD,
        bos_piece=BOS,
        eos_piece=EOS,
        unk_piece=UNKNOWN,
        minloglevel=2,
    )
    return model.getvalue()


def _training_lines(documents: Iterable[str], vocab_size: int, max_bytes: int) -> list[str]:
    """The text as short lines, since the trainer silently drops lines above 4192 bytes. A newline is encoded
    by its byte's token, as in Llama's tokenizers.

    Single characters get at most half of the free vocabulary; a Chinese or Japanese text would otherwise need
    thousands before its first word. Lines are split at the rarer characters, which are encoded as bytes.
    """
    lines: list[str] = []
    counts: Counter[str] = Counter()
    room = max_bytes
    for document in documents:
        for line in without_lone_surrogates(document).translate(_TRAINER_MARKS).split("\n"):
            for start in range(0, len(line), 1000):
                lines.append(line[start : start + 1000])
                counts.update(lines[-1])
                room -= len(lines[-1].encode())
            if room <= 0:
                break
        if room <= 0:
            break
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    rare = dict.fromkeys(map(ord, by_frequency[(vocab_size - _RESERVED) // 2 :]), "\n")
    return [part for line in lines for part in line.translate(rare).split("\n") if part] if rare else lines


def check_vocabulary(tokenizer: BaseTokenizer, vocab_size: int) -> None:
    """Raise DataError unless the model's embedding has a row for every token. JAX clamps an index that is out
    of range without an error."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size={vocab_size}; "
            f"set it to {tokenizer.vocab_size} or more"
        )
