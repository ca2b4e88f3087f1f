"""Preference pairs: every public format is read as the right prompt and completions, none truncated."""

import json

import numpy as np
import pytest

from jaxllm.data.chat_template import JinjaTemplate, NativeTemplate
from jaxllm.data.examples import Example
from jaxllm.data.preferences import (
    PairRows,
    PreferenceConfig,
    encoder,
    is_pair,
    load_preferences,
    pair,
    preference_texts,
)
from jaxllm.data.records import Rename
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow
from jaxllm.errors import DataError


def turns(*written: str) -> list[dict[str, str]]:
    """Messages written as "role: content"."""
    return [dict(zip(("role", "content"), each.split(": ", 1), strict=True)) for each in written]


WHO = turns("user: Who?")
ADA, BO = turns("assistant: Ada.", "assistant: Bo.")
LONGER = turns("user: One?", "assistant: 1.", "user: Who?")

# Formats


@pytest.mark.parametrize(
    ("record", "kind", "prompt"),
    [
        ({"prompt": "Who?", "chosen": "Ada.", "rejected": "Bo."}, "prompt, chosen, rejected", WHO),
        ({"prompt": LONGER, "chosen": [ADA], "rejected": [BO]}, "prompt, chosen, rejected", LONGER),
        ({"prompt": LONGER, "chosen": "Ada.", "rejected": "Bo."}, "prompt, chosen, rejected", LONGER),
        (
            {"prompt": "Who?", "chosen": [*WHO, ADA], "rejected": [*WHO, BO]},
            "prompt, chosen, rejected",
            WHO,
        ),
        (
            {"prompt": "One?", "chosen": [*LONGER[1:], ADA], "rejected": [*LONGER[1:], BO]},
            "prompt, chosen, rejected",
            LONGER,
        ),
        (
            {"instruction": "Who", "input": "won?", "chosen": "Ada.", "rejected": "Bo."},
            "instruction, input, chosen, rejected",
            turns("user: Who\n\nwon?"),
        ),
        ({"chosen": [*LONGER, ADA], "rejected": [*LONGER, BO]}, "messages", LONGER),
        (
            {
                "chosen": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}],
                "rejected": [*WHO, BO],
            },
            "messages",
            WHO,
        ),
        (
            {
                "chosen": "\n\nHuman: One?\n\nAssistant: 1.\n\nHuman: Who?\n\nAssistant: Ada.",
                "rejected": "\n\nHuman: One?\n\nAssistant: 1.\n\nHuman: Who?\n\nAssistant: Bo.",
            },
            "transcripts",
            LONGER,
        ),
        ({"prompt": "Who?", "answers": ["Bo.", "Ada."], "choice": 1}, "prompt, answers, choice", WHO),
        ({"prompt": LONGER, "answers": ["Ada.", "Bo."], "choice": 0}, "prompt, answers, choice", LONGER),
    ],
)
def test_each_format_becomes_this_prompt_and_these_two_completions(record, kind, prompt):
    assert pair(record) == (kind, prompt, ADA, BO)
    assert is_pair(record)


def test_rename_applies_to_columns_and_inside_messages():
    messages = ({"speaker": "user", "said": "Who?"}, {"speaker": "assistant", "said": "Ada."})
    record = {"better": [messages[1]], "worse": "Bo.", "question": [messages[0]]}
    rename = ("better=chosen", "worse=rejected", "question=prompt", "speaker=role", "said=content")
    renamed = Rename(rename)(record)
    assert pair(renamed) == ("prompt, chosen, rejected", WHO, ADA, BO)
    assert is_pair(renamed)
    assert not is_pair(record)


def test_a_transcript_may_have_blank_lines_and_the_names_of_the_roles():
    text = "\n\nHuman: What is\n\na Human: or\nHuman: or\n\nHumans?\n\nAssistant:"
    ends = {"chosen": text + " Ada.", "rejected": text + " Bo."}
    assert pair(ends)[1] == turns("user: What is\n\na Human: or\nHuman: or\n\nHumans?")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"prompt": "Who?", "chosen": "Ada."},
            "missing key (no 'rejected' among prompt, chosen; set data.",
        ),
        ({"question": "Who?"}, "missing key (no 'chosen' among question; set data.rename=THEIRS=OURS)"),
        (
            {"prompt": "Who?", "chosen": 3, "rejected": "Bo."},
            "wrong type (a completion is a number, not a string or a",
        ),
        (
            {"prompt": [3], "chosen": "Ada.", "rejected": "Bo."},
            "wrong type (a message is a number, not an obj",
        ),
        (
            {"chosen": "Ada.", "rejected": "Bo."},
            "no prompt (without 'prompt', a text must be a transcript of H",
        ),
        (
            {
                "chosen": "Hi\n\nHuman: Who?\n\nAssistant: Ada.",
                "rejected": "\n\nHuman: Who?\n\nAssistant: Bo.",
            },
            "no prompt (without 'prompt', a text must be a transcript of Human: and Assistant: turns)",
        ),
        (
            {"chosen": [ADA], "rejected": [BO]},
            "no common prompt (chosen and rejected differ from the first turn",
        ),
        ({"prompt": "Who?", "answers": ["Ada."], "choice": 0}, "wrong type ('answers' must be a list of two"),
        (
            {"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": 2},
            "wrong type ('choice' is 2, not 0, 1, t",
        ),
        (
            {"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": True},
            "wrong type ('choice' is True, not ",
        ),
        (
            {"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": 1.0},
            "wrong type ('choice' is 1.0, not 0,",
        ),
    ],
)
def test_a_record_of_another_format_is_a_bad_row_with_the_reason(record, problem):
    with pytest.raises(BadRow) as error:
        pair(record)
    assert str(error.value).startswith(problem)
    assert error.value.fault


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "Who?", "chosen": "Ada.", "rejected": "Ada."}, "identical pair"),
        ({"chosen": [*WHO, ADA], "rejected": [*WHO, ADA]}, "identical pair"),
        ({"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": "tie"}, "tie"),
        ({"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": "bad"}, "tie"),
        ({"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": None}, "no choice"),
        (
            {"chosen": [*WHO, ADA, *WHO, ADA], "rejected": [*WHO, BO, *WHO, BO]},
            "completions of several turns (they differ from turn 2 on)",
        ),
        (
            {"chosen": [*WHO, ADA], "rejected": [*WHO]},
            "completions of several turns (they differ from turn 2 on)",
        ),
    ],
)
def test_a_pair_without_a_preference_is_dropped_and_no_fault(record, problem):
    with pytest.raises(BadRow) as error:
        pair(record)
    assert str(error.value) == problem
    assert not error.value.fault


@pytest.mark.parametrize(
    "ask", ["Who?", " Who?\n", turns("user: Who? "), LONGER, turns("system: S", *("user: Who?",))]
)
@pytest.mark.parametrize("spaced", ["Who?", "Who?  "])
def test_a_prompt_that_whole_conversations_repeat_is_asked_once(ask, spaced):
    asked = [*LONGER[:-1], {"role": "user", "content": spaced}]
    found = pair({"prompt": ask, "chosen": [*asked, ADA], "rejected": [*asked, BO]})
    system = turns("system: S") if ask[0] == {"role": "system", "content": "S"} else []
    assert found == ("prompt, chosen, rejected", [*system, *asked], ADA, BO)


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        (LONGER, WHO, LONGER),  # of the conversation only the question is repeated
        (LONGER[:2], WHO, LONGER),  # nothing is: the completions go on with a question
        (turns("system: S"), WHO, turns("system: S", "user: Who?")),
        ([*turns("system: S"), *WHO], [*turns("system: S"), *WHO], turns("system: S", "user: Who?")),
    ],
)
def test_a_prompt_and_the_turns_that_follow_it_are_one_conversation(prompt, before, expected):
    assert pair({"prompt": prompt, "chosen": [*before, ADA], "rejected": [*before, BO]})[1] == expected


@pytest.mark.parametrize("prompt", ["Who?", "\n\nHuman: One?\n\nAssistant: 1.\n\nHuman: Who?\n\nAssistant:"])
def test_transcripts_that_repeat_the_prompt_ask_it_once(prompt):
    text = "\n\nHuman: One?\n\nAssistant: 1.\n\nHuman: Who?\n\nAssistant: "
    assert pair({"prompt": prompt, "chosen": text + "Ada.", "rejected": text + "Bo."})[1:] == (
        LONGER,
        ADA,
        BO,
    )


def test_a_prompt_may_be_a_transcript():
    prompt = "\n\nHuman: One?\n\nAssistant: 1.\n\nHuman: Who?\n\nAssistant:"
    assert pair({"prompt": prompt, "chosen": "Ada.", "rejected": "Bo."})[1:] == (LONGER, ADA, BO)


def test_whole_conversations_about_another_question_than_the_prompts_are_a_bad_row():
    with pytest.raises(BadRow, match=r"wrong role order \(after the prompt another question follows"):
        pair({"prompt": "Where?", "chosen": [*WHO, ADA], "rejected": [*WHO, BO]})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Who?", "chosen": "Ada.", "rejected": "Bo."},
        {"chosen": [*WHO, ADA], "rejected": [*WHO, BO]},
        {"prompt": turns("system: S", "user: Who?"), "chosen": [ADA], "rejected": [BO]},
        {"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": 0},
        {"instruction": "Who?", "chosen": "Ada.", "rejected": "Bo."},
    ],
)
def test_the_system_text_of_a_row_is_read(record):
    assert pair(record | {"system": "S"})[1] == turns("system: S", "user: Who?")


def test_the_history_of_an_alpaca_row_is_read():
    record = {"history": [["One?", "1."]], "instruction": "Who?", "chosen": "Ada.", "rejected": "Bo."}
    assert pair(record)[1] == LONGER


def test_a_completion_of_weight_0_is_dropped_and_no_fault():
    with pytest.raises(BadRow, match=r"completion of weight 0") as error:
        pair({"prompt": "Who?", "chosen": [ADA | {"weight": 0}], "rejected": [BO]})
    assert not error.value.fault


# As tokens


def config(*train, **changes) -> PreferenceConfig:
    defaults = {
        "train": tuple(map(str, train)) or ("none",),
        "weights": (),
        "validation": (),
        "validation_fraction": 0.0,
        "synthetic_rows": 30,
        "sequence_length": 64,
        "batch_size": 2,
        "on_bad_row": "stop",
        "max_bad_fraction": 0.5,
        "rename": (),
        "template": None,
    }
    return PreferenceConfig(**defaults | changes)


def encode(record, tokenizer, **changes) -> Example:
    return encoder(config(**changes), NativeTemplate(tokenizer))(record)


PAIR = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Dan, or Eve."}


def test_both_sides_start_with_the_prompt_and_end_with_the_stop_token(tokenizer):
    row = encode({"prompt": LONGER, "chosen": "Ada.", "rejected": "Bo."}, tokenizer)
    prompt = "⟦<s><|user|>One?<|end|><|assistant|>1.<|end|><|user|>Who?<|end|><|assistant|>⟧"
    shown = [show_mask(*side, tokenizer) for side in zip(row.ids, row.loss_mask, strict=True)]
    assert shown == [prompt + "Ada.<|end|>", prompt + "Bo.<|end|>"]
    assert row.group == "One?"
    prompt_length, margin, weight = row.numbers
    assert [np.flatnonzero(mask)[0] for mask in row.loss_mask] == [prompt_length] * 2
    np.testing.assert_array_equal(*(ids[: int(prompt_length)] for ids in row.ids))
    assert (margin, weight) == (0.0, 1.0)


def test_a_pair_of_which_the_longer_side_does_not_fit_is_dropped_and_no_fault(tokenizer):
    length = max(map(len, encode(PAIR, tokenizer).ids))
    assert max(map(len, encode(PAIR, tokenizer, sequence_length=length).ids)) == length
    with pytest.raises(BadRow, match=rf"longer than data.sequence_length \({length} tokens\)") as error:
        encode(PAIR, tokenizer, sequence_length=length - 1)
    assert not error.value.fault


def test_margin_and_weight_are_read(tokenizer):
    assert encode(PAIR | {"margin": 2, "weight": 0.5}, tokenizer).numbers[1:] == (2.0, 0.5)
    assert encode(PAIR | {"margin": None, "weight": None}, tokenizer).numbers[1:] == (0.0, 1.0)


@pytest.mark.parametrize("value", ["2", True, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["margin", "weight"])
def test_a_margin_or_weight_that_is_not_a_finite_number_of_at_least_0_is_a_bad_row(tokenizer, key, value):
    with pytest.raises(
        BadRow, match=rf"wrong type \('{key}' is {value!r}, not a finite number of at least 0\)"
    ):
        encode(PAIR | {key: value}, tokenizer)


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"prompt": [*WHO, ADA], "chosen": "Ada.", "rejected": "Bo."}, "the completions must be assistant"),
        (
            {"prompt": "Who?", "chosen": turns("user: Ada."), "rejected": turns("user: Bo.")},
            "after the prompt",
        ),
    ],
)
def test_completions_must_be_assistant_turns_after_a_user_turn(tokenizer, record, detail):
    with pytest.raises(BadRow, match=rf"wrong role order \({detail}"):
        encode(record, tokenizer)


def test_completions_with_the_same_tokens_are_identical(tokenizer):
    class Trimming(NativeTemplate):
        def encode(self, messages, **options):
            return super().encode(
                [each | {"content": each["content"].strip()} for each in messages], **options
            )

    encode = encoder(config(), Trimming(tokenizer))
    with pytest.raises(BadRow, match=r"identical pair"):
        encode({"prompt": "Who?", "chosen": "Ada.", "rejected": "Ada. "})


def test_a_hand_worked_row_of_the_batch():
    ids = np.array([1, 5, 6, 7, 2], np.int32), np.array([1, 5, 8, 2], np.int32)
    example = Example(ids, ids, "group", "kind", numbers=(2.0, 0.5, 3.0))
    ref_log_probs = np.array([[-1.5, -2.5]], np.float32)
    row = PairRows([example], ref_log_probs, sequence_length=6, pad_id=9)[0]
    assert [field.tolist() for field in row] == [
        [[1, 5, 6, 7, 2, 9], [1, 5, 8, 2, 9, 9]],  # tokens
        2,  # prompt length
        [5, 4],  # lengths
        0.5,  # margin
        3.0,  # weight
        [-1.5, -2.5],  # the reference's log-probs
    ]
    assert [field.dtype for field in row] == [np.int32] * 3 + [np.float32] * 3


def test_a_blank_pair_has_weight_0_and_an_index_out_of_range_raises_index_error():
    ids = np.array([1, 2, 3], np.int32)
    rows = PairRows([Example((ids, ids), (), "", "", (1.0, 0.0, 3.0))], np.zeros((1, 2), np.float32), 4, 0)
    assert rows.blank().weight == 0
    assert rows.blank().weight.dtype == np.float32
    with pytest.raises(IndexError, match="pair 1 of 1"):
        rows[1]


# Whole data sets


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(count: int, first: int = 0) -> list[dict]:
    """Two pairs per prompt, the chosen completion mostly the longer one."""
    return [
        {"prompt": f"Question {i // 2}?", "chosen": f"Yes, {i}." if i % 4 else "Y", "rejected": f"No {i}."}
        for i in range(first, first + count)
    ]


def load(*train, tokenizer, run_folder=None, **changes):
    template = NativeTemplate(tokenizer)
    return load_preferences(config(*train, **changes), tokenizer, template, seed=0, run_folder=run_folder)


def prompts(sources, tokenizer) -> set[str]:
    rows = [rows[i] for rows in sources for i in range(len(rows))]
    return {tokenizer.decode(row.tokens[0, : row.prompt_lengths]) for row in rows}


def test_pairs_of_one_prompt_are_in_one_split(tmp_path, tokenizer):
    data = load(write(tmp_path / "a.jsonl", pairs(100)), tokenizer=tokenizer, validation_fraction=0.2)
    train, held_out = prompts(data.train, tokenizer), prompts(data.validation, tokenizer)
    assert not train & held_out
    assert train | held_out == {f"Question {i}?" for i in range(50)}
    assert sum(map(len, data.train)) + sum(map(len, data.validation)) == 100


def test_dropped_pairs_are_counted_and_written_to_a_file(tmp_path, tokenizer):
    useless = [
        {"prompt": "Who?", "chosen": "Ada.", "rejected": "Ada."},
        {"prompt": "Who?", "answers": ["Ada.", "Bo."], "choice": "tie"},
        {"prompt": "Who?", "chosen": "Ada. " * 99, "rejected": "Bo."},
    ]
    path = write(tmp_path / "a.jsonl", [*useless, *pairs(4)])
    data = load(path, tokenizer=tokenizer, run_folder=tmp_path, max_bad_fraction=0.0)
    assert data.report.startswith(
        f"{path}: 7 rows read, 4 kept, 3 dropped (1 identical pair, 1 longer than data.sequence_length, "
        "1 tie); formats: 4 [prompt, chosen, rejected]; "
    )
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 3
    write(path, [*pairs(4), {"prompt": "Who?"}])
    with pytest.raises(DataError, match=r"a.jsonl:5: missing key \(no 'chosen'"):
        load(path, tokenizer=tokenizer)


def test_the_report_has_how_often_the_chosen_completion_is_longer(tmp_path, tokenizer, monkeypatch):
    same = {"prompt": "Who?", "chosen": "12", "rejected": "34"}
    path = write(tmp_path / "a.jsonl", [same, *[PAIR | {"chosen": "Cleo, Bo, Ada, Eve, Dan, Finn."}] * 3])
    lines = load(path, tokenizer=tokenizer).report.splitlines()
    assert lines[1].startswith("train: 4 pairs, mean length ")
    assert lines[1].endswith("the chosen completion is longer in 75.0% of them, equally long in 25.0%")
    assert lines[2:] == [
        "example, chosen (the prompt is in ⟦ ⟧): ⟦<s><|user|>Who?<|end|><|assistant|>⟧12<|end|>",
        "example, rejected (the prompt is in ⟦ ⟧): ⟦<s><|user|>Who?<|end|><|assistant|>⟧34<|end|>",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert load(path, tokenizer=tokenizer).report.endswith("\033[32m34<|end|>\033[0m")


def test_the_fingerprint_depends_on_the_rows_and_not_on_their_path(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", pairs(20)), write(tmp_path / "b.jsonl", pairs(10, 40))
    heavier = write(tmp_path / "c.jsonl", [row | {"weight": 2} for row in pairs(20)])
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(20)]

    def fingerprint(*train, **changes):
        return load(*train, tokenizer=tokenizer, **changes).fingerprint

    moved = write(tmp_path / "moved.jsonl", pairs(20))
    assert fingerprint(a) == fingerprint(moved) == fingerprint(a, on_bad_row="skip", max_bad_fraction=0.9)
    found = [
        fingerprint(a),
        fingerprint(heavier),
        fingerprint(write(tmp_path / "d.jsonl", swapped)),
        fingerprint(a, b),
        fingerprint(b, a),
        fingerprint(a, validation=(str(b),)),
        fingerprint(a, b, weights=(0.5, 0.5)),
        fingerprint(a, validation_fraction=0.3),
    ]
    assert len(set(found)) == len(found)


def test_a_tokenizer_is_trained_on_prompts_and_completions(tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR, {"prompt": "left out"}])
    assert list(preference_texts(config(path), seed=0)) == ["Who?", "Ada.", "Dan, or Eve."]


def test_the_synthetic_preferences_need_no_file(tokenizer):
    data = load("synthetic:preferences", tokenizer=tokenizer, validation_fraction=0.3, sequence_length=512)
    assert "synthetic:preferences: 30 rows read" in data.report
    assert data.validation


def test_a_completion_ends_at_its_stop_token_whatever_the_template_writes_after_it(tokenizer):
    source = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    row = {"prompt": "Hello", "chosen": "Hi there", "rejected": "Go away"}
    encoded = encoder(config(), JinjaTemplate(tokenizer, source))(row)
    assert [ids[-1] for ids in encoded.ids] == [tokenizer.eos_id] * 2
    assert all(mask[-1] for mask in encoded.loss_mask)
