"""Tools, reasoning and template options of a chat request: rendered where the template can, refused where it
cannot, in one line that names the field."""

from dataclasses import replace

import pytest
from chat_templates import CALL, CHATML, FIND, THINKS, TOOLS, hf_tokenizer

from jaxllm.data.chat_template import load_template
from jaxllm.rollout.engine import IDLE
from jaxllm.serve.errors import ApiError
from jaxllm.serve.openai_api import read_chat
from jaxllm.serve.served_model import ServedModel

SAMPLING = replace(IDLE, max_new_tokens=8)
QUESTION = {"role": "user", "content": "Who?"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [CALL | {"function": {"name": "find", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "content": "Ada", "tool_call_id": "x"}


def rendered(source, **fields) -> str:
    """The prompt of a request to a model with this template."""
    tokenizer = hf_tokenizer(source)
    model = ServedModel("m", {}, None, load_template(tokenizer, None), tokenizer, 10_000)
    request = read_chat({"messages": [QUESTION], **fields}, {"m": model}, SAMPLING)
    text = "".join(map(tokenizer.pieces.__getitem__, request.prompts[0]))
    return text.replace("\u010a", "\n").replace("\u0120", " ")


def test_tools_their_calls_and_results_are_rendered():
    text = rendered(TOOLS, tools=[FIND], tool_choice="auto", messages=[QUESTION, CALLED, RESULT])
    assert text.startswith('<|im_start|>system\n[{"type": "function"')
    assert '{"name": "find", "arguments": {}}<|im_end|>' in text
    assert text.endswith("<|im_start|>tool\nAda<|im_end|>\n<|im_start|>assistant\n")
    assert "function" not in rendered(TOOLS, tools=[FIND], tool_choice="none")


def test_chat_template_kwargs_set_the_variables_of_the_template():
    assert rendered(THINKS).endswith("assistant\n")
    assert rendered(THINKS, chat_template_kwargs={"enable_thinking": False}).endswith("\n</think>\n\n")
    assert rendered(THINKS, chat_template_kwargs={}) == rendered(THINKS, chat_template_kwargs=None)


def test_reasoning_of_earlier_turns_is_taken_and_left_to_the_template():
    reply = {"role": "assistant", "content": "Ada.", "reasoning_content": "Hm."}
    assert "Hm." not in rendered(THINKS, messages=[QUESTION, reply, QUESTION])


@pytest.mark.parametrize(
    ("source", "fields", "param", "message"),
    [
        (CHATML, {"tools": [FIND]}, "tools", "its chat template has no place for them"),
        (TOOLS, {"tools": ["find"]}, "tools", "must be a list of objects"),
        (
            TOOLS,
            {"tools": [FIND], "tool_choice": "required"},
            "tool_choice",
            "Unsupported parameter: 'tool_choice'",
        ),
        (CHATML, {"messages": [QUESTION, CALLED, RESULT]}, "messages", "tool calls that are not rendered"),
        (THINKS, {"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs", "reads enable_thinking"),
        (THINKS, {"chat_template_kwargs": 1}, "chat_template_kwargs", "must be an object"),
    ],
)
def test_what_cannot_be_rendered_is_refused(source, fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        rendered(source, **fields)
    assert caught.value.param == param
    assert "\n" not in str(caught.value)
