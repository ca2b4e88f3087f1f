"""Conversations as token ids, with an exact loss mask.

The loss counts the tokens of the assistant's turns, including the token that ends each. Our own template
writes `<s><|user|>TEXT<|end|><|assistant|>TEXT<|end|>`; other models bring a Jinja template. The template
alone writes the BOS, if there is one. The tokens of a training row before an assistant's turn are exactly the
prompt from which that turn is generated.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from jaxllm.data.messages import ROLES, Messages, check_messages
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import CHAT_TOKENS, BaseTokenizer
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    import jinja2
    import jinja2.parser
    import jinja2.sandbox

LOSS_ON = ("assistant", "last", "all")

_NO_STOP_TOKEN = "its completions do not end in a special token, so a model could not learn to stop"


class Encoded(NamedTuple):
    """A conversation as a training row."""

    ids: list[int]
    loss_mask: list[bool]  # of the same length: True where the loss counts the token as a target


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

    def encode(self, messages: Messages, *, loss_on: str) -> Encoded:
        """A conversation that ends with the assistant's turn, as a training row.

        `loss_on`: "assistant" for the tokens of every assistant turn, "last" for those of the last one, "all"
        for every token but the first. Raises BadRow for messages that cannot be encoded, and ConfigError.
        """
        ...

    def prompt(self, messages: Messages) -> list[int]:
        """The prompt from which the assistant's next turn is generated. Raises BadRow."""
        ...


class PlainTextTemplate:
    """In place of a chat template, for a model that continues text: a prompt is the text itself."""

    source = clock = None

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_id,)

    def encode(self, messages: Messages, *, loss_on: str) -> Encoded:
        """Not supported: plain text has no turns. Raises ConfigError."""
        raise ConfigError("conversations need a chat template; this model is of plain text")

    def prompt(self, messages: Messages) -> list[int]:
        """BOS, and the contents of the messages joined by newlines."""
        text = "\n".join(message["content"] for message in messages)
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]


class NativeTemplate:
    """Our own template: the header and the end of a turn are single tokens, and each content is encoded by
    itself."""

    source = clock = None
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
        self.stop_ids: tuple[int, ...] = (self._end, tokenizer.eos_id)

    def encode(self, messages: Messages, *, loss_on: str) -> Encoded:
        """As in `ChatTemplate`."""
        check_messages(messages, is_prompt=False)
        pieces = [([self._tokenizer.bos_id], False)]
        for message in messages:
            by_assistant = message["role"] == "assistant"
            pieces += [([self._header[message["role"]]], False), (self._turn(message), by_assistant)]
        return _joined(pieces, loss_on)

    def prompt(self, messages: Messages) -> list[int]:
        """As in `ChatTemplate`. It ends with the header of the assistant's turn."""
        check_messages(messages, is_prompt=True)
        turns = [i for message in messages for i in (self._header[message["role"]], *self._turn(message))]
        return [self._tokenizer.bos_id, *turns, self._header["assistant"]]

    def _turn(self, message: Mapping[str, str]) -> list[int]:
        return [*self._tokenizer.encode(message["content"]), self._end]


class JinjaTemplate:
    """A Jinja template as Hugging Face tokenizers have it, rendered in a sandbox.

    The rendering of the messages before an assistant's turn, with `add_generation_prompt`, is the prompt. The
    text that the rendering with that turn adds is the completion, which is in the loss up to its last special
    token. Prompts and completions are encoded separately, since that is how generation produces them.
    """

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
        self._dropped_roles = {role for role in ("system", "tool") if self._drops(role)}

    def encode(self, messages: Messages, *, loss_on: str) -> Encoded:
        """As in `ChatTemplate`.

        Raises ConfigError where the loss is on more than the last turn and the template rewrites earlier
        turns once others follow, as templates do that drop the reasoning of earlier turns.
        """
        check_messages(messages, is_prompt=False)
        self._check_contents(messages)
        pieces = self._prompt_pieces(messages[:-1], allow_rewriting=loss_on == "last")
        pieces += self._completion(messages, "".join(pieces))
        return _joined([(ids, i % 2 == 1) for i, ids in enumerate(self._encoded(pieces))], loss_on)

    def prompt(self, messages: Messages) -> list[int]:
        """As in `ChatTemplate`."""
        check_messages(messages, is_prompt=True)
        self._check_contents(messages)
        return [i for ids in self._encoded(self._prompt_pieces(messages, allow_rewriting=True)) for i in ids]

    def _prompt_pieces(self, messages: Messages, *, allow_rewriting: bool) -> list[str]:
        """The rendered prompt, cut around its assistant turns: prompt, completion, prompt, ..., prompt.

        A template that rewrites earlier turns has no such cuts; with `allow_rewriting` it gives one piece.
        """
        pieces: list[str] = []
        try:
            for k, message in enumerate(messages):
                if message["role"] == "assistant":
                    pieces.append(self._added(pieces, self._render(messages[:k], add_generation_prompt=True)))
                    pieces.append(self._completion(messages[: k + 1], "".join(pieces))[0])
            return [*pieces, self._added(pieces, self._render(messages, add_generation_prompt=True))]
        except _Rewritten:
            if not allow_rewriting:
                raise
            return [self._render(messages, add_generation_prompt=True)]

    def _completion(self, messages: Messages, prompt: str) -> tuple[str, str]:
        """The last message as rendered after `prompt`, split after its last special token."""
        added = self._added([prompt], self._render(messages))
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(added)]
        if not ends:
            raise self._fault(_NO_STOP_TOKEN)
        return added[: ends[-1]], added[ends[-1] :]

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

    def _check_contents(self, messages: Messages) -> None:
        """Raise BadRow for a role that is not rendered, or a content with the name of a special token."""
        for i, message in enumerate(messages, 1):
            if message["role"] in self._dropped_roles:
                raise BadRow("unknown role", f"{self._name} drops {message['role']!r} messages")
            if forged := self._tokenizer.special_pattern.search(message["content"]):
                raise BadRow("special token in the text", f"message {i}: {forged.group().strip()}")

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                tools=None,  # transformers passes these two by default, and templates rely on it
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
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
        question, reply = "What is this?", "It is a probe."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        try:
            prompt = self._render(messages[:1], add_generation_prompt=True)
            completion = "".join(self._completion(messages, prompt))
        except BadRow as error:
            raise self._fault(f"it rejects a user turn followed by an assistant turn: {error}") from error
        for role, content, rendered in (("user", question, prompt), ("assistant", reply, completion)):
            if content not in rendered:
                raise self._fault(f"it drops the content of {role} messages")
        end = self._tokenizer.special_pattern.search(completion.rpartition(reply)[2])
        if end is None:
            raise self._fault(_NO_STOP_TOKEN)
        if self._tokenizer.encode_markup(prompt)[:2] == [self._tokenizer.bos_id] * 2:
            raise self._fault("it begins with two BOS tokens")
        return tuple(dict.fromkeys([self._tokenizer.encode_markup(end.group())[0], self._tokenizer.eos_id]))

    def _drops(self, role: str) -> bool:
        """Whether the template silently drops messages of this role. One that raises is left to do so."""
        probe = {"role": role, "content": "probe"}
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return "probe" not in self._render([probe, *exchange] if role == "system" else [*exchange, probe])
        except (BadRow, ConfigError):
            return False

    def _fault(self, what: str) -> ConfigError:
        return ConfigError(f"{self._name}: {' '.join(what.split())}")


def load_template(tokenizer: BaseTokenizer, path: str | None, clock: str | None = None) -> ChatTemplate:
    """The template of the .jinja file `path`; None: the tokenizer's own, or else NativeTemplate. `clock` is
    as in JinjaTemplate.

    Raises ConfigError where there is none or it cannot be used.
    """
    if path is not None:
        try:
            source = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template={path!r} cannot be read: {error}") from error
        return JinjaTemplate(tokenizer, source, f"the chat template {path}", clock)
    if tokenizer.chat_template is not None:
        return JinjaTemplate(tokenizer, tokenizer.chat_template, clock=clock)
    if all(token in tokenizer.special_ids for token in CHAT_TOKENS):
        return NativeTemplate(tokenizer)
    raise ConfigError("the tokenizer has no chat template; name a .jinja file in data.template")


class _Rewritten(ConfigError):
    """The rendering of a conversation does not start with the rendering of its first turns."""


def _joined(pieces: Sequence[tuple[list[int], bool]], loss_on: str) -> Encoded:
    """Pieces (ids, whether they are an assistant's) as one row."""
    if loss_on not in LOSS_ON:
        raise ConfigError(f"data.loss_on={loss_on!r}: choose one of {', '.join(LOSS_ON)}")
    last_turn = max(i for i, (_, by_assistant) in enumerate(pieces) if by_assistant)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for i, (piece, by_assistant) in enumerate(pieces):
        in_loss = loss_on == "all" or (by_assistant and (loss_on == "assistant" or i == last_turn))
        ids += piece
        loss_mask += [in_loss] * len(piece)
    loss_mask[0] = False  # the first token is never a target
    return Encoded(ids, loss_mask)


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
