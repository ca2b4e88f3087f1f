"""A checkpoint that answers: messages in, text out as it is said."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import Any, NamedTuple

from jaxllm.serve.errors import ApiError
from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError, RunError
from jaxllm.rollout.engine import Busy, Engine, Request
from jaxllm.rollout.sampling import SamplingConfig

ROOM = 64  # tokens that a prompt leaves for its answer, where so many are wanted and the model is not tiny

Messages = Sequence[dict[str, str]]


class Said(NamedTuple):
    """A piece of an answer."""

    text: str
    tokens: int  # that it took, silent ones too
    reason: str | None  # why the answer ends here: "stop" or "length"


class ServedModel(NamedTuple):
    """A model, and what it takes to talk to it."""

    name: str  # as the user calls it
    checkpoint: dict[str, str]  # path and hash
    engine: Engine
    template: ChatTemplate
    tokenizer: BaseTokenizer
    max_length: int

    def prompt(self, messages: Messages, max_new_tokens: int) -> list[int]:
        """The tokens to continue. ApiError for a conversation that cannot be answered."""
        room = min(max_new_tokens, ROOM, max(1, self.max_length // 4))

        def check(length: int, unit: str) -> None:
            if length + room > self.max_length:
                raise ApiError(
                    400,
                    f"the messages are {length} {unit}; the model reads {self.max_length} tokens, and its "
                    f"answer needs {room} of them: shorten them",
                    "messages",
                    "context_length_exceeded",
                )

        check(len(messages), "in number")  # a token each at least, and a Jinja template is rendered for each
        try:
            tokens = self.template.prompt(messages)
        except (BadRow, ConfigError) as error:
            raise ApiError(400, str(error), "messages") from None
        check(len(tokens), "tokens")
        return tokens

    def say(
        self, prompt: list[int], sampling: SamplingConfig, seed: int, stop: Sequence[str] = ()
    ) -> AsyncIterator[Said]:
        """The answer piece by piece, cut before the first of the `stop` texts. Closing it frees its row.

        It is asked for at once: ApiError where too many wait.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(*piece: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        try:
            request = self.engine.submit(prompt, sampling=sampling, seed=seed, say=put)
        except Busy as error:
            raise ApiError(503, str(error), code="overloaded") from None
        except RunError as error:
            raise ApiError(500, str(error)) from None
        return self._pieces(queue, request, stop)

    async def answer(
        self, prompt: list[int], sampling: SamplingConfig, seed: int, stop: Sequence[str] = ()
    ) -> Said:
        """The whole answer."""
        async with aclosing(self.say(prompt, sampling, seed, stop)) as said:
            texts, tokens, reasons = zip(*[piece async for piece in said], strict=True)
        return Said("".join(texts), sum(tokens), reasons[-1])

    async def _pieces(
        self, queue: asyncio.Queue, request: Request, stop: Sequence[str]
    ) -> AsyncIterator[Said]:
        tokens: list[int] = []
        told, counted, reason = 0, 0, None
        try:
            while reason is None:
                more, reason = await queue.get()
                if reason == "error":
                    raise ApiError(500, "the model has ended: see the server's terminal")
                tokens += more
                text = self.tokenizer.decode(tokens, from_start=False).lstrip()
                if found := [at for at in (text.find(word) for word in stop) if at >= 0]:
                    text, reason = text[: min(found)], "stop"
                elif reason is None:
                    text = text.rstrip("\ufffd")  # the rest of that character is still to come
                    text = text[: len(text) - held_back(text, stop)]
                if len(text) > told or reason is not None:
                    yield Said(text[told:], len(tokens) - counted, reason)
                    told, counted = max(told, len(text)), len(tokens)
        finally:
            request.cancel()


async def together(answers: Iterable[Coroutine[Any, Any, Said]]) -> list[Said]:
    """All of them; where one fails the others are ended, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop text."""
    begun = (n for word in stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n]))
    return max(begun, default=0)
