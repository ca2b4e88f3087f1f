"""Encodings and renderings equal those of transformers: of small tokenizers that are made here, and of real
ones where their files are (JAXLLM_SHARED_DATA, else ../shared/data). `pytest -s` prints a table.

Where they differ on purpose: transformers 5 builds the tokenizers of Llama 2 and SmolLM2 anew from their
vocabularies, and leaves out how their files split text; a real U+2581 is a space there. Those two are
compared with the libraries that define the files.
"""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from chat_templates import (
    CALLED,
    CHATML,
    FIND,
    SYSTEM_LAST,
    THINKS,
    TOOLS,
    conversation,
    hf_tokenizer,
)
from test_tokenizer_files import ADDED, CONFIG, vocabulary_and_merges, write

from jaxllm.data.chat_template import load_template
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.tokenizer_files import default_template

transformers = pytest.importorskip("transformers")

SHARED = Path(os.environ.get("JAXLLM_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = SHARED / "tokenizers"
needs_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real tokenizers in {REAL}")

TEXTS = (
    *("", " ", "Hello world", "  two  spaces ", "\n\n a\n", "tabs\tand\r\nthe other\r", "NUL \0 x", "   "),
    "👩‍👩‍👧‍👦 e\u0301 漢字 ① ﬁ Å \ufb01",
    *("1234567890 12.5%", "def f(x):\n    return x\n\n\n    y", "don't I'LL", "a\u00a0b\u2003c", "x" * 300),
    *("吾輩は猫である。", "мир 안녕 שלום", "<think>a</think><tool_call>{}</tool_call>"),
)
# Files of each folder, by their names there; "=" for those with another name.
QWEN = ("qwen2.5/vocab.json", "qwen2.5/merges.txt")
FOLDERS = {
    "gpt2": ("gpt2/tokenizer.json",),
    "gpt2, vocab.json": ("gpt2/vocab.json", "gpt2/merges.txt"),
    "llama3, tiktoken": ("llama3/tokenizer.model", "llama3/tokenizer_config.json"),
    "qwen2.5": (*QWEN, "qwen2.5/tokenizer_config.json"),
    "qwen2.5-instruct": (*QWEN, "tokenizer_config.json=qwen2.5/tokenizer_config_instruct.json"),
    "qwen3": (*QWEN, "qwen3/tokenizer_config.json"),
}
SMOLLM2 = ("smollm2/tokenizer.json", "smollm2/tokenizer_config.json", "smollm2/chat_template.jinja")
ADDED_NAMES = (
    *("<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
)


@functools.cache
def pair(name: str):
    """A real tokenizer, as read here and by transformers; "added": SmolLM2's with tokens of other models."""
    if "tiktoken" in name:
        pytest.importorskip("tiktoken")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in FOLDERS.get(name, SMOLLM2):
            target, _, source = file.rpartition("=")
            shutil.copyfile(REAL / source, folder / (target or Path(source).name))
        if "gpt2" in name:
            (folder / "config.json").write_text('{"model_type": "gpt2"}')
        if name == "added":
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            theirs.add_special_tokens({"additional_special_tokens": list(ADDED_NAMES)})
            theirs.save_pretrained(folder)
        return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def check_encodings(name: str, ours, theirs) -> None:
    """Text, special tokens in markup, decoding, and decoding token by token."""
    assert ours.vocab_size == len(theirs)
    special = list(ours.special_ids)[:8]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        markup = text.join(special) + text
        assert ours.encode_markup(markup) == theirs.encode(markup, add_special_tokens=False), text
        shown = ""
        for end in range(1, len(ids) + 1):
            whole = ours.decode(ids[:end], from_start=False).rstrip("\ufffd")
            assert whole.startswith(shown)
            shown = whole
    print(f"{name:20} {type(theirs).__name__:20} {len(TEXTS)} texts equal, {ours.vocab_size} tokens")


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_encodings_of_a_small_tokenizer(tmp_path, model_type):
    config = CONFIG | {"added_tokens_decoder": ADDED, "unk_token": "</s>", "pad_token": "</s>"}
    files = {"tokenizer_config.json": config, "config.json": {"model_type": model_type}}
    write(tmp_path, vocabulary_and_merges() | files)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    check_encodings(f"small {model_type}", ours, theirs)


@needs_files
@pytest.mark.parametrize("name", FOLDERS)
def test_encodings_of_real_tokenizers(name):
    check_encodings(name, *pair(name))


@needs_files
@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_a_tokenizer_json_is_encoded_as_the_file_says(name):
    tokenizers = pytest.importorskip("tokenizers")
    ours = load_tokenizer(REAL / name)
    theirs = tokenizers.Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
    first, second = list(ours.special_ids)[1:3]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        markup = f"{first}{text}{second}{text}"
        assert ours.encode_markup(markup) == theirs.encode(markup, add_special_tokens=False).ids, text


@needs_files
@pytest.mark.parametrize(
    "file", ["llama2/tokenizer.model", "storyllamas/tokenizer_4096.model", "tok512/tok512.model"]
)
def test_a_sentencepiece_model_is_encoded_as_its_library_does(file):
    """Up to the white space that some models remove, which we keep."""
    from sentencepiece import SentencePieceProcessor

    ours, theirs = load_tokenizer(REAL / file), SentencePieceProcessor(model_file=str(REAL / file))
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
        if theirs.decode(theirs.encode(text)) == text:
            assert ours.encode(text) == theirs.encode(text), text


# Chat templates

# Which tokenizer has the special tokens of a template; the others are added to one.
TOKENIZERS = {"hermes": "qwen3", "llama": "llama3, tiktoken", "qwen3": "qwen3", "qwen2": "qwen2.5-instruct"}

REASONED = [
    {**message, "reasoning_content": "hm"} if message["role"] == "assistant" else message
    for message in conversation("a", "b", "c", "d")
]
CONVERSATIONS = {
    "one turn": (conversation("Hi é\n", " Hello "), None),
    "system": (conversation("a", "b", "c", "d", system="Be brief."), None),
    "reasoning": (REASONED, None),
    "thoughts in the content": (conversation("a", "<think>\nx\n</think>\n\nb", "c", "d"), None),
    "tools": (CALLED, [FIND | {"function": FIND["function"] | {"description": "Finds."}}]),
}


def check_renderings(name: str, template, theirs) -> None:
    """Every conversation that the template renders without loss, as a row and as a prompt."""
    equal, rejected = [], []
    for kind, (messages, tools) in CONVERSATIONS.items():
        options = [{}, {"enable_thinking": False}] if "enable_thinking" in template.options else [{}]
        try:
            prompts = [template.prompt(messages[:-1], tools=tools, options=each) for each in options]
            row = template.encode(messages, loss_on="last", tools=tools).ids
        except BadRow as error:
            rejected.append(f"{kind} ({error.problem})")
            continue
        for prompt, each in zip(prompts, options, strict=True):
            assert prompt == theirs.apply_chat_template(
                messages[:-1], tools=tools, add_generation_prompt=True, return_dict=False, **each
            ), kind
        assert row[: len(prompts[0])] == prompts[0]
        whole = theirs.apply_chat_template(messages, tools=tools, return_dict=False)
        if whole[: len(prompts[0])] == prompts[0]:  # else the template rewrites the prompt of an answer
            assert row == whole, kind
        equal.append(kind)
    print(f"{name:44} equal: {', '.join(equal)}; rejected: {', '.join(rejected) or 'none'}")
    assert "one turn" in equal


@pytest.mark.parametrize(
    "source", [CHATML, THINKS, TOOLS, SYSTEM_LAST], ids=["chatml", "thinks", "tools", "mistral"]
)
def test_renderings_of_a_small_template(tmp_path, source):
    files = hf_tokenizer().files() | {"chat_template.jinja": source.encode()}
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write(tmp_path, files | {"tokenizer_config.json": config})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    check_renderings("small", load_template(load_tokenizer(tmp_path), None), theirs)


@needs_files
@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5-instruct", "qwen3", "smollm2"])
def test_renderings_of_the_tokenizers_own_templates(name):
    ours, theirs = pair(name)
    check_renderings(name, load_template(ours, None), theirs)


@needs_files
@pytest.mark.parametrize("file", sorted(each.name for each in REAL.glob("chat_templates/*.jinja")))
def test_renderings_of_real_templates(tmp_path, monkeypatch, file):
    source = (REAL / "chat_templates" / file).read_text()
    templates = {"default": source}
    base = next((name for part, name in TOKENIZERS.items() if part in file.lower()), "added")
    if "tool_use" in file:  # one of two templates, which cannot be rendered without tools
        templates = {"default": CHATML, "tool_use": source}
    ours, theirs = pair(base)
    (tmp_path / "chat.jinja").write_text(default_template(templates))
    monkeypatch.setattr(theirs, "chat_template", source if len(templates) == 1 else templates)
    check_renderings(file, load_template(ours, str(tmp_path / "chat.jinja")), theirs)
