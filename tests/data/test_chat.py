"""Conversations as rows: every token is an input once, every assistant token a target once."""

import gzip
import json

import numpy as np
import pytest

from jaxllm.data.chat import ChatConfig, chat_texts, encoder, last_span_start, load_chats, split_completion
from jaxllm.data.chat_template import NativeTemplate
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError, DataError


def turns(*written: str) -> list[dict[str, str]]:
    """Messages written as "role: content"."""
    return [dict(zip(("role", "content"), each.split(": ", 1), strict=True)) for each in written]


# One row


@pytest.fixture(scope="module")
def template(tokenizer):
    return NativeTemplate(tokenizer)


def config(*train, **changes) -> ChatConfig:
    defaults = {
        "train": tuple(map(str, train)) or ("none",),
        "weights": (),
        "validation": (),
        "validation_fraction": 0.0,
        "synthetic_rows": 30,
        "sequence_length": 128,
        "batch_size": 2,
        "on_bad_row": "stop",
        "max_bad_fraction": 0.5,
        "rename": (),
        "template": None,
        "loss_on": "assistant",
        "packing": True,
        "overlong": "drop",
    }
    return ChatConfig(**defaults | changes)


def encode(record, tokenizer, **changes):
    template = NativeTemplate(tokenizer)
    return encoder(config(**changes), tokenizer, template)(record)


TWO_TURNS = {"messages": turns("user: Who?", "assistant: Ada.", "user: Then?", "assistant: Bo.")}


@pytest.mark.parametrize(
    ("loss_on", "shown"),
    [
        (
            "assistant",
            "⟦<s><|user|>Who?<|end|><|assistant|>⟧Ada.<|end|>⟦<|user|>Then?<|end|><|assistant|>⟧Bo.<|end|>",
        ),
        (
            "last",
            "⟦<s><|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>Then?<|end|><|assistant|>⟧Bo.<|end|>",
        ),
        (
            "all",
            "⟦<s>⟧<|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>Then?<|end|><|assistant|>Bo.<|end|>",
        ),
    ],
)
def test_the_loss_mask_has_the_turns_of_loss_on_with_their_stop_tokens(tokenizer, loss_on, shown):
    row = encode(TWO_TURNS, tokenizer, loss_on=loss_on)
    assert show_mask(row.ids[0], row.loss_mask[0], tokenizer) == shown
    prompt, completion = split_completion(row)
    assert show_mask(completion, [True] * len(completion), tokenizer) == "Bo.<|end|>"
    assert [*prompt, *completion] == row.ids[0].tolist()


@pytest.mark.parametrize(
    ("loss_on", "weights", "shown"),
    [
        (
            "assistant",
            (0, 1),
            "⟦<s><|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>Then?<|end|><|assistant|>⟧Bo.<|end|>",
        ),
        (
            "assistant",
            (1, 0),
            "⟦<s><|user|>Who?<|end|><|assistant|>⟧Ada.<|end|>⟦<|user|>Then?<|end|><|assistant|>Bo.<|end|>⟧",
        ),
        (
            "all",
            (0, 1),
            "⟦<s>⟧<|user|>Who?<|end|><|assistant|>⟦Ada.<|end|>⟧<|user|>Then?<|end|><|assistant|>Bo.<|end|>",
        ),
        (
            "last",
            (0, 1),
            "⟦<s><|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>Then?<|end|><|assistant|>⟧Bo.<|end|>",
        ),
    ],
)
def test_an_assistant_turn_of_weight_0_is_not_in_the_loss(tokenizer, loss_on, weights, shown):
    row = encode(weighted(*weights), tokenizer, loss_on=loss_on)
    assert show_mask(row.ids[0], row.loss_mask[0], tokenizer) == shown


@pytest.mark.parametrize(("loss_on", "weights"), [("assistant", (0, 0)), ("all", (0, 0)), ("last", (1, 0))])
def test_a_row_without_a_turn_of_weight_1_is_dropped_and_no_fault(tokenizer, loss_on, weights):
    with pytest.raises(BadRow, match=r"no assistant turn of weight 1") as error:
        encode(weighted(*weights), tokenizer, loss_on=loss_on)
    assert not error.value.fault


def test_a_row_that_is_cut_off_before_its_turn_of_weight_1_is_too_long(tokenizer):
    length = len(encode(TWO_TURNS, tokenizer).ids[0])
    with pytest.raises(BadRow, match=r"longer than data.sequence_length"):
        encode(weighted(0, 1), tokenizer, sequence_length=length - 5, overlong="truncate")


def weighted(*weights: int) -> dict:
    """TWO_TURNS with a weight for each of the assistant's turns."""
    user, ada, then, bo = TWO_TURNS["messages"]
    return {"messages": [user, ada | {"weight": weights[0]}, then, bo | {"weight": weights[1]}]}


def test_a_row_that_just_fits_is_kept_and_one_token_more_is_too_long(tokenizer):
    length = len(encode(TWO_TURNS, tokenizer).ids[0])
    assert len(encode(TWO_TURNS, tokenizer, sequence_length=length - 1).ids[0]) == length
    with pytest.raises(BadRow, match=rf"longer than data.sequence_length \({length} tokens\)") as error:
        encode(TWO_TURNS, tokenizer, sequence_length=length - 2)
    assert not error.value.fault


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_truncation_keeps_a_row_if_some_of_an_assistant_turn_is_left(tokenizer, loss_on):
    whole = encode(TWO_TURNS, tokenizer, loss_on=loss_on)
    loss_mask = np.flatnonzero(
        encode(TWO_TURNS, tokenizer, loss_on="last" if loss_on == "last" else "assistant").loss_mask[0]
    )
    for length in range(1, len(whole.ids[0])):
        if length < loss_mask[0]:
            with pytest.raises(BadRow, match=r"longer than data.sequence_length"):
                encode(TWO_TURNS, tokenizer, loss_on=loss_on, sequence_length=length, overlong="truncate")
            continue
        row = encode(TWO_TURNS, tokenizer, loss_on=loss_on, sequence_length=length, overlong="truncate")
        np.testing.assert_array_equal(row.ids[0], whole.ids[0][: length + 1])
        np.testing.assert_array_equal(row.loss_mask[0], whole.loss_mask[0][: length + 1])
        prompt, completion = split_completion(row)  # the prompt ends where an assistant turn begins
        assert prompt[-1] == tokenizer.special_ids["<|assistant|>"]
        assert completion


def test_an_alpaca_row_that_also_has_a_text_is_a_conversation(tokenizer):
    record = {"instruction": "Who?", "input": "", "output": "Ada.", "text": "Below is ... Who? ... Ada."}
    assert encode(record, tokenizer).kind == "instruction, input, output"


@pytest.mark.parametrize("text", [3, None])
def test_a_text_that_is_not_a_string_is_a_bad_row(tokenizer, text):
    with pytest.raises(BadRow, match=r"wrong type \('text' is "):
        encode({"text": text}, tokenizer)


def test_an_empty_text_is_a_bad_row(tokenizer):
    with pytest.raises(BadRow, match=r"empty text"):
        encode({"text": " \n"}, tokenizer)


def test_the_start_of_the_last_span_is_found_wherever_it_is():
    assert [last_span_start(x) for x in ([0, 1, 1], [1, 1], [1, 0, 1, 0], [0, 1, 0, 0])] == [1, 0, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rename": ("question",)}, "data.rename has 'question'; write THEIRS=OURS, such as question=prompt"),
        ({"rename": ("=prompt",)}, "data.rename has '=prompt'"),
        ({"loss_on": "user"}, "data.loss_on='user': choose one of assistant, last, all"),
        ({"overlong": "stop"}, "data.overlong='stop': choose one of drop, truncate"),
        ({"batch_size": 0}, "data.batch_size=0"),
    ],
)
def test_an_invalid_field_is_named_in_the_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


# Whole data sets


def chats(count: int, first: int = 0) -> list[dict]:
    """Conversations of one to three exchanges, all different."""
    conversations = [
        turns(
            *(f"{role}: {i} {turn}: the  {word}\nleft." for turn in range(1 + i % 3) for role, word in WORDS)
        )
        for i in range(first, first + count)
    ]
    return [{"messages": messages} for messages in conversations]


WORDS = (("user", "ball"), ("assistant", "Ada"))


def write(path, records):
    """Write the records in the format of the path's suffix."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == "":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(records).save_to_disk(path)
        datasets.enable_progress_bars()
    else:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def load(*train, tokenizer, seed=0, **changes):
    return load_chats(config(*train, **changes), tokenizer, NativeTemplate(tokenizer), seed=seed)


def segments(sources):
    """The ids and the loss mask of every sequence of the rows."""
    for packed in sources:
        for i in range(len(packed)):
            row = packed[i]
            for number in range(1, row.segment_ids.max() + 1):
                here = row.segment_ids == number
                yield [*row.tokens[here].tolist(), row.targets[here][-1]], [False, *row.mask[here]]
            assert not row.mask[row.segment_ids == 0].any()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "saved"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_conversation_is_in_the_rows_once_and_whole(tmp_path, tokenizer, template, name, packing):
    records = chats(20)
    data = load(write(tmp_path / name, records), tokenizer=tokenizer, packing=packing, sequence_length=256)
    expected = [template.encode(record["messages"], loss_on="assistant") for record in records]
    found = list(segments(data.train))
    assert sorted(found) == sorted((ids, loss_mask) for ids, loss_mask in expected)
    assert all(ids.count(tokenizer.bos_id) == 1 for ids, _ in found)
    assert (len(data.train[0]) < 20) == packing


def test_overlong_conversations_are_counted_and_written_to_a_file_but_stop_nothing(tmp_path, tokenizer):
    records = [*chats(10), {"messages": turns("user: Who?", "assistant: " + "Ada " * 300)}]
    path = write(tmp_path / "a.jsonl", records)
    chat_config = config(path, max_bad_fraction=0.0)
    data = load_chats(chat_config, tokenizer, NativeTemplate(tokenizer), seed=0, run_folder=tmp_path / "run")
    assert "11 rows read, 10 kept, 1 dropped (1 longer than data.sequence_length)" in data.report
    (line,) = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{path}:11"


def test_a_bad_row_stops_the_run_or_is_skipped_by_config(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*chats(3), {"messages": turns("user: Who?")}])
    with pytest.raises(DataError, match=r"a.jsonl:4: no assistant turn; fix the row, or set data.on_bad_row"):
        load(path, tokenizer=tokenizer)
    data = load(path, tokenizer=tokenizer, on_bad_row="skip")
    assert "4 rows read, 3 kept, 1 dropped (1 no assistant turn)" in data.report
    with pytest.raises(DataError, match=r"1 of 4 rows are bad, more than data.max_bad_fraction=0.1"):
        load(path, tokenizer=tokenizer, on_bad_row="skip", max_bad_fraction=0.1)


def openings(sources, tokenizer):
    """The first user message of each row."""
    end, user = tokenizer.special_ids["<|end|>"], tokenizer.special_ids["<|user|>"]
    return {tokenizer.decode(ids[ids.index(user) : ids.index(end)]) for ids, _ in segments(sources)}


def test_conversations_with_one_opening_are_in_one_split_whatever_else_is_read(tmp_path, tokenizer):
    first = [{"messages": turns(f"user: Question {i // 2}?", f"assistant: Answer {i}.")} for i in range(80)]
    second = [{"prompt": f"Question {i}?", "completion": "Another."} for i in range(20, 60)]
    a, b = write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)
    alone = load(a, tokenizer=tokenizer, validation_fraction=0.2)
    both = load(b, a, tokenizer=tokenizer, validation_fraction=0.2)
    for data in (alone, both):
        train, held_out = openings(data.train, tokenizer), openings(data.validation, tokenizer)
        assert not train & held_out
        assert held_out
    assert openings(alone.validation, tokenizer) == openings(both.validation, tokenizer) & {
        f"Question {i}?" for i in range(40)
    }


def test_held_out_conversations_are_kept_as_prompts_and_completions(tmp_path, tokenizer):
    records = [*chats(4), {"text": "no completion here"}]
    train, validation = write(tmp_path / "a.jsonl", chats(2, 9)), write(tmp_path / "b.jsonl", records)
    data = load(train, tokenizer=tokenizer, validation=(str(validation),))
    found = [(tokenizer.decode(prompt)[-17:], tokenizer.decode(ids)) for prompt, ids in data.held_out]
    assert found == [
        (f"{i} {i % 3}: the  ball\nleft."[-17:], f"{i} {i % 3}: the  Ada\nleft.") for i in range(4)
    ]


def test_chats_mix_with_texts_of_which_every_token_is_a_target_once(tmp_path, tokenizer):
    texts = ["Ada left the  red ball in the garden.\n" * 9, "short"]
    chat_file = write(tmp_path / "a.jsonl", [*chats(3), {"text": texts[0]}])
    (tmp_path / "b.txt").write_text(texts[1])
    data = load(chat_file, tmp_path / "b.txt", tokenizer=tokenizer, weights=(0.8, 0.2), sequence_length=90)
    assert data.weights == (0.8, 0.2)
    assert "4 rows read, 4 kept; formats: 3 [messages], 1 [text];" in data.report
    whole = [tokenizer.bos_id, *tokenizer.encode(texts[0]), tokenizer.eos_id]
    starts = range(0, len(whole) - 1, 90)
    pieces = [ids for ids, loss_mask in segments(data.train[:1]) if all(loss_mask[1:])]
    assert sorted(pieces) == sorted(whole[start : start + 91] for start in starts)
    assert sum(len(piece) - 1 for piece in pieces) == len(whole) - 1
    ((ids, loss_mask),) = segments(data.train[1:])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("short"), tokenizer.eos_id]
    assert all(loss_mask[1:])


def test_named_validation_sources_are_validated_on(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", chats(9)), write(tmp_path / "b.jsonl", chats(4, 50))
    data = load(a, tokenizer=tokenizer, validation=(str(b),), validation_fraction=0.3)
    assert len(list(segments(data.train))) == 9
    assert len(list(segments(data.validation))) == len(data.held_out) == 4


def test_the_fingerprint_depends_on_the_rows_and_not_on_their_path(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", chats(20)), write(tmp_path / "b.jsonl", chats(10, 40))

    def fingerprint(*train, **changes):
        return load(*train, tokenizer=tokenizer, **changes).fingerprint

    moved = write(tmp_path / "moved.jsonl.gz", chats(20))
    assert fingerprint(a) == fingerprint(moved) == fingerprint(a, on_bad_row="skip", max_bad_fraction=0.9)
    found = [
        fingerprint(a),
        fingerprint(b),
        fingerprint(a, b),
        fingerprint(b, a),
        fingerprint(a, validation=(str(b),)),
        fingerprint(a, b, weights=(0.5, 0.5)),
        fingerprint(a, b, weights=(0.6, 0.4)),
        fingerprint(a, loss_on="last"),
        fingerprint(a, packing=False),
        fingerprint(a, sequence_length=127),
        fingerprint(a, validation_fraction=0.3),
        fingerprint(a, seed=1),
    ]
    assert len(set(found)) == len(found)


def test_the_report_has_the_fraction_in_the_loss_and_one_row_with_its_mask(tmp_path, tokenizer, monkeypatch):
    text = "first, but no conversation"
    path = write(tmp_path / "a.jsonl", [{"text": text}, {"prompt": "Who?", "completion": "Ada."}])
    text_ids, prompt, completion = (len(tokenizer.encode(each)) for each in (text, "Who?", "Ada."))
    tokens, targets = (text_ids + 1) + (prompt + completion + 4), (text_ids + 1) + (completion + 1)
    report = load(path, tokenizer=tokenizer, packing=False).report
    assert report.splitlines() == [
        f"{path}: 2 rows read, 2 kept; formats: 1 [text], 1 [prompt, completion]; {tokens + 2} tokens",
        f"train: {tokens} tokens, {targets / tokens:.1%} of them in the loss, in 2 rows of 128, "
        f"{1 - tokens / 256:.1%} padding",
        "chat template: built-in; stop tokens: <|end|>, </s>",
        "example (tokens in ⟦ ⟧ are not in the loss): ⟦<s><|user|>Who?<|end|><|assistant|>⟧Ada.<|end|>",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert load(path, tokenizer=tokenizer).report.endswith("\033[32mAda.<|end|>\033[0m")


def test_a_tokenizer_is_trained_on_the_contents_of_messages_and_texts(tmp_path):
    renamed = {"messages": [{"speaker": "user", "said": "What?"}, {"speaker": "gpt", "said": "This."}]}
    path = write(tmp_path / "a.jsonl", [TWO_TURNS, {"text": "a text"}, {"nothing": 1}, renamed])
    (tmp_path / "b.txt").write_text("plain")
    chat_config = config(path, tmp_path / "b.txt", rename=("speaker=role", "said=content"))
    found = list(chat_texts(chat_config, seed=0))
    assert found == ["Who?", "Ada.", "Then?", "Bo.", "a text", "What?", "This.", "plain"]


def test_the_synthetic_chats_need_no_file(tokenizer):
    data = load("synthetic:chats", tokenizer=tokenizer, validation_fraction=0.3, sequence_length=512)
    assert len(data.held_out) > 0
    assert "synthetic:chats: 30 rows read, 30 kept" in data.report
