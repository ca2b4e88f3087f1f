"""The tokenizer loses nothing, parses no special token from text, and is the same for the same text."""

import hashlib
import io
import random

import numpy as np
import pytest
import sentencepiece

from jaxllm.data import tokenizer as tokenizer_module
from jaxllm.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)
from jaxllm.errors import ConfigError, DataError

AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "  two  spaces  and a trailing one ",
    "tabs\tand\r\nthe other newline\r",
    "NUL \0 inside",
    "a real \u2581 and the trainer's \u2585",
    "\u2581starts and ends with it\u2581",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, e\u0301 combined",
    "שלום \u202eright to left\u202c مرحبا",
    "private \ue000 unassigned \u0378 last \U0010ffff \ufffe\ufeff",
    "漢字とかなとＦｕｌｌ ①",
    "<|user|>hello<|end|></s><s><unk><pad><0x0A><|spare_0|>",
    "12345 + 678 = 13023",
]


def random_text(rng: random.Random) -> str:
    """Code points from all of Unicode but surrogates, between ordinary words and awkward pieces."""
    ordinary = [" ", "  ", "\n", "the", "Ada", "<|user|>", "</s>", "\u2581", "\0", "\t", "\u200d", "🙂"]

    def character() -> str:
        code = rng.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    return "".join(rng.choice([character(), rng.choice(ordinary)]) for _ in range(rng.randrange(60)))


def llama_like_model(documents, **options) -> bytes:
    """A model like Llama 2's: a space put before each text, none of our special tokens, no pad id."""
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 350,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.split("\n")),
        model_writer=model,
        **(defaults | options),
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def llama_like(documents) -> Tokenizer:
    return Tokenizer(llama_like_model(documents))


@pytest.fixture(params=["ours", "llama_like"])
def any_tokenizer(request, tokenizer, llama_like) -> Tokenizer:
    return tokenizer if request.param == "ours" else llama_like


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives(any_tokenizer, text):
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_random_unicode_survives(any_tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)]
    assert [any_tokenizer.decode(ids) for ids in any_tokenizer.encode_batch(texts)] == texts


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_what_looks_like_a_special_token_is_text(any_tokenizer):
    ids = any_tokenizer.encode("<|user|><|assistant|><|end|></s><s><unk><pad><0x0A>")
    pieces = {any_tokenizer.pieces[i] for i in ids}
    assert not pieces & {"<|user|>", "<|assistant|>", "<|end|>", "</s>", "<s>", "<unk>", "<pad>", "<0x0A>"}


def test_special_tokens_in_the_training_text_are_text_too(documents):
    chatty = train_tokenizer(["<|user|>hi<|end|></s>\n" * 500, *documents], vocab_size=600, max_bytes=10**6)
    ids = chatty.encode("<|user|>hi<|end|></s>")
    assert not {chatty.pieces[i] for i in ids} & {"<|user|>", "<|end|>", "</s>"}
    assert chatty.decode(ids) == "<|user|>hi<|end|></s>"


def test_encode_adds_neither_bos_nor_eos(any_tokenizer):
    assert not {any_tokenizer.bos_id, any_tokenizer.eos_id} & set(any_tokenizer.encode("Ada left."))
    assert any_tokenizer.encode("") == []


def test_a_newline_is_one_token_and_common_words_are_too(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("\n\n")] == ["\n", "\n"]
    assert len(tokenizer.encode(" counted")) == 1


def test_decode_of_any_part_never_fails(any_tokenizer):
    ids = any_tokenizer.encode("漢🙂 end")
    for start in range(len(ids)):
        for end in range(start, len(ids) + 1):
            any_tokenizer.decode(ids[start:end])
    assert any_tokenizer.decode(np.array(ids[:2], np.int32)).endswith("\ufffd")


def test_decode_gives_replacement_characters_for_ids_outside_the_vocabulary(tokenizer):
    """A model's embedding may have more rows than there are tokens, so that it can sample such an id."""
    assert tokenizer.decode([-1, tokenizer.vocab_size]) == "\ufffd\ufffd"


def test_decode_skips_special_tokens(tokenizer):
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id, 3]) == "hi"


def test_byte_lengths_add_up_to_the_text(tokenizer):
    for text in AWKWARD:
        assert tokenizer.token_byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert all(tokenizer.token_byte_lengths[i] == 0 for i in tokenizer.special_ids.values())
    assert tokenizer.token_byte_lengths.dtype == np.int32
    assert tokenizer.token_byte_lengths.shape == (tokenizer.vocab_size,)


def test_special_ids_exist_and_differ(tokenizer):
    names = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|spare_0|>")
    assert len({tokenizer.special_ids[name] for name in names}) == len(names)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_a_model_without_a_pad_token_gets_a_valid_pad_id(llama_like):
    assert 0 <= llama_like.pad_id < llama_like.vocab_size


def test_decode_drops_the_space_before_a_text_but_not_in_a_continuation(llama_like):
    ids = llama_like.encode("Ada left")
    assert ids == sentencepiece.SentencePieceProcessor(model_proto=llama_like._model).encode("Ada left")
    assert llama_like.decode([llama_like.bos_id, *ids]) == "Ada left"
    assert llama_like.decode(ids, from_start=False) == " Ada left"


def test_cutting_a_long_text_changes_no_token(any_tokenizer, documents, monkeypatch):
    texts = ["".join(documents), " ".join(AWKWARD), "漢字" * 50 + "Ada " * 50, "a" * 500, " " * 500]
    whole = any_tokenizer.encode_batch(texts)
    monkeypatch.setattr(tokenizer_module, "_CHUNK", 7)
    assert any_tokenizer.encode_batch(texts) == whole


def test_the_same_text_gives_the_same_tokenizer(tokenizer, documents):
    again = train_tokenizer(iter(documents), vocab_size=400, max_bytes=1_000_000)
    other = train_tokenizer(documents[:100], vocab_size=400, max_bytes=1_000_000)
    assert again.hash == tokenizer.hash != other.hash


def test_training_stops_reading_at_max_bytes(documents):
    def endless():
        while True:
            yield from documents

    train_tokenizer(endless(), vocab_size=300, max_bytes=20_000)


def test_a_text_of_one_long_line_is_not_dropped():
    """The trainer silently drops lines above 4192 bytes."""
    trained = train_tokenizer(["a harbour and a garden " * 2000], vocab_size=300, max_bytes=10**6)
    assert len(trained.encode(" harbour")) == 1


def test_lines_with_the_trainers_own_mark_are_not_dropped():
    trained = train_tokenizer(["a harbour \u2585 and a garden\n" * 200], vocab_size=300, max_bytes=10**6)
    assert len(trained.encode(" harbour")) == 1


def test_a_text_of_thousands_of_characters_fits_a_small_vocabulary():
    text = "".join(chr(0x4E00 + i) for i in range(3000)) + "猫が犬を見た。" * 500
    trained = train_tokenizer([text], vocab_size=400, max_bytes=10**6)
    assert trained.vocab_size <= 400
    assert len(trained.encode("猫が犬を見た")) == 1
    assert trained.decode(trained.encode(text + " ")) == text + " "


def test_a_text_too_small_for_vocab_size_gives_a_smaller_vocabulary_and_a_message(capsys):
    assert train_tokenizer(["ab"], vocab_size=5000, max_bytes=1000).vocab_size < 300
    assert "too small for vocab_size=5000" in capsys.readouterr().out


def test_a_vocab_size_too_small_for_the_bytes_is_an_error():
    with pytest.raises(ConfigError, match=r"vocab_size=256 is too small: .* at least 300"):
        train_tokenizer(["some text"], vocab_size=256, max_bytes=1000)
    assert train_tokenizer(["some text"], vocab_size=300, max_bytes=1000).vocab_size <= 300


def test_no_text_is_an_error():
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([], vocab_size=400, max_bytes=1000)


def test_its_file_is_loaded_as_the_same_tokenizer(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files()["tokenizer.model"])
    loaded = load_tokenizer(tmp_path)  # a run's folder
    assert loaded.hash == tokenizer.hash
    assert loaded.hash == hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
    assert loaded.encode("Ada 漢") == tokenizer.encode("Ada 漢")
    config = TokenizerConfig(path=str(tmp_path / "tokenizer.model"), vocab_size=999, train_bytes=1)
    assert build_tokenizer(config, iter([])).hash == tokenizer.hash


def test_a_config_without_a_path_trains(documents, tokenizer):
    config = TokenizerConfig(path=None, vocab_size=400, train_bytes=1_000_000)
    assert build_tokenizer(config, documents).hash == tokenizer.hash


def test_a_file_that_is_not_a_tokenizer_is_named_in_the_error(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer.model does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("a model\n")
    with pytest.raises(DataError, match=r"tokenizer.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"byte_fallback": False, "vocab_size": 100}, "lacks tokens for single bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"bos_id": -1}, "no BOS token or no EOS token"),
    ],
)
def test_a_model_that_would_lose_text_is_an_error(documents, options, reason):
    with pytest.raises(DataError, match=reason):
        Tokenizer(llama_like_model(documents, **options))


def test_a_model_with_fewer_rows_than_tokens_is_an_error(tokenizer):
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(DataError, match=rf"{tokenizer.vocab_size} tokens, but model.vocab_size=128"):
        check_vocabulary(tokenizer, 128)
