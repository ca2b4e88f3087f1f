"""Every public format of instruction data is read as the right messages; other records are bad rows."""

import pytest

from jaxllm.data.chat import conversation
from jaxllm.data.records import Rename
from jaxllm.data.sources import BadRow


def turns(*written: str) -> list[dict[str, str]]:
    """Messages written as "role: content"."""
    return [dict(zip(("role", "content"), each.split(": ", 1), strict=True)) for each in written]


EXCHANGE = turns("user: Who?", "assistant: Ada.")


@pytest.mark.parametrize(
    ("record", "kind", "messages"),
    [
        (
            {"messages": turns("system: Be brief.", "user: Who?", "assistant: Ada.", "user: No.")},
            "messages",
            turns("system: Be brief.", "user: Who?", "assistant: Ada.", "user: No."),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "Ada."},
                    {"from": "human", "value": "And?"},
                    {"from": "bot", "value": "Bo."},
                    {"from": "user", "value": "And?"},
                    {"from": "chatgpt", "value": "Cleo."},
                ]
            },
            "conversations",
            turns(
                "system: Be brief.",
                "user: Who?",
                "assistant: Ada.",
                "user: And?",
                "assistant: Bo.",
                "user: And?",
                "assistant: Cleo.",
            ),
        ),
        ({"messages": [{"from": "human", "value": "Who?"}, *EXCHANGE[1:]]}, "messages", EXCHANGE),
        ({"conversations": EXCHANGE}, "conversations", EXCHANGE),
        ({"prompt": "Who?", "completion": "Ada."}, "prompt, completion", EXCHANGE),
        ({"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}, "prompt, completion", EXCHANGE),
        (
            {"system": "Be brief.", "prompt": "Who?", "completion": "Ada."},
            "prompt, completion",
            turns("system: Be brief.", *("user: Who?", "assistant: Ada.")),
        ),
        (
            {"instruction": "Who?", "input": "Ada or Bo", "output": "Ada."},
            "instruction, input, output",
            turns("user: Who?\n\nAda or Bo", "assistant: Ada."),
        ),
        ({"instruction": "Who?", "output": "Ada."}, "instruction, input, output", EXCHANGE),
        ({"instruction": "Who?", "input": " ", "output": "Ada."}, "instruction, input, output", EXCHANGE),
        ({"instruction": "Who?", "input": None, "output": "Ada."}, "instruction, input, output", EXCHANGE),
        (
            {
                "system": "Be brief.",
                "history": [["One?", "1."], ["Two?", "2."]],
                "instruction": "Who?",
                "input": "",
                "output": "Ada.",
            },
            "instruction, input, output",
            turns(
                "system: Be brief.",
                "user: One?",
                "assistant: 1.",
                "user: Two?",
                "assistant: 2.",
                "user: Who?",
                "assistant: Ada.",
            ),
        ),
        (
            {"system": "Be brief.", "messages": turns("system: Be brief.", "system: Use names.") + EXCHANGE},
            "messages",
            turns("system: Be brief.\n\nUse names.") + EXCHANGE,
        ),
        (
            {"prompt": "Who? ", "completion": turns("user: Hi.", "assistant: Hello.") + EXCHANGE},
            "prompt, completion",
            turns("user: Hi.", "assistant: Hello.") + EXCHANGE,
        ),
        (
            {"prompt": "\n\nHuman: Who?\n\nAssistant:", "completion": "Ada."},
            "prompt, completion",
            EXCHANGE,
        ),
        (
            {"system": "", "history": None, "instruction": "Who?", "output": "Ada."},
            "instruction, input, output",
            EXCHANGE,
        ),
    ],
)
def test_each_format_becomes_these_messages(record, kind, messages):
    assert conversation(record) == (kind, messages)


def test_rename_applies_to_columns_and_inside_messages():
    record = {"dialog": [{"speaker": "user", "said": "Who?"}, {"speaker": "gpt", "said": "Ada."}]}
    rename = ("dialog=messages", "speaker=role", "said=content")
    assert conversation(Rename(rename)(record)) == ("messages", EXCHANGE)
    record = {"question": record["dialog"][:1], "answer": "Ada.", "id": 3}
    rename = ("question=prompt", "answer=completion", *rename[1:])
    assert conversation(Rename(rename)(record))[1] == EXCHANGE


A_PAIR = (
    "unknown format (a preference pair; to train on its chosen completion, set data.rename=chosen=completion)"
)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"question": "Who?", "answer": "Ada."},
            "unknown format (no completion among the keys question, answer; set data.rename=THEIRS=OURS)",
        ),
        (
            {"prompt": "Who?"},
            "unknown format (no completion among the keys prompt; set data.rename=THEIRS=OURS)",
        ),
        ({"prompt": "Who?", "chosen": "A", "rejected": "B"}, A_PAIR),
        ({"messages": "Who?"}, "wrong type ('messages' is a string, not a list)"),
        ({"conversations": None}, "wrong type ('conversations' is null, not a list)"),
        ({"messages": ["Who?"]}, "wrong type (a message is a string, not an object)"),
        ({"messages": [{"content": "Who?"}]}, "missing key (a message has keys content, but no role)"),
        (
            {"messages": [{"role": ["user"], "content": "Who?"}]},
            "wrong type (a message's role is a list, not a string)",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "find"}}]},
            "unsupported part of a message (function_call)",
        ),
        (
            {"messages": [{"role": "assistant", "content": "1", "tool_calls": [{"id": "x"}]}]},
            "wrong type (a tool call needs a function with a name and an object of arguments)",
        ),
        (
            {"instruction": ["Who?"], "output": "Ada."},
            "wrong type ('instruction' and 'input' must be strings)",
        ),
        (
            {"instruction": "Who?", "input": 3, "output": "Ada."},
            "wrong type ('instruction' and 'input' must be strings)",
        ),
        (
            {"history": [["alone"]], "instruction": "Who?", "output": "Ada."},
            "wrong type ('history' must be a list of [question, answer] pairs)",
        ),
        (
            {"history": "before", "instruction": "Who?", "output": "Ada."},
            "wrong type ('history' must be a list of [question, answer] pairs)",
        ),
    ],
)
def test_a_record_of_another_format_is_a_bad_row_with_the_reason(record, problem):
    with pytest.raises(BadRow) as error:
        conversation(record)
    assert str(error.value) == problem
    assert error.value.fault


def test_empty_tool_calls_and_other_columns_are_ignored():
    messages = [{**each, "tool_calls": [], "id": 7} for each in EXCHANGE]
    assert conversation({"messages": messages, "source": "here"})[1] == EXCHANGE
