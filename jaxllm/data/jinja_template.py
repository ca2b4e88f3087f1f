"""Chat templates in Jinja, as Hugging Face tokenizers have them, with an exact loss mask.

The rendering of the messages before an assistant's turn, with `add_generation_prompt`, is the prompt. The
text that the rendering with that turn adds is the completion, which is in the loss up to its last special
token. Prompts and completions are encoded separately, since that is how generation produces them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from jaxllm.data.base_tokenizer import BaseTokenizer
from jaxllm.data.loss_mask import Encoded, joined
from jaxllm.data.messages import Messages, check_messages, texts_in
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    import jinja2
    import jinja2.parser
    import jinja2.sandbox

# Variables that every template is given; all others are options.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

UNKNOWN_OPTION = "unknown option"  # the problem of a BadRow

_NO_STOP_TOKEN = "its completions do not end in a special token, so a model could not learn to stop"
_THOUGHT = re.compile(r"<think>\s*(?P<end></think>\s*)?\Z")  # opened by a prompt, and maybe closed again
_QUESTION, _REPLY, _PROBE = "What is this?", "It is a probe.", "probe"
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
Tools = Sequence[Mapping[str, Any]]  # the JSON schemas of the functions that a model may call


class JinjaTemplate:
    """A Jinja template, rendered in a sandbox. See the top of this file."""

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        source: str,
        name: str = "the tokenizer's chat template",
        clock: str | None = None,
    ):
        """`name` is used in error messages; `clock`: None stands for now. The time does not pass, so that a
        conversation is the same tokens whenever it is encoded.

        Raises ConfigError for a template that cannot be used.
        """
        self.source: str | None = source
        now = clock or datetime.now().isoformat(timespec="seconds")
        self.clock: str | None = now if "strftime_now" in source else None
        self._tokenizer = tokenizer
        self._name = name
        self._special = frozenset(tokenizer.special_ids.values())
        self._template = self._compiled(source)
        self.stop_ids: tuple[int, ...] = self._probed_stop_ids()
        self.renders_tools: bool = self._probe_tools()
        self._dropped_roles = {role for role in ("system", "tool") if self._drops(role)}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process is made from the source."""
        return JinjaTemplate, (self._tokenizer, self.source, self._name, self.clock)

    def encode(self, messages: Messages, *, loss_on: str, tools: Tools | None = None) -> Encoded:
        """As in `ChatTemplate`.

        Raises ConfigError where the loss is on more than the last turn and the template rewrites earlier
        turns once others follow, as templates do that drop the reasoning of earlier turns.
        """
        check_messages(messages, is_prompt=False)
        self._check(messages, tools)
        given = {"tools": tools}
        pieces = self._prompt_pieces(messages[:-1], given, allow_rewriting=loss_on == "last")
        pieces += self._completion(messages, "".join(pieces), given, is_last=True)
        self._check_tool_calls(messages, pieces)
        return joined([(ids, i % 2 == 1) for i, ids in enumerate(self._encoded(pieces))], loss_on)

    def prompt(
        self, messages: Messages, *, tools: Tools | None = None, options: Mapping[str, Any] = _NO_OPTIONS
    ) -> list[int]:
        """As in `ChatTemplate`."""
        check_messages(messages, is_prompt=True)
        self._check(messages, tools)
        if unknown := options.keys() - self.options:
            known = ", ".join(sorted(self.options)) or "none"
            raise BadRow(UNKNOWN_OPTION, f"{', '.join(sorted(unknown))}; {self._name} reads {known}")
        pieces = self._prompt_pieces(messages, {"tools": tools, **options}, allow_rewriting=True)
        self._check_tool_calls(messages, pieces)
        return [i for ids in self._encoded(pieces) for i in ids]

    @cached_property
    def options(self) -> frozenset[str]:
        """The variables that the template reads besides messages and tools, such as `enable_thinking`."""
        assert self.source is not None
        return options_of(self.source)

    def _prompt_pieces(
        self, messages: Messages, given: Mapping[str, Any], *, allow_rewriting: bool
    ) -> list[str]:
        """The rendered prompt, cut around its assistant turns: prompt, completion, prompt, ..., prompt.

        A template that rewrites earlier turns has no such cuts; with `allow_rewriting` it gives one piece.
        """
        pieces: list[str] = []
        try:
            for k, message in enumerate(messages):
                if message["role"] == "assistant":
                    prompt = self._render(messages[:k], given, add_generation_prompt=True)
                    pieces.append(self._added(pieces, prompt))
                    pieces.append(self._completion(messages[: k + 1], "".join(pieces), given)[0])
            return [*pieces, self._added(pieces, self._render(messages, given, add_generation_prompt=True))]
        except (_Rewritten, _ClosedThought):
            if not allow_rewriting:
                raise
            return [self._render(messages, given, add_generation_prompt=True)]

    def _completion(
        self, messages: Messages, prompt: str, given: Mapping[str, Any], *, is_last: bool = False
    ) -> tuple[str, str]:
        """The last message as rendered after `prompt`, split after its last special token.

        `is_last`: no turn follows it, and so it does not matter whether the prompt is rendered as before.
        """
        whole = self._render(messages, given)
        thought = _THOUGHT.search(prompt)
        if thought and not whole.startswith(prompt) and whole.startswith(prompt[: thought.start()]):
            # The prompt opens a thought, and finished turns are rendered without it.
            added = self._after_thought(messages[-1], bool(thought["end"]), whole[thought.start() :])
        elif is_last and not whole.startswith(prompt) and (header := self._header(prompt)) in whole:
            # Mistral's put the system message into the last user turn, but only where no answer follows.
            added = whole.rpartition(header)[2]
        else:
            added = self._added([prompt], whole)
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(added)]
        if not ends:
            raise self._fault(_NO_STOP_TOKEN)
        return added[: ends[-1]], added[ends[-1] :]

    def _header(self, prompt: str) -> str:
        """The end of a prompt, from its last special token on. No content has one, and so the last place of
        the header in a conversation is before its last turn."""
        starts = [match.start() for match in self._tokenizer.special_pattern.finditer(prompt)]
        return prompt[starts[-1] :] if starts else prompt

    def _after_thought(self, message: Mapping[str, Any], closed: bool, turn: str) -> str:
        """What a model generates after a prompt that has opened a thought, and maybe `closed` it: the rest of
        the thought, and the turn as it is rendered."""
        reasoning, content = message.get("reasoning_content", ""), message["content"]
        thought = f"{reasoning}\n" if reasoning else content.rpartition("</think>")[0]
        if closed:
            if thought.removeprefix("<think>").strip():
                raise _ClosedThought("reasoning where the prompt closes the thought", self._name)
            return turn.rpartition("</think>")[2].lstrip("\n")
        if "</think>" in turn:
            return turn.removeprefix("<think>").lstrip("\n")
        thought = thought.removeprefix("<think>").lstrip("\n") or "\n"
        return f"{thought}</think>" + ("" if turn.startswith("\n") else "\n\n") + turn

    def _added(self, before: Sequence[str], whole: str) -> str:
        """The part of `whole` after the pieces `before`."""
        rendered = "".join(before)
        if not whole.startswith(rendered):
            raise _Rewritten(
                f"{self._name} rewrites earlier turns when others follow: {_difference(rendered, whole)}; "
                f"set data.loss_on=last to train on the last turn only"
            )
        return whole.removeprefix(rendered)

    def _encoded(self, pieces: Sequence[str]) -> list[list[int]]:
        """The ids of each piece, encoded separately; the pieces before matter only by their last token."""
        encoded: list[list[int]] = []
        after = ""
        for piece in pieces:
            encoded.append(self._tokenizer.encode_markup(piece, after=after))
            if encoded[-1]:
                last = encoded[-1][-1]
                after = self._tokenizer.pieces[last] if last in self._special else "\n"
        return encoded

    def _check(self, messages: Messages, tools: Tools | None) -> None:
        """Raise BadRow for what is not rendered, and for the name of a special token in a text."""
        if tools and not self.renders_tools:
            raise BadRow("tools that are not rendered", f"{self._name} has no place for them")
        for i, message in enumerate(messages, 1):
            if message["role"] in self._dropped_roles:
                raise BadRow("unknown role", f"{self._name} drops {message['role']!r} messages")
            if "reasoning_content" in message and not self._renders_reasoning:
                raise BadRow(
                    "reasoning that is not rendered",
                    f"message {i}: {self._name} has no place for reasoning_content",
                )
        for where, value in [*((f"message {i}", m) for i, m in enumerate(messages, 1)), ("tools", tools)]:
            for text in texts_in(value):
                if forged := self._tokenizer.special_pattern.search(text):
                    raise BadRow("special token in the text", f"{where}: {forged.group().strip()}")

    def _check_tool_calls(self, messages: Messages, pieces: Sequence[str]) -> None:
        """Raise BadRow for a tool call that is not rendered."""
        rendered = "".join(pieces) if any("tool_calls" in message for message in messages) else ""
        for i, message in enumerate(messages, 1):
            for call in message.get("tool_calls", ()):
                if (name := call["function"]["name"]) not in rendered:
                    raise BadRow(
                        "tool calls that are not rendered",
                        f"message {i}: {self._name} drops that of {name!r}",
                    )

    def _probe_tools(self) -> bool:
        function = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        try:
            text = self._render(_user_turn(), {"tools": tools}, add_generation_prompt=True)
        except (BadRow, ConfigError):
            return True  # that of the actual messages says why
        return _PROBE in text

    @cached_property
    def _renders_reasoning(self) -> bool:
        reply = {"role": "assistant", "content": _REPLY.replace(_PROBE, ""), "reasoning_content": _PROBE}
        prompt = self._render(_user_turn(), {}, add_generation_prompt=True)
        if (thought := _THOUGHT.search(prompt)) and not thought["end"]:
            return True
        return _PROBE in self._render([*_user_turn(), reply], {})

    def _render(
        self, messages: Messages, given: Mapping[str, Any], *, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._template.render(
                **{
                    "messages": list(map(_as_rendered, messages)),
                    "tools": None,  # transformers passes these two by default, and templates rely on it
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self._tokenizer.special_tokens_map,
                    **given,
                }
            )
        except BadRow:
            raise
        except Exception as error:  # foreign code can raise anything, and so can the sandbox
            raise self._fault(f"{type(error).__name__}: {error}") from error

    def _compiled(self, source: str) -> "jinja2.Template":
        environment = _environment()
        environment.globals["strftime_now"] = self._strftime_now
        from jinja2 import TemplateSyntaxError

        try:
            return environment.from_string(source)
        except TemplateSyntaxError as error:
            raise self._fault(f"line {error.lineno}: {error.message}") from error

    def _strftime_now(self, format: str) -> str:
        assert self.clock is not None
        return datetime.fromisoformat(self.clock).strftime(format)

    def _probed_stop_ids(self) -> tuple[int, ...]:
        """The special token after an assistant's content, and EOS, found by rendering a probe.

        Raises ConfigError where the rendering shows that the template cannot be used.
        """
        messages = [*_user_turn(), {"role": "assistant", "content": _REPLY}]
        try:
            prompt = self._render(messages[:1], {}, add_generation_prompt=True)
            completion = "".join(self._completion(messages, prompt, {}))
        except BadRow as error:
            raise self._fault(f"it rejects a user turn followed by an assistant turn: {error}") from error
        for role, content, rendered in (("user", _QUESTION, prompt), ("assistant", _REPLY, completion)):
            if content not in rendered:
                raise self._fault(f"it drops the content of {role} messages")
        end = self._tokenizer.special_pattern.search(completion.rpartition(_REPLY)[2])
        if end is None:
            raise self._fault(_NO_STOP_TOKEN)
        if self._tokenizer.encode_markup(prompt)[:2] == [self._tokenizer.bos_id] * 2:
            raise self._fault("it begins with two BOS tokens")
        end_id = self._tokenizer.encode_markup(end.group())[0]
        return tuple(dict.fromkeys([end_id, *self._tokenizer.stop_ids]))

    def _drops(self, role: str) -> bool:
        """Whether the template silently drops messages of this role. One that raises is left to do so."""
        probe = {"role": role, "content": _PROBE}
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            if role == "tool":
                return _PROBE not in self._render([*exchange, probe], {})
            prompt = self._render([probe, exchange[0]], {}, add_generation_prompt=True)
            return _PROBE not in prompt + self._render([probe, *exchange], {})
        except (BadRow, ConfigError):
            return False

    def _fault(self, what: str) -> ConfigError:
        return ConfigError(f"{self._name}: {' '.join(what.split())}")


class _Rewritten(ConfigError):
    """The rendering of a conversation does not start with the rendering of its first turns."""


class _ClosedThought(BadRow):
    """A turn has reasoning, and the prompt before it has an empty thought."""


def options_of(source: str) -> frozenset[str]:
    """The variables that the template reads and is not given: those that it never sets, and those that it
    asks whether they are defined."""
    from jinja2 import meta, nodes

    environment = _environment()
    tree = environment.parse(source)
    given = {*GIVEN, *TOKENS, *environment.globals, "strftime_now"}
    read = meta.find_undeclared_variables(tree) - given
    is_set = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    return frozenset(read - is_set | read & {node.name for node in tests if isinstance(node, nodes.Name)})


def with_defaults(source: str, options: Mapping[str, Any]) -> str:
    """The template with values for its variables, which a caller of it can still set.

    Raises ConfigError for a variable that it does not read.
    """
    known = options_of(source) if options else frozenset()
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            f"data.template_options: the chat template reads no {', '.join(unknown)}; its options are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    values = {name: "none" if x is None else json.dumps(x, ensure_ascii=False) for name, x in options.items()}
    lines = [
        f"{{% set {name} = {name} if {name} is defined else {value} %}}\n" for name, value in values.items()
    ]
    return "".join(lines) + source


def without_defaults(source: str | None) -> str | None:
    """What `with_defaults` was given."""
    return source and re.sub(r"\A(\{% set (\w+) = \2 if \2 is defined else .* %\}\n)+", "", source)


def _user_turn() -> list[dict[str, Any]]:
    return [{"role": "user", "content": _QUESTION}]


def _as_rendered(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it: gpt-oss's call reasoning `thinking`, as transformers does too."""
    shown = {name: value for name, value in message.items() if name != "weight"}
    if "reasoning_content" in shown:
        shown["thinking"] = shown["reasoning_content"]
    return shown


def _difference(before: str, after: str) -> str:
    """An excerpt of each text around the first character in which they differ."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    near = slice(max(0, at - 20), at + 20)
    return f"{before[near]!r} becomes {after[near]!r}"


def _environment() -> "jinja2.sandbox.ImmutableSandboxedEnvironment":
    """Jinja with the functions that chat templates expect, sandboxed, since templates are untrusted code."""
    try:
        from jinja2 import ext, nodes, parser, sandbox
    except ImportError as error:
        raise ConfigError("a Jinja chat template needs an extra: pip install 'jaxllm[hf]'") from error

    class Generation(ext.Extension):
        """`{% generation %}` marks assistant turns for other trainers. It has no effect here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise BadRow("rejected by the chat template", " ".join(str(message).split()))
