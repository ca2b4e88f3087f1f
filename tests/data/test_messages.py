"""Conversations that cannot be encoded are bad rows with the reason, whichever template encodes them."""

import pytest
from chat_templates import CHATML, TWO_TURNS, conversation, hf_tokenizer

from jaxllm.data import chat
from jaxllm.data.chat_template import JinjaTemplate
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError
from jaxllm.serve.errors import ApiError
from jaxllm.serve.openai_api import read_messages


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (
            [{"role": "asistant", "content": "a"}],
            r"unknown role \(message 1: 'asistant'; did you mean 'assistant'\?\)",
        ),
        ([{"role": "narrator", "content": "a"}], r"unknown role .*use one of system, user, assistant, tool"),
        ([{"content": "a"}], r"unknown role \(message 1: None"),
        ([{"role": "user", "content": None}], r"wrong type \(message 1: the content is null"),
        ([{"role": "user", "content": ["a"]}], r"wrong type \(message 1: the content is a list"),
        (conversation(" \n", "b"), r"empty text \(message 1, role user\)"),
        (conversation("a", ""), r"empty text \(message 2, role assistant\)"),
        (conversation("a"), "no assistant turn"),
        ([], "no assistant turn"),
        (conversation("a", "b", "c"), r"wrong role order \(the last message has role user\)"),
        (
            conversation("a", "b") + conversation("a", "b", system="s"),
            "message 3: a system message must come first",
        ),
        (
            conversation("a", "b") + conversation("a", "b")[1:],
            "message 3: an assistant turn must not come first or follow another one",
        ),
        (
            conversation("a", "b")[1:],
            "message 1: an assistant turn must not come first or follow another one",
        ),
    ],
)
def test_a_row_that_cannot_be_encoded_is_bad_with_the_reason(any_template, messages, fault):
    with pytest.raises(BadRow, match=fault):
        any_template.encode(messages, loss_on="assistant")


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (conversation("a", "b"), r"wrong role order \(the last message has role assistant\)"),
        ([], "there are no messages"),
    ],
)
def test_a_prompt_that_needs_no_completion_is_a_bad_row(any_template, messages, fault):
    with pytest.raises(BadRow, match=fault):
        any_template.prompt(messages)


def test_a_row_that_the_template_rejects_is_bad_with_its_reason():
    picky = "{% if messages | length > 2 %}{{ raise_exception('too\nmany') }}{% endif %}" + CHATML
    template = JinjaTemplate(hf_tokenizer(), picky)
    with pytest.raises(BadRow, match=r"rejected by the chat template \(too many\)"):
        template.encode(TWO_TURNS, loss_on="assistant")


def test_an_empty_system_message_is_allowed(any_template):
    assert any_template.encode(conversation("a", "b", system=""), loss_on="assistant").ids


def test_loss_on_is_one_of_three(any_template):
    with pytest.raises(ConfigError, match=r"data.loss_on='both': choose one of assistant, last, all"):
        any_template.encode(TWO_TURNS, loss_on="both")


# Messages of rows and of clients


def of_a_row(messages):
    return chat.conversation({"messages": messages})[1]


@pytest.fixture(params=[of_a_row, read_messages])
def read(request):
    """The messages of a row, and of a request to the server."""
    return request.param


REASONED = {"role": "assistant", "content": "a", "reasoning_content": "b"}
CALL = {"id": "x", "type": "function", "function": {"name": "find", "arguments": {"q": 1}}}
ARROW = dict.fromkeys(("from", "value", "name", "tool_calls", "function_call", "thinking", "weight"))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "developer", "content": "s"}, *conversation("a")], conversation("a", system="s")),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], conversation("a")),
        (
            [{"role": "user", "content": [{"type": kind, "text": kind} for kind in ("text", "input_text")]}],
            conversation("textinput_text"),
        ),
        ([ARROW | message for message in TWO_TURNS], TWO_TURNS),
        ([{"role": None, "content": None, "from": "human", "value": "a"}], conversation("a")),
        ([{"role": "user", "content": "a", "tool_calls": [], "function_call": {}}], conversation("a")),
        ([{"role": "user", "content": "\ufeffa\n\ufeffb"}], conversation("a\nb")),
        # system messages at the start are one
        (
            [{"role": role, "content": role} for role in ("system", "developer")] + conversation("a"),
            conversation("a", system="system\n\ndeveloper"),
        ),
        ([*conversation(system="s"), *conversation("a", system="s")], conversation("a", system="s")),
        ([*conversation(system=""), *conversation("a", system="s")], conversation("a", system="s")),
        (conversation("a", system=""), conversation("a", system="")),
        # a tool's result is a turn
        (
            [*conversation("a"), {"role": "tool", "content": "1", "tool_call_id": "x"}],
            [*conversation("a"), {"role": "tool", "content": "1", "tool_call_id": "x"}],
        ),
        # reasoning has three names; a tool call's arguments are JSON in a string or an object
        *(
            ([{"role": "assistant", "content": "a", name: "b"}], [REASONED])
            for name in ("reasoning_content", "reasoning", "thinking")
        ),
        *(
            (
                [{"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": function}]}],
                [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
            )
            for function in (
                {"name": "find", "arguments": '{"q": 1}'},
                {"name": "find", "arguments": {"q": 1}},
            )
        ),
    ],
)
def test_every_form_of_a_message_is_read_as_the_same(read, messages, expected):
    assert read(messages) == expected


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": None, "function_call": {"name": "x"}}, "(function_call)"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "(refusal)"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "(content of type image_url)"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]}, "of type audio)"),
        ({"role": "user", "content": ["a"]}, "(content of type a string)"),
    ],
)
def test_a_part_that_is_not_supported_is_never_left_out_in_silence(read, message, reason):
    with pytest.raises((BadRow, ApiError), match=r"^unsupported part of a message \(") as error:
        read([*conversation("q"), message])
    assert str(error.value).endswith(reason)


@pytest.mark.parametrize("value", [0.5, -1, "0", [0]])
def test_a_weight_is_0_or_1(value):
    with pytest.raises(BadRow, match=r"wrong type \(a message's weight is .*, not 0 or 1\)"):
        of_a_row([{"role": "assistant", "content": "a", "weight": value}])


@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {}, {"content": []}])
def test_a_client_may_send_back_an_empty_assistant_turn(any_template, empty):
    messages = read_messages([*conversation("a"), {"role": "assistant"} | empty, *conversation("b")])
    assert messages == conversation("a", "", "b")
    full = any_template.prompt(conversation("a", "x", "b"))
    assert len(any_template.prompt(messages)) == len(full) - 1


def test_a_template_that_drops_empty_turns_may_do_so():
    drops = CHATML.replace("{{ '<|im", "{% if message.content %}{{ '<|im", 1).replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    template = JinjaTemplate(hf_tokenizer(), drops)
    two_questions = conversation("a") + conversation("b")
    assert template.prompt(conversation("a", "", "b")) == template.prompt(two_questions)


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_turn_to_train_on_is_still_a_bad_row(any_template, content):
    messages = of_a_row([*conversation("a"), {"role": "assistant", "content": content}])
    with pytest.raises(BadRow, match=r"empty text|the content is null"):
        any_template.encode(messages, loss_on="assistant")
