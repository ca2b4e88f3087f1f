"""A tokenizer.json from the older files of byte-level BPE: vocab.json with merges.txt, and tiktoken's ranks.

These files do not say how a text is split into words before it is encoded; the class of the tokenizer does.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.data.tokenizer_files import CONFIG_FILE, Files, added_tokens, json_object
from jaxllm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"

# How words are cut: the regular expressions of the GPT-4 family of tokenizers, with N digits together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = _WORDS.format(digits=""), _WORDS.format(digits="{1,3}")
# Regular expression (None: GPT-2's, which the library has) and normalization, by the class of the tokenizer.
_CLASSES: dict[str, tuple[str | None, str | None]] = {
    "GPT2Tokenizer": (None, None),
    "Qwen2Tokenizer": (QWEN2, "NFC"),
}
_CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as it is, the other bytes as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def from_vocabulary_and_merges(folder: Path, files: Files) -> bytes:
    """The tokenizer.json of a folder with VOCABULARY_FILE and MERGES_FILE, and `files` beside them.

    Raises DataError for a class of tokenizer whose way of splitting text is not known here.
    """
    name = json_object(files, CONFIG_FILE).get("tokenizer_class") or _class_of_model(folder)
    splitting = _CLASSES.get(str(name).removesuffix("Fast"))
    if splitting is None:
        raise DataError(
            f"{VOCABULARY_FILE} and {MERGES_FILE} do not say how text is split, and tokenizer_class={name} "
            f"of {CONFIG_FILE} is none of {', '.join(_CLASSES)}; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes a tokenizer.json"
        )
    try:
        vocabulary = json.loads((folder / VOCABULARY_FILE).read_bytes())
        lines = (folder / MERGES_FILE).read_text(encoding="utf-8").split("\n")
        merges = [(a, b) for a, b in (line.split(" ") for line in lines if line and line[:8] != "#version")]
    except (OSError, ValueError) as error:
        raise DataError(f"{VOCABULARY_FILE} or {MERGES_FILE} cannot be read ({error})") from error
    return _tokenizer_json(vocabulary, merges, *splitting, files, ignore_merges=False)


def _class_of_model(folder: Path) -> str | None:
    """The class of tokenizer by the model_type of config.json, where tokenizer_config.json names none."""
    config = folder / "config.json"
    model_type = json.loads(config.read_bytes()).get("model_type") if config.is_file() else None
    return _CLASS_OF_MODEL.get(str(model_type))


def is_tiktoken(content: bytes) -> bool:
    """Whether a tokenizer.model is a list of base64 tokens with their ranks, as Llama 3's is."""
    try:
        token, rank = content.split(b"\n", 1)[0].split()
        return base64.b64decode(token, validate=True) != b"" and int(rank) >= 0
    except (ValueError, binascii.Error):
        return False


def from_tiktoken(content: bytes, files: Files) -> bytes:
    """The tokenizer.json of Llama 3's tokenizer.model, and `files` beside it, which name its special tokens.

    The file has tokens by rank and no merges: a token comes from every pair of other tokens that spell it.
    """
    if not added_tokens(files):
        raise DataError(f"tiktoken's ranks name no special tokens; a {CONFIG_FILE} beside them must")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in content.splitlines() if line)}
    character_of = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    merges = [
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], spelled(token[:cut]), spelled(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    return _tokenizer_json(vocabulary, pairs, LLAMA3, None, files, ignore_merges=True)


def _tokenizer_json(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    words: str | None,
    normalization: str | None,
    files: Files,
    *,
    ignore_merges: bool,
) -> bytes:
    """`ignore_merges`: a word that is a token is that token, whether or not merges lead to it."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    if normalization is not None:
        backend.normalizer = getattr(normalizers, normalization)()
    split: list[Any] = []
    if words is not None:
        split.append(pre_tokenizers.Split(tokenizers.Regex(words), "isolated"))
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, files)
    return backend.to_str().encode()


def _add_tokens(backend: "tokenizers.Tokenizer", files: Files) -> None:
    """Add the tokens that the files name, each at its id. Raises DataError where the ids leave gaps."""
    import tokenizers

    added = added_tokens(files) or {
        i: {"content": token, "special": True, "normalized": False}
        for token, i in backend.get_vocab().items()
        if token == "<|endoftext|>"  # GPT-2's, whose files have no config
    }
    for i, options in sorted(added.items()):
        known = {name: x for name, x in options.items() if name != "id" and not name.startswith("__")}
        token = tokenizers.AddedToken(**known)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != i:
            raise DataError(f"the added token {token.content!r} has id {i}, which is not the next free one")
