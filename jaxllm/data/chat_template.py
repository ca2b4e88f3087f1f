"""Conversations as token ids, with the tokens that the loss counts marked exactly.

A token is learnt where it belongs to what the assistant says, the token that ends its turn included. Our own
template writes `<s><|user|>TEXT<|end|><|assistant|>TEXT<|end|>`; models from elsewhere bring theirs as Jinja.
The template writes the BOS, if there is one, and nobody else does. What a training row holds before an answer
is, token for token, what a generating model is given.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxllm.data.sources import BadRow, json_type
from jaxllm.data.tokenizer import CHAT_TOKENS, BaseTokenizer
from jaxllm.errors import ConfigError

ROLES = ("system", "user", "assistant", "tool")
LOSS_ON = ("assistant", "last", "all")

Messages = Sequence[Mapping[str, str]]  # each {"role": one of ROLES, "content": text}


class Encoded(NamedTuple):
    """A conversation as a training row."""

    ids: list[int]
    loss_mask: list[bool]  # the loss counts this token as a target


class NativeTemplate:
    """Our own: the header and the end of a turn are single tokens, and what is said is encoded by itself."""

    source = None

    def __init__(self, tokenizer: BaseTokenizer):
        """`tokenizer` must have CHAT_TOKENS as special tokens."""
        self._tokenizer = tokenizer
        self._header = {role: tokenizer.special_ids[f"<|{role}|>"] for role in ROLES}
        self._end = tokenizer.special_ids["<|end|>"]
        self.stop_ids: tuple[int, ...] = (self._end, tokenizer.eos_id)

    def encode(self, messages: Messages, *, loss_on: str) -> Encoded:
        """`loss_on`: the tokens of every "assistant" turn, of the "last" one, or "all" but the BOS."""
        check_messages(messages, answered=True)
        pieces = [([self._tokenizer.bos_id], False)]
        for message in messages:
            answer = message["role"] == "assistant"
            pieces += [([self._header[message["role"]]], False), (self._turn(message), answer)]
        return _joined(pieces, loss_on)

    def prompt(self, messages: Messages) -> list[int]:
        """What a model is given to answer: ends with the header of the assistant's turn."""
        check_messages(messages, answered=False)
        turns = [i for message in messages for i in (self._header[message["role"]], *self._turn(message))]
        return [self._tokenizer.bos_id, *turns, self._header["assistant"]]

    def _turn(self, message: Mapping[str, str]) -> list[int]:
        return [*self._tokenizer.encode(message["content"]), self._end]


class JinjaTemplate:
    """A template as Hugging Face tokenizers carry it, rendered in a sandbox.

    What it writes for the messages before an answer, with `add_generation_prompt`, is the prompt; what it
    adds when the answer is there too is the answer, learnt up to its last special token. Such pieces are
    encoded each by itself, for that is how generation meets them.
    """

    def __init__(self, tokenizer: BaseTokenizer, source: str, name: str = "the tokenizer's chat template"):
        """`name` is what messages call it."""
        self.source: str | None = source
        self._tokenizer = tokenizer
        self._name = name
        self._special = frozenset(tokenizer.special_ids.values())
        self._template = self._compiled(source)
        self.stop_ids: tuple[int, ...] = self._probed_stop_ids()
        self._silent_roles = {role for role in ("system", "tool") if self._leaves_out(role)}

    def encode(self, messages: Messages, *, loss_on: str) -> Encoded:
        """`loss_on`: the tokens of every "assistant" turn, of the "last" one, or "all" but the first token.

        Raises ConfigError where more than the last turn is to be learnt and the template writes earlier turns
        anew once others follow, as those do that drop earlier thoughts.
        """
        check_messages(messages, answered=True)
        self._check_texts(messages)
        pieces = self._prompt_pieces(messages[:-1], any_template=loss_on == "last")
        pieces += self._answer(messages, "".join(pieces))
        return _joined([(ids, i % 2 == 1) for i, ids in enumerate(self._encoded(pieces))], loss_on)

    def prompt(self, messages: Messages) -> list[int]:
        """What a model is given to answer, as `encode` has it before an answer."""
        check_messages(messages, answered=False)
        self._check_texts(messages)
        return [i for ids in self._encoded(self._prompt_pieces(messages, any_template=True)) for i in ids]

    def _prompt_pieces(self, messages: Messages, *, any_template: bool) -> list[str]:
        """The rendered prompt, cut at its answers' borders: prompt, answer, prompt, ..., prompt.

        A template that writes earlier turns anew has no such borders: `any_template` gives it in one piece.
        """
        pieces: list[str] = []
        try:
            for k, message in enumerate(messages):
                if message["role"] == "assistant":
                    pieces.append(self._added(pieces, self._render(messages[:k], add_generation_prompt=True)))
                    pieces.append(self._answer(messages[: k + 1], "".join(pieces))[0])
            return [*pieces, self._added(pieces, self._render(messages, add_generation_prompt=True))]
        except _Rewritten:
            if not any_template:
                raise
            return [self._render(messages, add_generation_prompt=True)]

    def _answer(self, messages: Messages, prompt: str) -> tuple[str, str]:
        """The last message as rendered after `prompt`: to its last special token, and what follows that."""
        added = self._added([prompt], self._render(messages))
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(added)]
        if not ends:
            raise self._fault("its answers end in no special token, so a model could not learn to stop")
        return added[: ends[-1]], added[ends[-1] :]

    def _added(self, before: Sequence[str], whole: str) -> str:
        """What `whole` says after what is already there."""
        written = "".join(before)
        if not whole.startswith(written):
            raise _Rewritten(
                f"{self._name} writes earlier turns anew when others follow: {_difference(written, whole)}; "
                f"data.loss_on=last learns the last turn only, for which its prompt alone must stay as it is"
            )
        return whole.removeprefix(written)

    def _encoded(self, pieces: Sequence[str]) -> list[list[int]]:
        """Each piece by itself; of those before, it matters only whether they end in a special token."""
        encoded: list[list[int]] = []
        after = ""
        for piece in pieces:
            encoded.append(self._tokenizer.encode_markup(piece, after=after))
            if encoded[-1]:
                last = encoded[-1][-1]
                after = self._tokenizer.pieces[last] if last in self._special else "\n"
        return encoded

    def _check_texts(self, messages: Messages) -> None:
        for i, message in enumerate(messages, 1):
            if message["role"] in self._silent_roles:
                raise BadRow("unknown role", f"{self._name} leaves out {message['role']!r} messages")
            if forged := self._tokenizer.special_pattern.search(message["content"]):
                raise BadRow("special token in the text", f"message {i}: {forged.group().strip()}")

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                tools=None,  # transformers passes these two by default, and templates count on it
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except BadRow:
            raise
        except Exception as error:  # foreign code fails in any way, and the sandbox refuses in some
            raise self._fault(f"{type(error).__name__}: {error}") from error

    def _compiled(self, source: str) -> Any:
        environment = _environment()
        from jinja2 import TemplateSyntaxError

        try:
            return environment.from_string(source)
        except TemplateSyntaxError as error:
            raise self._fault(f"line {error.lineno}: {error.message}") from error

    def _probed_stop_ids(self) -> tuple[int, ...]:
        """The token that follows what an answer says, and EOS; and on the way, that it works at all."""
        question, answer = "What is this?", "It is a probe."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            prompt = self._render(messages[:1], add_generation_prompt=True)
            written = "".join(self._answer(messages, prompt))
        except BadRow as error:
            raise self._fault(f"it refuses a question and its answer: {error}") from error
        for text, place in ((question, prompt), (answer, written)):
            if text not in place:
                raise self._fault(
                    f"it leaves out what the {'user' if text == question else 'assistant'} says"
                )
        end = self._tokenizer.special_pattern.search(written.rpartition(answer)[2])
        if end is None:
            raise self._fault("its answers end in no special token, so a model could not learn to stop")
        if self._tokenizer.encode_markup(prompt)[:2] == [self._tokenizer.bos_id] * 2:
            raise self._fault("it begins with two BOS tokens")
        return tuple(dict.fromkeys([self._tokenizer.encode_markup(end.group())[0], self._tokenizer.eos_id]))

    def _leaves_out(self, role: str) -> bool:
        """Some pass over a role without a word; others raise, and the row that has it will be told."""
        probe = {"role": role, "content": "probe"}
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return "probe" not in self._render([probe, *exchange] if role == "system" else [*exchange, probe])
        except (BadRow, ConfigError):
            return False

    def _fault(self, what: str) -> ConfigError:
        return ConfigError(f"{self._name}: {' '.join(what.split())}")


ChatTemplate = NativeTemplate | JinjaTemplate


def load_template(tokenizer: BaseTokenizer, path: str | None) -> ChatTemplate:
    """The template of the .jinja file `path`. None: the one that came with the tokenizer, or else our own."""
    if path is not None:
        try:
            source = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template={path!r} cannot be read: {error}") from error
        return JinjaTemplate(tokenizer, source, f"the chat template {path}")
    if tokenizer.chat_template is not None:
        return JinjaTemplate(tokenizer, tokenizer.chat_template)
    if all(token in tokenizer.special_ids for token in CHAT_TOKENS):
        return NativeTemplate(tokenizer)
    raise ConfigError("the tokenizer has no chat template: name a .jinja file by data.template")


def check_messages(messages: Messages, *, answered: bool) -> None:
    """BadRow unless this is a conversation that ends in an answer, or (not `answered`) calls for one."""
    for i, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1)
            raise BadRow(
                "unknown role", f"message {i}: {role!r}, not {near[0] if near else ', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise BadRow("wrong type", f"message {i}: the content is {json_type(content)}, not a string")
        if not content.strip() and role in ("user", "assistant"):
            raise BadRow("empty text", f"message {i}, of the {role}")
        before = messages[i - 2]["role"] if i > 1 else None
        if role == "system" and before is not None:
            raise BadRow("wrong role order", f"message {i}: system comes first or not at all")
        if role == "assistant" and before in (None, "assistant"):
            raise BadRow("wrong role order", f"message {i}: the assistant answers nobody")
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn")
    if not messages:
        raise BadRow("wrong role order", "there is no message")
    if answered != (messages[-1]["role"] == "assistant"):
        raise BadRow("wrong role order", f"the last message is of the {messages[-1]['role']}")


class _Rewritten(ConfigError):
    """The rendering of a conversation does not begin with that of its beginning."""


def _joined(pieces: Sequence[tuple[list[int], bool]], loss_on: str) -> Encoded:
    """Pieces (ids, is it an answer?) as one row."""
    if loss_on not in LOSS_ON:
        raise ConfigError(f"data.loss_on={loss_on!r}: choose one of {', '.join(LOSS_ON)}")
    last_answer = max(i for i, (_, answer) in enumerate(pieces) if answer)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for i, (piece, answer) in enumerate(pieces):
        ids += piece
        loss_mask += [loss_on == "all" or (answer and (loss_on == "assistant" or i == last_answer))] * len(piece)
    loss_mask[0] = False  # nothing comes before it to predict it from
    return Encoded(ids, loss_mask)


def _difference(before: str, after: str) -> str:
    """Where two texts part, in a few words of each."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    near = slice(max(0, at - 20), at + 20)
    return f"{before[near]!r} becomes {after[near]!r}"


def _environment() -> Any:
    """Jinja as chat templates expect it, in a sandbox: they come from anybody."""
    try:
        from jinja2 import ext, nodes, parser, sandbox
    except ImportError as error:
        raise ConfigError("a Jinja chat template needs an extra: pip install 'jaxllm[hf]'") from error

    class Generation(ext.Extension):
        """`{% generation %}` marks the answers for other trainers; here rendering finds them."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise BadRow("refused by the chat template", " ".join(str(message).split()))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
