"""A small Hugging Face tokenizer and conversations, for the tests of chat templates."""

import json

import pytest

from jaxllm.data.hf_tokenizer import HFTokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Alternating user and assistant messages."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return before + [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
    ]


TWO_TURNS = conversation("Who  left?\n", " Ada\n\nleft. ", "é漢?", "No 🙂", system="Be brief.")


def tokenizer_json(*, prefix: str = "") -> bytes:
    """One token per byte, and those of ChatML; `prefix` is put before each text."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    merges = [("h", "e"), ("Ċ", "Ċ"), ("A", "d"), ("Ġ", "A")]
    vocabulary = sorted(alphabet) + [a + b for a, b in merges]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, merges)
    )
    if prefix:
        backend.normalizer = tokenizers.normalizers.Prepend(prefix)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return backend.to_str().encode()


def hf_tokenizer(template: str | None = None, **options) -> HFTokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>"} | (
        {} if template is None else {"chat_template": template}
    )
    return HFTokenizer(
        {"tokenizer.json": tokenizer_json(**options), "tokenizer_config.json": json.dumps(config).encode()}
    )
