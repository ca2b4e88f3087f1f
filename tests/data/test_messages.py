"""Conversations that cannot be encoded are bad rows with the reason, whichever template encodes them."""

import pytest
from chat_templates import CHATML, TWO_TURNS, conversation, hf_tokenizer

from jaxllm.data.chat_template import JinjaTemplate
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError


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
