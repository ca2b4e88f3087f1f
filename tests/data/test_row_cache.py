"""Conversations, pairs and prompts are tokenized once: a cache gives the same rows, report and bad rows."""

import dataclasses
import datetime
import json

import numpy as np
import pytest

from jaxllm.data import row_cache, source_cache
from jaxllm.data.base_tokenizer import BaseTokenizer
from jaxllm.data.chat import ChatConfig, load_chats
from jaxllm.data.chat_template import NativeTemplate
from jaxllm.data.preferences import PreferenceConfig, load_preferences
from jaxllm.data.prompts import PromptConfig, load_prompts
from jaxllm.data.row_cache import NOT_ENCODED, Encoder
from jaxllm.errors import ConfigError, DataError
from jaxllm.files import CACHE_VARIABLE
from jaxllm.stages.dpo import ReferenceConfig

pytestmark = pytest.mark.usefixtures("cache")

ROLES = ("system", "user", "assistant", "tool", "end")


class Letters(BaseTokenizer):
    """A token for each byte, so that what is pinned here depends on no library."""

    special_ids = {f"<|{name}|>": 259 + i for i, name in enumerate(ROLES)}  # noqa: RUF012
    pieces = [chr(i) for i in range(300)]  # noqa: RUF012
    token_bytes = [bytes([i % 256]) for i in range(300)]  # noqa: RUF012
    bos_id, eos_id, pad_id, hash = 256, 257, 258, "letters"
    stop_ids = (257,)

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


TOKENIZER = Letters()
TEMPLATE = NativeTemplate(TOKENIZER)
COMMON = {
    "weights": (),
    "validation": (),
    "validation_fraction": 0.3,
    "synthetic_rows": 30,
    "sequence_length": 64,
    "batch_size": 2,
    "on_bad_row": "skip",
    "max_bad_fraction": 0.5,
    "rename": (),
    "template": None,
}
CONFIGS = {
    "chats": ChatConfig(train=("a",), loss_on="assistant", packing=True, overlong="drop", **COMMON),
    "pairs": PreferenceConfig(train=("a",), **COMMON),
    "prompts": PromptConfig(train=("a",), prompt_format=None, system=None, **COMMON),
}


def load(kind, config, tokenizer=TOKENIZER, template=TEMPLATE, **options):
    if kind == "prompts":
        options = {"max_new_tokens": 8} | options
    function = {"chats": load_chats, "pairs": load_preferences, "prompts": load_prompts}[kind]
    return function(config, tokenizer, template, seed=0, **options)


def records(kind, count=40):
    """Rows of which some are of no use, some malformed, some with columns that are not read."""
    for i in range(count):
        made = {
            "chats": {"prompt": f"How is {i}?", "completion": "Well." * (1 + 20 * (i % 9 == 8))},
            "pairs": {"prompt": f"How is {i}?", "chosen": f"Well {i}.", "rejected": "Bad.", "margin": i / 8},
            "prompts": {"prompt": f"How is {i}?", "answer": i, "parts": {"é": [1.5, None]}},
        }[kind]
        if i % 7 == 6:
            made.pop("prompt")
        if i % 2:
            made["note"] = "x"
        yield {"text": "Once."} if (i, kind) == (5, "chats") else made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config_of(tmp_path):
    def config(kind, **changes):
        train = (write(tmp_path / f"{kind}.jsonl", records(kind)),)
        return dataclasses.replace(CONFIGS[kind], **{"train": train} | changes)

    return config


def seen(data):
    """All that a run sees of its data."""
    parts = (*data.train, *data.validation)
    rows = [part[i] for part in parts for i in range(len(part))]
    rows = [[np.asarray(field).tolist() for field in row] for row in rows]
    return data.report, data.fingerprint, rows, list(getattr(data, "held_out", ()))


def not_read(*_):
    raise AssertionError("the source was read")


# The fingerprints that earlier versions gave: they are in run.json, and a run with another one cannot be
# resumed.
FINGERPRINTS = {
    "chats": "15e4e781db9497354dbc8b27327e2bc8",
    "pairs": "f3cbd18c686737dcc0222cf971fe7bed",
    "prompts": "4bede6c9be8090535adb97bca072a895",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_those_of_earlier_versions(kind, config_of):
    assert load(kind, config_of(kind)).fingerprint == FINGERPRINTS[kind]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cached_run_has_the_same_rows_report_and_bad_rows(kind, config_of, tmp_path, monkeypatch):
    config = config_of(kind)
    first = seen(load(kind, config, run_folder=tmp_path / "first"))
    monkeypatch.setattr(row_cache, "write_source", not_read)
    assert seen(load(kind, config, run_folder=tmp_path / "second")) == first
    bad_rows = [(tmp_path / name / "bad_rows.jsonl").read_text() for name in ("first", "second")]
    assert bad_rows[0] == bad_rows[1] != ""
    assert "dropped" in first[0]
    assert "columns that are not read: note (" in first[0] or "columns for rewards only: " in first[0]


@pytest.mark.parametrize(("kind", "template"), [("chats", "native"), ("pairs", "chatml")])
def test_rows_do_not_depend_on_the_number_of_processes(
    kind, template, config_of, cache, monkeypatch, request
):
    """The tokenizer and the template are copied into the processes."""
    template = request.getfixturevalue(template)
    config = config_of(kind, sequence_length=200)
    first = seen(load(kind, config, template._tokenizer, template))
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "other"))
    monkeypatch.setattr(row_cache, "_BATCH_ROWS", 3)
    monkeypatch.setattr(source_cache, "num_processes", lambda: 2)
    assert seen(load(kind, config, template._tokenizer, template)) == first


def test_an_interrupted_run_is_continued(config_of, cache, monkeypatch):
    config = config_of("chats")
    whole = seen(load("chats", config))
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "other"))
    monkeypatch.setattr(row_cache, "_BATCH_ROWS", 3)
    monkeypatch.setattr(source_cache, "_RECORD_SECONDS", 0)
    monkeypatch.setattr(source_cache, "num_processes", lambda: 1)
    encode, encoded = row_cache.encode_rows, []

    def interrupted(rows, **options):
        encoded.extend(row.where for row in rows)
        if len(encoded) == 21:
            raise KeyboardInterrupt
        return encode(rows, **options)

    monkeypatch.setattr(row_cache, "encode_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("chats", config)
    assert seen(load("chats", config)) == whole
    assert encoded[21] == encoded[18]  # the batch that was lost


@pytest.mark.parametrize("damage", ["tokens", "loss_mask", "records", "meta.json", "id"])
def test_a_damaged_cache_is_encoded_again(config_of, cache, damage, capsys):
    config = config_of("pairs")
    whole = seen(load("pairs", config))
    (folder,) = (path for path in cache.iterdir() if path.name != "hashes")
    file = folder / ("tokens" if damage == "id" else damage)
    content = file.read_bytes()
    file.write_bytes(b"\xff\xff" + content[2:] if damage == "id" else content[:-1])
    assert seen(load("pairs", config)) == whole
    assert ("has the id 65535, but" in capsys.readouterr().err) == (damage == "id")


# What a cache depends on


REFERENCE = ReferenceConfig(train=("a",), reference="cached", **COMMON)


def test_every_field_that_could_change_a_row_is_in_the_key():
    """A new field is in the key until it is known to change no row."""
    kept = {"chats": {"loss_on", "overlong"}, "prompts": {"prompt_format", "system"}, "pairs": set()}
    left_out = set()
    for kind, config in (*CONFIGS.items(), ("pairs", REFERENCE)):
        key = dict(Encoder(len, TOKENIZER, TEMPLATE).identity(config)[-1])
        names = {"sequence_length", "rename", "template_options"} | kept[kind]
        assert key == {name: getattr(config, name) for name in names}
        left_out |= {field.name for field in dataclasses.fields(config)} - names
    assert left_out == NOT_ENCODED  # no other names


def test_an_edited_format_is_read_anew(config_of, cache, monkeypatch):
    load("pairs", config_of("pairs"))
    monkeypatch.setattr(row_cache, "code_hash", lambda: "edited")
    load("pairs", config_of("pairs"))
    assert len([path for path in cache.iterdir() if path.name != "hashes"]) == 2


def test_another_tokenizer_template_or_option_is_another_cache(config_of, cache):
    config = config_of("prompts")

    def number(config=config, **options):
        load("prompts", config, **options)
        return len([path for path in cache.iterdir() if path.name != "hashes"])

    other = Letters()
    other.hash = "other"
    template = NativeTemplate(TOKENIZER)
    template.clock = "2026-01-01T00:00:00"
    assert number() == number() == 1
    assert number(tokenizer=other) == 2
    assert number(template=template) == 3
    assert number(max_new_tokens=9) == 4
    assert number(dataclasses.replace(config, system="Think.")) == 5
    assert number(dataclasses.replace(config, rename=("answer=reply",))) == 6
    assert number(dataclasses.replace(config, batch_size=1, validation_fraction=0.5)) == 6


# Columns


def test_renamed_columns_are_checked_from_the_cache_too(config_of, tmp_path):
    rows = [{"question": f"How is {i}?", "chosen": f"Well {i}.", "rejected": "Bad."} for i in range(9)]
    files = (write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", records("pairs", 9)))
    config = config_of("pairs", train=files, rename=("question=prompt",), max_bad_fraction=0.9)
    wrong = dataclasses.replace(config, rename=("question=prompt", "questoin=note"))
    for _ in range(2):
        load("pairs", config)
        with pytest.raises(ConfigError, match=r"no row .* has 'questoin'; did you mean 'question'\?"):
            load("pairs", wrong)


def test_a_source_that_is_not_allowed_tells_what_was_not_renamed(config_of, cache):
    config = config_of("pairs", on_bad_row="stop", rename=("quest=prompt",))
    with pytest.raises(DataError, match=r"pairs.jsonl:7: .*; data.rename: no row that was read has 'quest'"):
        load("pairs", config)
    assert not [path for path in cache.iterdir() if path.name != "hashes"]


def test_rewards_receive_what_json_cannot_hold_as_text(tmp_path, config_of):
    import pyarrow
    import pyarrow.parquet

    table = {"prompt": ["How?", "Why?"], "at": [datetime.datetime(2026, 1, 2), None], "raw": [b"ab", b"\xff"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    config = config_of("prompts", train=(str(tmp_path / "a.parquet"),), validation_fraction=0.0)
    data = load("prompts", config)
    assert [data.train[0][i].row for i in range(2)] == [
        {"prompt": "How?", "at": "2026-01-02T00:00:00", "raw": "ab"},
        {"prompt": "Why?", "at": None, "raw": "/w=="},
    ]
