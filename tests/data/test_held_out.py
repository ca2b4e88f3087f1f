"""Held out means held out: no row is trained on whose question is evaluated, whatever its spelling."""

import ast
import json
from types import SimpleNamespace

import numpy as np
import pytest
from example_rows import in_memory
from test_chat import config as chat_config
from test_chat import turns

from jaxllm.data.chat import load_chats
from jaxllm.data.chat_template import NativeTemplate
from jaxllm.data.examples import Example, Examples, keep_apart
from jaxllm.data.held_out import canonical, is_held_out, read_keys, text_key
from jaxllm.data.prompts import question, question_messages
from jaxllm.data.rows import SourceCounts
from jaxllm.errors import DataError


@pytest.mark.parametrize(
    "text",
    [
        "what is rain?",
        " What is  rain? ",
        "What is\nrain?",
        "WHAT IS RAIN?",
        "Ｗhat is rain?",
        "What\u00a0is rain?",
    ],
)
def test_spellings_of_one_question_are_one_question(text):
    assert text_key(text) == text_key("What is rain?")
    assert text_key(text) != text_key("What is rain")


@pytest.mark.parametrize(
    "text", ["What is rain?", "A  b".replace("  ", " "), "One line.\n\nTwo: straße, é.", "日本語"]
)
def test_the_side_of_a_row_is_decided_by_its_text_as_it_always_was(text):
    assert canonical(text) == text


@pytest.mark.parametrize("text", [" a b", "a b\n", "a  b", "a\tb", "a\u00a0b", "ａ b", "a b\r\n"])
def test_blanks_and_forms_of_characters_do_not_decide_the_side_of_a_row(text):
    assert canonical(text) == "a b"


# Sources against each other


def examples(name, *questions) -> Examples:
    """A row for each question; several questions are the user's turns of one row."""
    asked = [each if isinstance(each, tuple) else (each,) for each in questions]
    rows = [
        Example(
            ids=(ids := np.frombuffer(repr(each).encode(), np.uint8),),
            loss_mask=(ids > 0,),
            group=each[0],
            kind="row",
            turns=each,
        )
        for each in asked
    ]
    return Examples(name, in_memory(rows), SourceCounts(rows=len(rows), documents=len(rows)), "hash")


def apart(train, validation, named=()):
    return keep_apart(
        [examples("train", *train), examples("validation", *validation)], 1, 0.0, {*map(text_key, named)}
    )


def groups(part):
    return [group_of(row) for row in part.rows]


def group_of(row):
    asked = ast.literal_eval(row.ids[0].astype(np.uint8).tobytes().decode())
    return asked[0]


def test_rows_that_ask_what_is_validated_on_are_dropped_and_counted():
    train, validation = apart(["a", "B ", "c", ("d", "b")], ["b", "e"])
    assert groups(train) == ["a", "c"]
    assert groups(validation) == ["b", "e"]
    assert "2 kept, 2 dropped (2 whose question is held out)" in train.describe()
    assert (
        "warning: 50% of the rows of train are not trained on: data.validation, data.held_out"
        in train.describe()
    )


def test_rows_that_ask_what_data_held_out_names_are_dropped():
    train, validation = apart(["a", "b"], ["b2"], named=["B"])
    assert groups(train) == ["a"]
    assert groups(validation) == ["b2"]


def test_where_nothing_overlaps_nothing_changes():
    parts = [examples("train", "a", "b"), examples("validation", "c")]
    assert keep_apart(parts, 1, 0.0, {text_key("d")}) == parts


def test_a_dropped_row_changes_the_fingerprint_and_a_repeated_held_out_row_does_not():
    train, validation = apart(["a", "b"], ["B", "c", "c"])
    assert train.fingerprint != "hash"
    assert validation.fingerprint == "hash"
    assert groups(validation) == ["B", "c"]
    assert "1 repeated in the held-out rows" in validation.describe()


def test_a_validation_source_that_names_the_training_file_is_an_error():
    with pytest.raises(DataError, match=r"data.train: train has no row left to train on: .* holds out all 2"):
        apart(["a", "b"], ["a", "b"])


def test_what_one_source_holds_out_no_other_trains_on():
    names = [f"question {i}" for i in range(200)]
    held_out = [name for name in names if is_held_out(name, 0.3)]
    one, other = keep_apart(
        [examples("one", *names), examples("other", *(name.upper() for name in names))], 2, 0.3, set()
    )
    for part in (one, other):
        trained, evaluated = part.split(0.3)
        assert trained
        assert not {text_key(group_of(row)) for row in trained} & {*map(text_key, held_out)}
        assert evaluated
    both = {text_key(group_of(row)) for part in (one, other) for row in part.split(0.3)[1]}
    assert not both & {text_key(group_of(row)) for part in (one, other) for row in part.split(0.3)[0]}


# The columns of rows


def test_a_prompt_format_does_not_make_another_question():
    row, system = {"question": "What is rain?", "answer": "Water"}, {"rename": (), "system": "Be brief."}
    plain, formatted = (
        question(record, question_messages(record, options)[1], options)
        for record, options in (
            ({"prompt": row["question"]}, SimpleNamespace(prompt_format=None, **system)),
            (row, SimpleNamespace(prompt_format="Solve: {question}\nShow your work.", **system)),
        )
    )
    assert plain == formatted == "What is rain?"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is rain?"},
        {"prompt": turns("system: Be brief.", "user: What is rain?", "assistant: Water.")},
        {"messages": turns("user: what is  rain?", "assistant: Water.")},
        {"text": "WHAT IS RAIN?"},
    ],
)
def test_a_source_of_held_out_questions_has_prompts_messages_or_texts(row, tmp_path):
    file = tmp_path / "benchmark.jsonl"
    file.write_text(json.dumps(row))
    assert read_keys([str(file)], synthetic_rows=1, seed=0) == {text_key("What is rain?")}


@pytest.mark.parametrize("row", [{"question": "a"}, {"prompt": 3}, {"messages": []}])
def test_a_row_without_a_question_is_an_error_since_it_would_hold_nothing_out(row, tmp_path):
    file = tmp_path / "benchmark.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(
        DataError, match=r"data.held_out: .*benchmark.jsonl:1: no `prompt`, `messages` or `text`"
    ):
        read_keys([str(file)], synthetic_rows=1, seed=0)


def test_chats_named_in_data_held_out_are_not_trained_on(tokenizer, tmp_path):
    chats, benchmark = tmp_path / "chats.jsonl", tmp_path / "benchmark.jsonl"
    rows = [{"prompt": f"Who is {name}?", "completion": "Ada."} for name in ("Ada", "Bo", "Eve")]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark.write_text(json.dumps({"prompt": "who is  bo?"}))
    template = NativeTemplate(tokenizer)
    data = load_chats(chat_config(chats, held_out=(str(benchmark),)), tokenizer, template, seed=0)
    assert "2 kept, 1 dropped (1 whose question is held out)" in data.report
    trained = tokenizer.decode([i for rows in data.train for ids, _ in rows.sequences for i in ids])
    assert "Eve" in trained
    assert "Bo" not in trained


def test_held_out_chats_to_complete_are_of_each_source_in_turn(tokenizer, tmp_path):
    sources = []
    for name in ("Ada", "Bo"):
        sources.append(tmp_path / f"{name}.jsonl")
        rows = [{"prompt": f"{name} {i}?", "completion": f"{name}."} for i in range(40)]
        sources[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = chat_config(*sources, validation_fraction=0.3)
    data = load_chats(config, tokenizer, NativeTemplate(tokenizer), seed=0)
    answers = [tokenizer.decode(answer) for _, answer in data.held_out[:4]]
    assert ["Ada" in answer for answer in answers] == [True, False, True, False]
