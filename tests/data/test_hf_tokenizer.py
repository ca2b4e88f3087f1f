"""A tokenizer.json encodes text as it defines, parses special tokens only on request, and keeps its files."""

import json
import sys

import numpy as np
import pytest

from jaxllm.data.hf_tokenizer import HFTokenizer
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "  two  spaces  and a trailing one ",
    "tabs\tand\r\nthe other newline\r",
    "NUL \0 inside",
    "👩‍👩‍👧‍👦 family, e\u0301 combined, 漢字 ①, \U0010ffff",
    "<s>hello<|end|></s><unk><0x0A>",
    "\u2581a real \u2581 is no space\u2581\u2581 \u2581",
]


def byte_level_json(documents) -> bytes:
    """Like GPT-2's, but with truncation and a BOS before each text, which some files define."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_tokens(["<thé>"])  # not a special token
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.enable_truncation(5)
    return backend.to_str().encode()


def sentencepiece_like_json(documents) -> bytes:
    """Like Llama 2's: U+2581 for spaces, one before each text, and byte fallback."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    backend.train_from_iterator([word for text in documents for word in text.split("\n")], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] in SPECIAL]
    return json.dumps(content).encode()


def make(content: bytes, config=CONFIG, **files: bytes) -> HFTokenizer:
    return HFTokenizer(
        {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config).encode()} | files
    )


@pytest.fixture(scope="module")
def byte_level(documents) -> HFTokenizer:
    return make(byte_level_json(documents))


@pytest.fixture(scope="module")
def sentencepiece_like(documents) -> HFTokenizer:
    return make(sentencepiece_like_json(documents))


@pytest.fixture(params=["byte_level", "sentencepiece_like"])
def any_tokenizer(request) -> HFTokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives_with_a_byte_length_for_each_token(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.token_byte_lengths[ids].sum() == len(
        (any_tokenizer._prefix * bool(text) + text).encode()
    )


def test_a_batch_is_encoded_like_its_texts(any_tokenizer):
    assert any_tokenizer.encode_batch(AWKWARD) == [any_tokenizer.encode(text) for text in AWKWARD]


def test_half_a_surrogate_pair_becomes_the_replacement_character(any_tokenizer):
    assert any_tokenizer.decode(any_tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert any_tokenizer.decode(any_tokenizer.encode_markup("a\ud83db")) == "a\ufffdb"


def test_the_name_of_a_special_token_is_text_unless_it_is_markup(any_tokenizer):
    text = "".join(SPECIAL)
    special = [any_tokenizer.special_ids[name] for name in SPECIAL]
    assert not set(special) & set(any_tokenizer.encode(text))
    assert any_tokenizer.encode_markup(text) == special
    assert any_tokenizer.decode(special) == ""


def test_truncation_and_added_tokens_of_the_file_are_ignored(byte_level):
    ids = byte_level.encode("a long enough text of many words, 漢字")
    assert len(ids) > 5
    assert byte_level.bos_id not in ids
    assert byte_level.encode_markup("a long enough text of many words, 漢字") == ids


def test_a_token_that_only_the_config_declares_special_is_special(documents):
    content = json.loads(byte_level_json(documents))
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != "</s>"]
    tokenizer = make(json.dumps(content).encode())
    assert tokenizer.eos_id not in tokenizer.encode("</s>")
    assert tokenizer.encode_markup("</s>") == [tokenizer.eos_id]
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""


def test_an_added_token_that_is_not_special_stands_for_its_text(byte_level):
    [i] = byte_level.encode("<thé>")
    assert byte_level.token_bytes[i] == "<thé>".encode()


def test_every_byte_has_a_token(any_tokenizer):
    assert {bytes([byte]) for byte in range(256)} <= set(any_tokenizer.token_bytes)
    assert any_tokenizer.vocab_size == len(any_tokenizer.pieces) == len(any_tokenizer.token_byte_lengths)
    assert any_tokenizer.token_byte_lengths.dtype == np.int32


def test_half_a_character_decodes_to_the_replacement_character(any_tokenizer):
    ids = any_tokenizer.encode("漢")
    assert any_tokenizer.decode(ids[:-1]) == "\ufffd"
    assert any_tokenizer.decode([any_tokenizer.vocab_size]) == "\ufffd"


def test_decode_drops_the_space_before_a_text_but_not_in_a_continuation(sentencepiece_like):
    ids = sentencepiece_like.encode("Ada left")
    assert sentencepiece_like.decode([sentencepiece_like.bos_id, *ids]) == "Ada left"
    assert sentencepiece_like.decode(ids, from_start=False) == " Ada left"


def test_markup_in_two_parts_is_encoded_like_the_whole(any_tokenizer):
    for after in ("\n", "</s>"):
        for text in ("Ada", " Ada", "<|end|>"):
            pieces = any_tokenizer.encode_markup(f"Bo{after}"), any_tokenizer.encode_markup(text, after=after)
            assert [*pieces[0], *pieces[1]] == any_tokenizer.encode_markup(f"Bo{after}{text}")


def test_special_tokens_that_include_the_space_after_them_are_found_with_it(documents):
    content = json.loads(byte_level_json(documents))
    next(each for each in content["added_tokens"] if each["content"] == "<|end|>")["rstrip"] = True
    tokenizer = make(json.dumps(content).encode())
    text = "a</s> <|end|> \n b"
    assert [match.group() for match in tokenizer.special_pattern.finditer(text)] == ["</s>", "<|end|> \n "]
    end = tokenizer.special_ids["<|end|>"]
    assert tokenizer.encode_markup("<|end|> \n b") == [end, *tokenizer.encode("b")]


def test_bos_eos_and_pad_come_from_the_config(documents, byte_level):
    ids = byte_level.special_ids
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.pad_id) == (ids["<s>"], ids["</s>"], ids["</s>"])
    assert byte_level.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>"}
    other = make(byte_level_json(documents), {"eos_token": "<|end|>", "pad_token": "<unk>"})
    assert (other.bos_id, other.eos_id, other.pad_id) == (ids["<|end|>"], ids["<|end|>"], ids["<unk>"])


def test_a_missing_eos_is_an_error_unless_there_is_exactly_one_special_token(documents):
    content = byte_level_json(documents)
    with pytest.raises(DataError, match=r"no EOS token; set eos_token in tokenizer_config.json"):
        HFTokenizer({"tokenizer.json": content})
    with pytest.raises(DataError, match="eos_token='<eos>' is not in the vocabulary"):
        make(content, {"eos_token": "<eos>"})
    only_one = json.loads(content)  # GPT-2's
    only_one["added_tokens"] = [each for each in only_one["added_tokens"] if each["content"] == "</s>"]
    tokenizer = HFTokenizer({"tokenizer.json": json.dumps(only_one).encode()})
    assert tokenizer.pieces[tokenizer.eos_id] == "</s>"


def test_the_template_file_precedes_the_template_of_the_config(documents, byte_level):
    content = byte_level_json(documents)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert byte_level.chat_template is None
    assert make(content, CONFIG | {"chat_template": "C"}).chat_template == "C"
    several = make(content, CONFIG | {"chat_template": named})
    assert several.chat_templates == {"tool_use": "T", "default": "D"}
    assert several.chat_template == "{% if tools %}\nT{% else %}\nD{% endif %}"  # as transformers chooses
    beside = {"chat_template.jinja": b"J"}
    assert make(content, CONFIG | {"chat_template": "C"}, **beside).chat_template == "J"


def write_files(tokenizer, folder):
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def test_its_files_are_loaded_as_the_same_tokenizer_and_its_hash_covers_them(byte_level, tmp_path):
    write_files(byte_level, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.hash == byte_level.hash
    assert loaded.encode("Ada 漢") == byte_level.encode("Ada 漢")
    hashes = {loaded.hash}
    for template in ("one", "another"):
        (tmp_path / "chat_template.jinja").write_text(template)
        hashes.add(load_tokenizer(tmp_path).hash)
    assert len(hashes) == 3


def test_a_folder_with_two_tokenizers_is_hugging_faces_if_it_has_its_config(tokenizer, byte_level, tmp_path):
    write_files(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).hash == tokenizer.hash
    (tmp_path / "tokenizer.json").write_bytes(byte_level.files()["tokenizer.json"])
    assert load_tokenizer(tmp_path).hash == tokenizer.hash
    write_files(byte_level, tmp_path)
    assert load_tokenizer(tmp_path).hash == byte_level.hash
    assert load_tokenizer(tmp_path / "tokenizer.model").hash == tokenizer.hash
    assert load_tokenizer(tmp_path / "tokenizer.json").hash == byte_level.hash


def test_a_file_that_is_not_a_tokenizer_is_named_in_the_error(documents, tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match=r"do not say how text is split.*=None.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json(documents))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config.json beside it is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template.jinja beside it is not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_would_lose_text_is_an_error():
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "word": 2}, unk_token="<unk>"))
    with pytest.raises(DataError, match="neither byte-level nor with byte fallback"):
        make(words.to_str().encode(), {"eos_token": "</s>"})


def test_without_the_extra_the_error_has_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxllm\[hf\]'"):
        make(b"{}")
