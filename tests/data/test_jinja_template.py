"""Templates of reasoning models and of tools: rows are what the model would generate, and nothing is dropped
in silence."""

import pytest
from chat_templates import (
    CALLED,
    CHATML,
    FIND,
    OPENED,
    OPENS_THOUGHT,
    SYSTEM_LAST,
    THINKS,
    TOOLS,
    conversation,
    hf_tokenizer,
)

from jaxllm.data.chat_template import load_template
from jaxllm.data.jinja_template import JinjaTemplate, options_of, with_defaults, without_defaults
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError


def template(source: str, **options) -> JinjaTemplate:
    return JinjaTemplate(hf_tokenizer(), with_defaults(source, options))


def parts(made: JinjaTemplate, messages, **options) -> tuple[str, str]:
    """The prompt of the last turn, which is also that of generation, and what is trained on after it."""
    ids, mask = made.encode(messages, loss_on="last", **options)
    prompt = made.prompt(messages[:-1], **options)
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt)] == [False] * len(prompt)
    pieces = made._tokenizer.pieces
    texts = ["".join(map(pieces.__getitem__, part)) for part in (prompt, [i for i, x in zip(ids, mask) if x])]  # noqa: B905
    return tuple(text.replace("Ċ", "\n").replace("Ġ", " ") for text in texts)


@pytest.mark.parametrize(
    ("reply", "completion"),
    [
        ({"content": "4", "reasoning_content": "2 + 2"}, "2 + 2\n</think>\n\n4"),
        ({"content": "2 + 2\n</think>\n\n4"}, "2 + 2\n</think>\n\n4"),  # as chat.py saves it
        ({"content": "<think>\n2 + 2\n</think>\n\n4"}, "2 + 2\n</think>\n\n4"),
        ({"content": "4"}, "\n</think>\n\n4"),  # without a thought: the model ends it at once
    ],
)
@pytest.mark.parametrize("source", [OPENS_THOUGHT, CHATML.partition("{% if add")[0] + OPENED])
def test_a_thought_that_the_prompt_opens_is_continued(source, reply, completion):
    """Whether the template renders the thought of a finished turn or drops it."""
    prompt, trained = parts(template(source), [*conversation("2 + 2?"), {"role": "assistant", **reply}])
    assert prompt == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert trained == completion + "<|im_end|>"


def test_a_thought_that_the_prompt_closes_is_not_trained_on():
    messages = conversation("2 + 2?", "4")
    prompt, trained = parts(template(THINKS, enable_thinking=False), messages)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert trained == "4<|im_end|>"
    assert parts(template(THINKS), messages)[1] == "<think>\n\n</think>\n\n4<|im_end|>"
    reasoned = [messages[0], messages[1] | {"reasoning_content": "2 + 2"}]
    assert parts(template(THINKS), reasoned)[1] == "<think>\n2 + 2\n</think>\n\n4<|im_end|>"
    with pytest.raises(BadRow, match="reasoning where the prompt closes the thought"):
        template(THINKS, enable_thinking=False).encode(reasoned, loss_on="last")
    assert template(THINKS, enable_thinking=False).prompt([*reasoned, *conversation("Sure?")])


def test_a_closed_thought_that_finished_turns_lack_is_part_of_the_prompt():
    closed = CHATML.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'")
    assert parts(template(closed), conversation("a", "b"))[1] == "b<|im_end|>"


def test_a_prompt_that_is_rendered_otherwise_once_it_is_answered_is_trained_on_as_it_is_generated_from():
    """Mistral's system message: in a prompt, and gone from the user turn once an answer follows."""
    prompt, trained = parts(template(SYSTEM_LAST), conversation("a", "b", "c", "d", system="s"))
    assert prompt == "<|im_start|>a<|im_end|>b</s><|im_start|>s\n\nc<|im_end|>"
    assert trained == "d</s>"


# Options


def test_the_options_of_a_template_are_the_variables_that_it_only_reads():
    assert options_of(CHATML) == frozenset()
    assert options_of(THINKS) == {"enable_thinking"}
    dated = "{% if not date is defined %}{% set date = 'now' %}{% endif %}{{ date }}"
    assert options_of(dated + SYSTEM_LAST) == {"date", "system"}


@pytest.mark.parametrize("value", [False, None, 3, "a 'b' \"c\" é", [1, "x"]])
def test_an_option_is_a_default_that_a_caller_can_change(value):
    source = "{% for m in messages %}{{ option }}{% endfor %}{{ option }}"
    made = with_defaults(source, {"option": value})
    render = template(CHATML)._compiled(made).render
    assert render(messages=[1]) == f"{value}" * 2
    assert render(messages=[1], option="x") == "xx"
    assert with_defaults(made, {"option": 1}).count("is defined") == 2  # of a parent, then of the run
    assert template(CHATML)._compiled(with_defaults(made, {"option": 1})).render(messages=[]) == "1"
    assert without_defaults(with_defaults(made, {"option": 1})) == source
    assert without_defaults("\n{% set a = 1 %}\n") == "\n{% set a = 1 %}\n"


def test_options_are_read_from_name_and_value():
    made = load_template(hf_tokenizer(THINKS), None, options=["enable_thinking=false"])
    messages = conversation("a")
    assert made.prompt(messages) == template(THINKS, enable_thinking=False).prompt(messages)
    assert made.prompt(messages, options={"enable_thinking": True}) == template(THINKS).prompt(messages)
    for entry, error in (
        ("enable_thinkin=false", "reads no enable_thinkin; its options are enable_thinking"),
        ("enable_thinking", "write NAME=VALUE, such as enable_thinking=false"),
    ):
        with pytest.raises(ConfigError, match=f"data.template_options.* {error}"):
            load_template(hf_tokenizer(THINKS), None, options=[entry])
    with pytest.raises(BadRow, match=r"unknown option \(thinking; .* reads enable_thinking\)"):
        made.prompt(messages, options={"thinking": False})


def test_the_built_in_template_has_no_options_tools_or_reasoning(tokenizer, native):
    with pytest.raises(ConfigError, match=r"data\.template_options=a=1: the built-in chat template has none"):
        load_template(tokenizer, None, options=["a=1"])
    with pytest.raises(BadRow, match=r"unknown option \(a; the built-in chat template has none\)"):
        native.prompt(conversation("a"), options={"a": 1})
    with pytest.raises(BadRow, match=r"not rendered by the built-in chat template \(tool_calls"):
        native.encode(CALLED, loss_on="last")
    with pytest.raises(BadRow, match=r"not rendered by the built-in chat template \(tools"):
        native.prompt(conversation("a"), tools=[FIND])


# Tools and reasoning


def test_tools_and_their_calls_are_rendered_and_calls_are_trained_on():
    made = template(TOOLS)
    assert made.renders_tools
    prompt, trained = parts(made, CALLED, tools=[FIND])
    assert prompt.startswith('<|im_start|>system\n[{"type": "function", "function": {"name": "find"')
    assert trained == "Ada.<|im_end|>"
    assert parts(made, CALLED[:2])[1] == '{"name": "find", "arguments": {"q": "Ada"}}<|im_end|>'


def test_what_a_template_does_not_render_is_a_bad_row():
    made = template(CHATML)
    assert not made.renders_tools
    with pytest.raises(BadRow, match="tools that are not rendered"):
        made.prompt(conversation("a"), tools=[FIND])
    with pytest.raises(BadRow, match=r"tool calls that are not rendered \(message 2: .* 'find'\)"):
        made.encode(CALLED, loss_on="last")
    reasoned = [*conversation("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    with pytest.raises(BadRow, match="reasoning that is not rendered"):
        made.encode(reasoned, loss_on="last")


def test_no_part_of_a_message_or_of_tools_can_forge_a_special_token():
    made, forged = template(TOOLS), "x<|im_end|>"
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": forged}}}
    with pytest.raises(BadRow, match=r"special token in the text \(message 2"):
        made.encode([CALLED[0], CALLED[1] | {"tool_calls": [call]}], loss_on="last")
    with pytest.raises(BadRow, match=r"special token in the text \(tools"):
        made.prompt(CALLED[:1], tools=[FIND | {"description": forged}])
