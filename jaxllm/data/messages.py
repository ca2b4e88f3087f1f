"""The messages of conversations, in the one form that chat templates take, from rows and from clients.

A message is `{"role": one of ROLES, "content": a text}`, and where it has them `"weight": 0` (not to be
trained on), `"reasoning_content"` (a text), `"tool_calls"`, `"tool_call_id"` and `"name"`.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.data.sources import BadRow, json_type, without_bom

Message = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the same field
FIELDS = (  # that are read
    *("role", "content", "from", "value", "weight", "tool_calls", "tool_call_id"),
    *REASONING,
)

_OTHER_ROLES = {
    "human": "user",  # ShareGPT's names
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "developer": "system",  # OpenAI's newer name
}
# Leaving these out would change what the message is.
_UNSUPPORTED = (
    "function_call",
    "refusal",
    "audio",
    "images",
)
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of OpenAI's content parts
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


def message(value: Any) -> Message:
    """A message of role and content, or of ShareGPT's "from" and "value". Raises BadRow.

    A field that is null is not there: Arrow fills up the fields that only some messages have.
    """
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"a message is {json_type(value)}, not an object")
    given = {name: each for name, each in value.items() if each is not None}
    for name in _UNSUPPORTED:
        if given.get(name):
            raise BadRow("unsupported part of a message", name)
    role = given.get("role", given.get("from"))
    if role is None:
        raise BadRow("missing key", f"a message has keys {', '.join(given)}, but no role")
    if not isinstance(role, str):
        raise BadRow("wrong type", f"a message's role is {json_type(role)}, not a string")
    weight = given.get("weight", 1)
    if weight not in (0, 1):
        raise BadRow("wrong type", f"a message's weight is {weight!r}, not 0 or 1")
    content = _text(given.get("content", given.get("value")))
    found: Message = {"role": _OTHER_ROLES.get(role, role), "content": content}
    if reasoning := next((given[name] for name in REASONING if given.get(name)), None):
        found["reasoning_content"] = _text(reasoning)
    if given.get("tool_calls"):
        found |= {"content": content or "", "tool_calls": _tool_calls(given["tool_calls"])}
    if role == "tool":
        found |= {name: given[name] for name in ("tool_call_id", "name") if isinstance(given.get(name), str)}
    return found | ({} if weight else {"weight": 0})


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls`, whose arguments are JSON in a string, with the object that templates take."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise BadRow("wrong type", f"the arguments of a tool call are not JSON ({error})") from None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise BadRow("wrong type", "a tool call needs a function with a name and an object of arguments")
        also = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(also | {"type": "function", "function": {"name": name, "arguments": dict(arguments)}})
    return found


def read_tools(record: Mapping[str, Any]) -> list[Any] | None:
    """The `tools` of a row or a request: a list of JSON schemas, or that list as JSON in a string; None where
    there are none. Raises BadRow."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            raise BadRow("wrong type", f"'tools' is a string, but not JSON ({error})") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadRow("wrong type", "'tools' must be a list of objects")
    return tools or None


def texts_in(value: Any) -> list[str]:
    """All strings in a value of nested lists and objects, the names of fields too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for each in pair for text in texts_in(each)]
    return [text for each in value for text in texts_in(each)] if isinstance(value, list | tuple) else []


def _text(content: Any) -> str | None:
    """A message's content as a text: the parts of a list are joined, as chat templates do."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
            if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                raise BadRow("unsupported part of a message", f"content of type {kind}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise BadRow("wrong type", f"a message's content is {json_type(content)}, not a string")
    return content and without_bom(content)


def as_messages(value: Any, role: str) -> list[Message]:
    """The messages of a list, of a transcript, or of a text as one message of this role. Raises BadRow."""
    if isinstance(value, list):
        return joined([message(each) for each in value])
    if isinstance(value, str) and is_transcript(value):
        turns = transcript(value)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns  # a prompt's end
    return [message({"role": role, "content": value})]


def client_messages(values: Sequence[Any]) -> list[Message]:
    """The messages of a request to the server. An assistant turn may have no content: a model may have ended
    its turn at once, and clients send back what they received. Raises BadRow."""
    return [
        each | {"content": ""} if each["role"] == "assistant" and each["content"] is None else each
        for each in joined([message(value) for value in values])
    ]


def is_transcript(text: str) -> bool:
    """Whether a text is one of turns, as in hh-rlhf."""
    return text.startswith("\n\nHuman:")


def transcript(text: str) -> list[Message]:
    r"""The messages of a text such as `\n\nHuman: Hello\n\nAssistant: Hi`. Raises BadRow."""
    before, *parts = _TRANSCRIPT.split(text)
    if before.strip() or not parts:
        raise BadRow(
            "no prompt", "without 'prompt', a text must be a transcript of Human: and Assistant: turns"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def system_message(record: Mapping[str, Any]) -> list[Message]:
    """The `system` text of a row, if there is one, as a message."""
    text = record.get("system")
    return [message({"role": "system", "content": text})] if text else []


def joined(*parts: Messages) -> list[Message]:
    """Messages one part after the other. The system messages before the first turn become one, with each text
    once, since chat templates take one."""
    found = [dict(each) for part in parts for each in part]
    first = next((i for i, each in enumerate(found) if each["role"] != "system"), len(found))
    if first < 2:
        return found
    texts = dict.fromkeys(each["content"] for each in found[:first] if each["content"])
    return [{"role": "system", "content": "\n\n".join(texts)}, *found[first:]]


def continued(prompt: Messages, turns: Messages) -> list[Message]:
    """A prompt and the turns that follow it. Where the turns repeat it, as the start or the last question of
    the whole conversation, it is there once. Blanks make no difference.

    Raises BadRow where the turns begin with another question than the prompt's.
    """
    asked = [each for each in prompt if each["role"] != "system"]
    said = [each for each in turns if each["role"] != "system"]
    if not asked or not said or said[0]["role"] != "user":
        return joined(prompt, turns)
    for length in range(len(asked), 0, -1):
        if _same(asked[-length:], said[:length]):
            return joined(prompt[: len(prompt) - length], turns)
    if any(_same(asked, said[i : i + len(asked)]) for i in range(len(said))):
        return joined(prompt[: len(prompt) - len(asked)], turns)
    if asked[-1]["role"] == "user":
        raise BadRow("wrong role order", "after the prompt another question follows, not an assistant turn")
    return joined(prompt, turns)


def _same(left: Messages, right: Messages) -> bool:
    """Whether two lists of messages differ in nothing but blanks."""

    def key(messages: Messages) -> list[tuple[str, str]]:
        return [(each["role"], " ".join((each["content"] or "").split())) for each in messages]

    return key(left) == key(right)


def check_messages(messages: Messages, *, is_prompt: bool) -> None:
    """Raise BadRow unless this is a valid conversation: a training row, which ends with an assistant turn, or
    a prompt, which does not. In a prompt, earlier assistant turns may be empty."""
    for i, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ROLES)}"
            raise BadRow("unknown role", f"message {i}: {role!r}; {hint}")
        if not isinstance(content, str):
            raise BadRow("wrong type", f"message {i}: the content is {json_type(content)}, not a string")
        may_be_empty = role != "user" and (role != "assistant" or is_prompt or message.get("tool_calls"))
        if not content.strip() and not may_be_empty:
            raise BadRow("empty text", f"message {i}, role {role}")
        before = messages[i - 2]["role"] if i > 1 else None
        if role == "system" and before is not None:
            raise BadRow("wrong role order", f"message {i}: a system message must come first")
        if role == "assistant" and before in (None, "assistant"):
            raise BadRow(
                "wrong role order",
                f"message {i}: an assistant turn must not come first or follow another one",
            )
    if not is_prompt and not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn")
    if not messages:
        raise BadRow("wrong role order", "there are no messages")
    if is_prompt == (messages[-1]["role"] == "assistant"):
        raise BadRow("wrong role order", f"the last message has role {messages[-1]['role']}")
