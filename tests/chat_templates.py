"""A small Hugging Face tokenizer, templates like those of well-known models, and conversations."""

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


OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)
# As DeepSeek-R1's: the prompt opens a thought, and finished turns are rendered without theirs.
OPENS_THOUGHT = TURNS + OPENED
# As Qwen3's: `enable_thinking`, and the last turn alone with its thought.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# As Mistral's: the system message is part of the last user turn, until an answer follows.
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}<|im_end|>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "find", "arguments": {"q": "Ada"}}}
CALLED = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "[1]", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Ada."},
]


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
