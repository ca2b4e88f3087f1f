"""What a row's columns are called, which of them are there, and that those that are not read are named."""

import json
from types import SimpleNamespace
from typing import cast

import pytest

from jaxllm.data.chat import ChatConfig, load_chats
from jaxllm.data.chat_template import NativeTemplate
from jaxllm.data.preferences import PreferenceConfig, load_preferences, preference_texts
from jaxllm.data.prompts import PromptConfig, PromptOptions, load_prompts
from jaxllm.data.text import TextConfig, load_text
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.completions import read_prompts
from jaxllm.evaluation.scoring import read_rows

COMMON = {
    "weights": (),
    "validation": (),
    "validation_fraction": 0.0,
    "synthetic_rows": 9,
    "sequence_length": 64,
    "batch_size": 2,
    "on_bad_row": "stop",
    "max_bad_fraction": 0.5,
}
RECORDS = COMMON | {"rename": (), "template": None}
CHAT = {"loss_on": "assistant", "packing": False, "overlong": "drop"}
PROMPT = {"prompt_format": None, "system": None}
PAIR = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Bo."}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def parquet(path, *records):
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture
def load(tokenizer):
    """(stage, source, fields of the config) -> the stage's data."""
    template = NativeTemplate(tokenizer)

    def run(stage, *train, **fields):
        config = RECORDS | {"train": train} | fields
        if stage == "sft":
            return load_chats(ChatConfig(**CHAT | config), tokenizer, template, seed=0)
        if stage == "pairs":
            return load_preferences(PreferenceConfig(**config), tokenizer, template, seed=0)
        config = PromptConfig(**PROMPT | config)
        return load_prompts(config, tokenizer, template, seed=0, max_new_tokens=8)

    return run


@pytest.fixture
def sides(load, tokenizer):
    """(source, fields of the config) -> the texts of the chosen and the rejected side of each pair."""

    def read(*train, **fields):
        (rows,) = load("pairs", *train, **fields).train
        return [tuple(tokenizer.decode(ids.tolist()) for ids in pair.ids) for pair in rows.pairs]

    return read


# rename


def test_two_columns_can_be_swapped(tmp_path, sides):
    path = write(tmp_path / "a.jsonl", PAIR)
    ((chosen, rejected),) = sides(path)
    assert sides(path, rename=("chosen=rejected", "rejected=chosen")) == [(rejected, chosen)]


def test_a_field_of_messages_is_renamed_once(tmp_path, load, tokenizer):
    row = {"dialog": [{"content": "user", "role": "Who?"}, {"content": "assistant", "role": "Ada."}]}
    rename = ("dialog=messages", "content=role", "role=content")
    (rows,) = load("sft", write(tmp_path / "a.jsonl", row), rename=rename).train
    (ids, _) = rows.sequences[0]
    assert tokenizer.decode(ids.tolist()) == "Who?Ada."


def test_lists_that_are_no_messages_keep_the_names_of_their_fields(tmp_path, load):
    row = {"question": "Who?", "cases": [{"said": "a", "question": "b"}]}
    path = write(tmp_path / "a.jsonl", row | {"prompt": [{"role": "user", "said": "Who?"}]})
    (prompts,) = load("rl", path, rename=("said=content",)).train
    assert prompts[0].row["cases"] == row["cases"]


def test_a_dotted_path_reads_the_layout_of_verl(tmp_path, load):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "What is 37 + 25?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "62"},
        "extra_info": {"split": "train", "index": 0},
    }
    path = parquet(tmp_path / "train.parquet", row)
    data = load("rl", path, rename=("reward_model.ground_truth=answer", "data_source=source"))
    (prompts,) = data.train
    kept = {name: value for name, value in row.items() if name != "data_source"}
    assert prompts[0].row == kept | {"answer": "62", "source": "openai/gsm8k"}
    assert "\n  columns for rewards only: ability, reward_model, extra_info, answer, source\n" in data.report


@pytest.mark.parametrize(
    ("row", "rename"),
    [
        ({"input": {"messages": "Who?"}}, "input.messages=prompt"),
        ({"a": {"b": {"c": "Who?"}}}, "a.b.c=prompt"),
        ({"a.b": "Who?"}, "a.b=prompt"),  # a column of that name, as flattened data sets have it
        ({"a.b": "Who?", "a": {"b": "No?"}}, "a.b=prompt"),
    ],
)
def test_a_dotted_path_may_lead_anywhere(tmp_path, sides, row, rename):
    flat = write(tmp_path / "flat.jsonl", PAIR)
    nested = write(tmp_path / "a.jsonl", {"chosen": "Ada.", "rejected": "Bo."} | row)
    assert sides(nested, rename=(rename,)) == sides(flat)


@pytest.mark.parametrize("stage", ["sft", "pairs", "rl"])
@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("qestion=prompt", "no row that was read has 'qestion'; did you mean 'question'?"),
        (
            "meta.ground_truht=answer",
            "no row that was read has 'meta.ground_truht'; did you mean 'meta.ground_",
        ),
        ("zz=prompt", "no row that was read has 'zz'; available: 'messages', 'chosen', "),
    ],
)
def test_a_rename_that_matches_nothing_is_an_error(tmp_path, load, stage, entry, hint):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    row = {"messages": turns, "chosen": turns, "rejected": [turns[0], turns[1] | {"content": "Bo."}]}
    row |= {"question": "Who?", "meta": {"ground_truth": 3}}
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(ConfigError) as error:
        load(stage, path, rename=(entry,))
    assert str(error.value).startswith(f"data.rename: {hint}")


def test_a_rename_may_be_for_one_of_several_sources(tmp_path, sides):
    native = write(tmp_path / "a.jsonl", PAIR)
    other = write(tmp_path / "b.jsonl", {"question": "Who?", "chosen": "Ada.", "rejected": "Bo."})
    evaluated = write(tmp_path / "c.jsonl", PAIR | {"prompt": "Where?"})
    data = sides(native, rename=())
    assert sides(other, validation=(evaluated,), rename=("question=prompt",)) == data


def test_rows_that_are_bad_for_want_of_a_rename_name_it(tmp_path, load):
    path = write(tmp_path / "a.jsonl", {"question": "Who?", "chosen": "Ada.", "rejected": "Bo."})
    with pytest.raises(DataError, match=r"a.jsonl:1: no prompt .*; data.rename: no row .*mean 'question'\?$"):
        load("pairs", path, rename=("qestion=prompt",))
    config = PreferenceConfig(**RECORDS | {"train": (path,), "rename": ("qestion=prompt",)})
    with pytest.raises(ConfigError, match=r"data.rename: no row that was read has 'qestion'"):
        list(preference_texts(config, seed=0))


def test_a_tokenizer_without_a_usable_row_names_the_first_problem(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question_text": "Who?", "resp": "Ada."})
    config = PreferenceConfig(**RECORDS | {"train": (path,)})
    with pytest.raises(DataError, match=r"no row .* can be used; the first: .*a.jsonl:1: .*chosen"):
        list(preference_texts(config, seed=0))


def test_two_columns_of_one_name_are_a_bad_row_unless_one_is_null(tmp_path, load, sides):
    rename = ("question=prompt",)
    path = write(tmp_path / "a.jsonl", PAIR | {"question": "Where?"})
    with pytest.raises(
        DataError, match=r"two columns of one name \(data.rename makes 'question' a second 'pro"
    ):
        load("pairs", path, rename=rename)
    for values in ({"question": "Who?", "prompt": None}, {"question": None, "prompt": "Who?"}):
        path = write(tmp_path / "b.jsonl", PAIR | values)
        assert sides(path, rename=rename) == sides(write(tmp_path / "c.jsonl", PAIR))


def test_scripts_check_their_rename_too(tmp_path, tokenizer):
    path, template = write(tmp_path / "a.jsonl", PAIR), NativeTemplate(tokenizer)
    options = cast("PromptOptions", SimpleNamespace(rename=["qestion=prompt"], **PROMPT))
    with pytest.raises(ConfigError, match=r"^--rename: no row that was read has 'qestion'; available: 'prom"):
        read_prompts(path, options, template, longest=99, max_rows=1, seed=0)
    with pytest.raises(ConfigError, match=r"^--rename: no row that was read has 'qestion'"):
        read_rows(path, template, longest=99, rename=options.rename)
    swapped, _ = read_rows(path, template, longest=99, rename=["chosen=rejected", "rejected=chosen"])
    as_it_is, _ = read_rows(path, template, longest=99, rename=[])
    assert swapped[0].sequences == as_it_is[0].sequences[::-1]
    assert swapped[0].record == PAIR


# null


def test_columns_that_arrow_fills_up_with_null_are_not_there(tmp_path, load, sides, tokenizer):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    shared = {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}
    rows = [
        {"prompt": "Who?", "completion": "Ada."},
        {"messages": turns},
        {"messages": list(shared)},
        {"instruction": "Who?", "output": "Ada."},
    ]
    (found,) = load("sft", parquet(tmp_path / "a.parquet", *rows, {"text": "Ada."})).train
    texts = [tokenizer.decode(ids.tolist()) for ids, _ in found.sequences]
    assert sorted(texts) == ["Ada.", *["Who?Ada."] * 4]
    pairs = [PAIR, {"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": 0}]
    expected = sides(write(tmp_path / "a.jsonl", PAIR))
    assert sides(parquet(tmp_path / "b.parquet", *pairs)) == expected * 2


def test_a_prompt_format_does_not_print_null(tmp_path, load):
    path = write(tmp_path / "a.jsonl", {"question": "Who?", "context": None})
    with pytest.raises(
        DataError, match=r"missing key \(data.prompt_format with question: KeyError\('context'"
    ):
        load("rl", path, prompt_format="{question} {context}")


def test_rewards_receive_null_as_null(tmp_path, load):
    (prompts,) = load("rl", write(tmp_path / "a.jsonl", {"prompt": "Who?", "answer": None})).train
    assert prompts[0].row == {"prompt": "Who?", "answer": None}


# The system text of a row


@pytest.mark.parametrize(
    "row", [{"prompt": "Who?"}, {"messages": [{"role": "user", "content": "Who?"}]}, PAIR], ids="".join
)
@pytest.mark.parametrize(
    ("system", "of_row", "expected"),
    [
        (None, "B", "B"),
        ("A", "B", "A\n\nB"),
        ("A", "A", "A"),
        ("A", None, "A"),
        ("A", "", "A"),
        (None, None, ""),
    ],
)
def test_prompts_start_with_the_system_text_of_the_run_and_that_of_the_row(
    tmp_path, load, tokenizer, row, system, of_row, expected
):
    path = write(tmp_path / "a.jsonl", row | {"system": of_row})
    (prompts,) = load("rl", path, system=system).train
    assert tokenizer.decode(prompts[0].ids) == expected + "Who?"


# Columns that are not read


SOME = {"id": 0, "tools": [{"type": "function"}], "empty": "", "none": None, "nothing": []}


@pytest.mark.parametrize(
    ("stage", "row", "line"),
    [
        ("sft", {"prompt": "Who?", "completion": "Ada.", "system": "Be brief."}, "columns that are not read"),
        ("sft", {"text": "Ada."}, "columns that are not read"),
        ("pairs", PAIR | {"system": "Be brief.", "margin": 1.0}, "columns that are not read"),
        ("rl", {"prompt": "Who?", "system": "Be brief."}, "columns for rewards only"),
    ],
)
def test_every_column_that_is_not_read_is_named_in_the_report(tmp_path, load, stage, row, line):
    path = write(tmp_path / "a.jsonl", row | SOME | {"split": "train"}, row | SOME)
    report = load(stage, path).report
    assert f"\n  {line}: id, tools, split (1 of 2 rows)\n" in report
    assert "columns" not in load(stage, write(tmp_path / "b.jsonl", row)).report


def test_fields_of_messages_that_are_not_read_are_named_too(tmp_path, load):
    turns = [{"role": "user", "content": "Who?", "name": "Bo"}, {"role": "assistant", "content": "Ada."}]
    report = load("sft", write(tmp_path / "a.jsonl", {"messages": turns})).report
    assert "\n  columns that are not read: messages.name\n" in report


def test_many_columns_are_counted(tmp_path, load):
    path = write(tmp_path / "a.jsonl", PAIR | {f"c{i}": i for i in range(40)})
    assert "c10, c11, 28 others\n" in load("pairs", path).report


def test_columns_of_a_prompt_format_are_read(tmp_path, load):
    path = write(tmp_path / "a.jsonl", {"question": "Who?", "context": "Ada", "system": "Be brief."})
    report = load("rl", path, prompt_format="{question} {context}").report
    assert "\n  columns for rewards only: system\n" in report


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
def test_pretraining_names_the_columns_besides_the_text(tmp_path, tokenizer, kind):
    rows = [
        {"text": "Ada left.", "title": "One", "url": "a"},
        {"text": "Bo left.", "title": "Two", "url": "b"},
    ]
    path = (parquet if kind == "a.parquet" else write)(tmp_path / kind, *rows)
    config = TextConfig(**COMMON | {"train": (path,), "text_key": "text"})
    for _ in range(2):  # tokenized, and from the cache
        assert "\n  columns that are not read: title, url\n" in load_text(config, tokenizer, seed=0).report
