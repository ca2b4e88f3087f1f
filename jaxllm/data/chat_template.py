"""Conversations as token ids, with an exact loss mask.

The loss counts the tokens of the assistant's turns, including the token that ends each. Our own template
writes `<s><|user|>TEXT<|end|><|assistant|>TEXT<|end|>`; other models bring a Jinja template. The template
alone writes the BOS, if there is one. The tokens of a training row before an assistant's turn are exactly the
prompt from which that turn is generated.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from jaxllm.data.jinja_template import UNKNOWN_OPTION, JinjaTemplate, Tools, with_defaults
from jaxllm.data.loss_mask import Encoded, joined
from jaxllm.data.messages import ROLES, Messages, check_messages, read_tools
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import CHAT_TOKENS, BaseTokenizer
from jaxllm.errors import ConfigError


class ChatTemplate(Protocol):
    """How conversations become token ids, in training and in generation."""

    @property
    def source(self) -> str | None:
        """The Jinja source, for a template that has one."""
        ...

    @property
    def clock(self) -> str | None:
        """The time in ISO 8601 that `strftime_now` tells; None for a template that does not ask."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        ...

    @property
    def renders_tools(self) -> bool:
        """Whether `tools` become part of a prompt."""
        ...

    def encode(self, messages: Messages, *, loss_on: str, tools: Tools | None = None) -> Encoded:
        """A conversation that ends with the assistant's turn, as a training row.

        `loss_on`: "assistant" for the tokens of every assistant turn, "last" for those of the last one, "all"
        for every token but the first. Raises BadRow for messages that cannot be encoded, and ConfigError.
        """
        ...

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The prompt from which the assistant's next turn is generated.

        `options`: values of the template's variables, such as `enable_thinking`. Raises BadRow, also for
        tools and options that the template does not read.
        """
        ...


class PlainTextTemplate:
    """In place of a chat template, for a model that continues text: a prompt is the text itself."""

    source = clock = None
    renders_tools = False

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = tokenizer.stop_ids

    def encode(self, messages: Messages, *, loss_on: str, tools: Tools | None = None) -> Encoded:
        """Not supported: plain text has no turns. Raises ConfigError."""
        raise ConfigError("conversations need a chat template; this model is of plain text")

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """BOS, and the contents of the messages joined by newlines."""
        check_plain(messages, tools, options)
        text = "\n".join(message["content"] for message in messages)
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]


class NativeTemplate:
    """Our own template: the header and the end of a turn are single tokens, and each content is encoded by
    itself."""

    source = clock = None
    renders_tools = False
    # What it writes, in Jinja, for those who read our checkpoints with other libraries.
    AS_JINJA = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )

    def __init__(self, tokenizer: BaseTokenizer):
        """`tokenizer` must have CHAT_TOKENS as special tokens."""
        self._tokenizer = tokenizer
        self._header = {role: tokenizer.special_ids[f"<|{role}|>"] for role in ROLES}
        self._end = tokenizer.special_ids["<|end|>"]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([self._end, *tokenizer.stop_ids]))

    def encode(self, messages: Messages, *, loss_on: str, tools: Tools | None = None) -> Encoded:
        """As in `ChatTemplate`."""
        check_plain(messages, tools)
        check_messages(messages, is_prompt=False)
        pieces = [([self._tokenizer.bos_id], False)]
        for message in messages:
            by_assistant = message["role"] == "assistant"
            pieces += [([self._header[message["role"]]], False), (self._turn(message), by_assistant)]
        return joined(pieces, loss_on)

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """As in `ChatTemplate`. It ends with the header of the assistant's turn."""
        check_plain(messages, tools, options)
        check_messages(messages, is_prompt=True)
        turns = [i for message in messages for i in (self._header[message["role"]], *self._turn(message))]
        return [self._tokenizer.bos_id, *turns, self._header["assistant"]]

    def _turn(self, message: Mapping[str, str]) -> list[int]:
        return [*self._tokenizer.encode(message["content"]), self._end]


def check_plain(
    messages: Messages, tools: Tools | None, options: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raise BadRow for what only Jinja templates render."""
    names = [name for name in ("reasoning_content", "tool_calls") if any(name in each for each in messages)]
    names += ["tools"] * bool(tools)
    if options:
        raise BadRow(UNKNOWN_OPTION, f"{', '.join(options)}; the built-in chat template has none")
    if names:
        raise BadRow(
            "not rendered by the built-in chat template",
            f"{', '.join(names)}; a Jinja template may do so",
        )


def row_tools(record: Mapping[str, Any], template: ChatTemplate) -> Tools | None:
    """The tools of a row; none where the template has no place for them, which leaves the column unread."""
    return read_tools(record) if template.renders_tools else None


def load_template(
    tokenizer: BaseTokenizer,
    path: str | None,
    clock: str | None = None,
    options: Sequence[str] = (),
) -> ChatTemplate:
    """The template of the .jinja file `path`, or the one that the tokenizer has under this name; None: the
    tokenizer's own, or else NativeTemplate.

    `clock` is as in JinjaTemplate. `options` are NAME=VALUE: the values of its variables, where a request
    does not give others. Raises ConfigError where there is no template or it cannot be used.
    """
    source, name = tokenizer.chat_template, "the tokenizer's chat template"
    if path is not None and path in tokenizer.chat_templates:
        source, name = tokenizer.chat_templates[path], f"the tokenizer's chat template {path!r}"
    elif path is not None:
        try:
            source = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template={path!r} cannot be read: {error}") from error
        name = f"the chat template {path}"
    if source is not None and source != NativeTemplate.AS_JINJA:
        return JinjaTemplate(tokenizer, with_defaults(source, read_options(options)), name, clock)
    if not all(token in tokenizer.special_ids for token in CHAT_TOKENS):
        others = f" but {', '.join(tokenizer.chat_templates)}" if tokenizer.chat_templates else ""
        raise ConfigError(f"the tokenizer has no chat template{others}; name a .jinja file in data.template")
    if options:
        raise ConfigError(f"data.template_options={','.join(options)}: the built-in chat template has none")
    return NativeTemplate(tokenizer)


def read_options(entries: Sequence[str]) -> dict[str, Any]:
    """The values of NAME=VALUE entries: JSON where it is that (false, 3), else a text. Raises ConfigError."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name.isidentifier() and equals):
            raise ConfigError(
                f"data.template_options has {entry!r}; write NAME=VALUE, such as enable_thinking=false"
            )
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found
