"""What lies beside a tokenizer is read in every form in which models come."""

import base64
import json

import pytest
from chat_templates import CHATML, conversation, hf_tokenizer

from jaxllm.data.byte_level import byte_of_character
from jaxllm.data.chat_template import NativeTemplate, PlainTextTemplate, load_template
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.data.tokenizer_files import BESIDE, has_chat_template
from jaxllm.errors import DataError
from jaxllm.training.run_folder import START_FILES

CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def hf_folder(folder, **files):
    """A tokenizer.json with `files`, whose names have "__" for a dot and "___" for a slash."""
    named = {name.replace("___", "/").replace("__", "."): content for name, content in files.items()}
    whole = {"tokenizer.json": hf_tokenizer().files()["tokenizer.json"], "tokenizer_config.json": CONFIG}
    return write(folder, whole | named)


# Chat templates


def named(**templates):
    return [{"name": name, "template": template} for name, template in templates.items()]


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({}, {}),
        ({"tokenizer_config__json": CONFIG | {"chat_template": "C"}}, {"default": "C"}),
        ({"chat_template__json": {"chat_template": "J"}}, {"default": "J"}),
        ({"chat_template__jinja": b"\xef\xbb\xbfT"}, {"default": "T"}),
        (
            {"chat_template__jinja": b"T", "tokenizer_config__json": CONFIG | {"chat_template": "C"}},
            {"default": "T"},
        ),
        (
            {"tokenizer_config__json": CONFIG | {"chat_template": named(default="D", rag="R")}},
            {"default": "D", "rag": "R"},
        ),
        (
            {"chat_template__jinja": b"T", "additional_chat_templates___rag__jinja": b"R"},
            {"default": "T", "rag": "R"},
        ),
    ],
)
def test_chat_templates_are_found_wherever_they_are(tmp_path, files, templates):
    tokenizer = load_tokenizer(hf_folder(tmp_path / "a", **files))
    assert tokenizer.chat_templates == templates
    assert tokenizer.chat_template == templates.get("default")
    assert has_chat_template(tmp_path / "a") == bool(templates)
    again = load_tokenizer(write(tmp_path / "b", tokenizer.files()))  # as a run saves it
    assert again.chat_templates == templates


def test_one_of_several_templates_is_chosen_by_its_name_or_by_the_tools(tmp_path):
    tools = "{{ tools[0].function.name }}" + CHATML  # cannot be rendered without tools
    templates = named(default=CHATML, tool_use=tools, brief=CHATML.replace("user", "u"))
    folder = hf_folder(tmp_path, tokenizer_config__json=CONFIG | {"chat_template": templates})
    tokenizer, messages = load_tokenizer(folder), conversation("a")
    template = load_template(tokenizer, None)
    plain = load_template(hf_tokenizer(CHATML), None).prompt(messages)
    assert template.prompt(messages) == plain
    assert tokenizer.decode(template.prompt(messages, tools=[{"function": {"name": "find"}}])).startswith(
        "find"
    )
    assert load_template(tokenizer, "brief").source == CHATML.replace("user", "u")


# What ends a completion


def test_every_eos_of_the_generation_config_ends_a_completion(tmp_path):
    ids = hf_tokenizer().special_ids
    generation = {"eos_token_id": [ids["<|im_start|>"], ids["</s>"]], "bos_token_id": ids["<|im_end|>"]}
    config = {"eos_token": "</s>", "pad_token": "</s>", "chat_template": CHATML}
    folder = hf_folder(tmp_path, generation_config__json=generation, tokenizer_config__json=config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (ids["</s>"], ids["<|im_start|>"])
    assert tokenizer.pad_id == tokenizer.eos_id  # Qwen's and many others'
    assert tokenizer.bos_id == ids["<|im_end|>"]  # of a tokenizer that names none
    assert PlainTextTemplate(tokenizer).stop_ids == tokenizer.stop_ids
    assert load_template(tokenizer, None).stop_ids == (ids["<|im_end|>"], *tokenizer.stop_ids)
    assert tokenizer.hash == load_tokenizer(without(folder, "generation_config.json")).hash


def without(folder, name):
    (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("eos", "error"),
    [("</s>", "eos_token_id='</s>' is not a token id"), ([10**6], "1000000 is not one of the 264 tokens")],
)
def test_an_eos_id_that_is_no_token_is_an_error(tmp_path, eos, error):
    with pytest.raises(DataError, match=f"generation_config.json: .*{error}"):
        load_tokenizer(hf_folder(tmp_path, generation_config__json={"eos_token_id": eos}))


def test_a_failed_start_leaves_none_of_these_files_behind():
    assert set(BESIDE) <= START_FILES


# Byte-level BPE without a tokenizer.json


def vocabulary_and_merges():
    model = json.loads(hf_tokenizer().files()["tokenizer.json"])["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"vocab.json": model["vocab"], "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode()}


ADDED = {
    "260": {"content": "<s>", "special": True},
    "261": {"content": "</s>", "special": True},
    "262": {"content": "<think>", "special": False},
}


@pytest.mark.parametrize("class_", ["Qwen2Tokenizer", "GPT2TokenizerFast"])
def test_vocab_json_with_merges_txt_is_read_as_its_class_says(tmp_path, class_):
    config = CONFIG | {"tokenizer_class": class_, "added_tokens_decoder": ADDED}
    folder = write(tmp_path / "a", vocabulary_and_merges() | {"tokenizer_config.json": config})
    tokenizer = load_tokenizer(folder)
    text = "he Ada\n\n\u00e9 123 <s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_ids == {"<s>": 260, "</s>": 261}
    assert tokenizer.encode("<think>") == [262]
    composed = tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert composed == (class_ == "Qwen2Tokenizer")  # which normalizes to NFC
    again = load_tokenizer(write(tmp_path / "b", tokenizer.files()))
    assert again.encode(text) == tokenizer.encode(text)


def test_a_class_that_is_not_known_is_named(tmp_path):
    config = CONFIG | {"tokenizer_class": "BartTokenizer"}
    with pytest.raises(DataError, match=r"tokenizer_class=BartTokenizer .* none of GPT2Tokenizer, "):
        load_tokenizer(write(tmp_path, vocabulary_and_merges() | {"tokenizer_config.json": config}))


def test_tiktokens_ranks_are_read_with_the_special_tokens_of_the_config(tmp_path):
    byte_of = byte_of_character()
    tokens = sorted(vocabulary_and_merges()["vocab.json"].items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(map(byte_of.get, t))).decode()} {i}" for t, i in tokens]
    files = {"tokenizer.model": "\n".join(lines).encode()}
    with pytest.raises(DataError, match="tiktoken's ranks name no special tokens"):
        load_tokenizer(write(tmp_path / "a", files))
    config = CONFIG | {"added_tokens_decoder": ADDED}
    tokenizer = load_tokenizer(write(tmp_path / "b", files | {"tokenizer_config.json": config}))
    text = "he Ada\n\n\u00e9 <s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.pieces[i] for i in tokenizer.encode("he\n\n")] == ["he", "ĊĊ"]
    assert tokenizer.encode_markup("<s>") == [260]


# A sentencepiece model with the files of Hugging Face


def test_a_sentencepiece_model_has_the_files_beside_it(tmp_path, tokenizer):
    size = tokenizer.vocab_size
    added = {
        str(size): {"content": "<|im_start|>", "special": True},
        str(size + 1): {"content": "<|im_end|>", "special": True},
        str(size + 2): {"content": "<think>", "special": False},
    }
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML, "added_tokens_decoder": added}
    files = tokenizer.files() | {"tokenizer_config.json": config}
    loaded = load_tokenizer(write(tmp_path / "a", files))
    assert (loaded.eos_id, loaded.bos_id) == (size + 1, tokenizer.bos_id)
    text = "Ada <think>left</think> <|im_end|>"
    assert loaded.decode(loaded.encode(text)) == text
    assert size + 2 in loaded.encode(text)
    assert not {size, size + 1} & set(loaded.encode(text))
    assert loaded.encode_markup("a<|im_end|>")[-1] == size + 1
    assert load_template(loaded, None).prompt(conversation("a"))[0] == size
    again = load_tokenizer(write(tmp_path / "b", loaded.files()))
    assert again.hash == loaded.hash != tokenizer.hash
    with pytest.raises(DataError, match="eos_token='<e>' is no special token"):
        Tokenizer(tokenizer.files()["tokenizer.model"], {"tokenizer_config.json": b'{"eos_token": "<e>"}'})


def test_an_exported_tokenizer_of_ours_is_the_same_with_its_own_template(tmp_path, tokenizer):
    files = tokenizer.files() | {"chat_template.jinja": NativeTemplate.AS_JINJA.encode()}
    loaded = load_tokenizer(write(tmp_path, files))
    assert loaded.hash == tokenizer.hash
    assert isinstance(load_template(loaded, None), NativeTemplate)
