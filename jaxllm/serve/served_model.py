"""A checkpoint that is served: conversations in, completions out while they are generated."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from jaxllm.data.chat_template import UNKNOWN_OPTION, ChatTemplate, Tools
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError, DataError, RunError
from jaxllm.rollout.engine import Busy, Engine, Request, Scores
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve.errors import ApiError

T = TypeVar("T")

RESERVED_TOKENS = 64  # left for the completion; fewer where max_new_tokens or the model's context is small

Messages = Sequence[dict[str, Any]]


class Chunk(NamedTuple):
    """Part of a completion, or a whole one."""

    text: str
    tokens: list[int]  # generated tokens, with those that add no text
    finish_reason: str | None  # "stop" or "length" in the last chunk, else None


class ServedModel(NamedTuple):
    """A model with its engine, tokenizer and chat template."""

    name: str  # clients send it as `model`
    checkpoint: dict[str, str]  # its path and hash
    engine: Engine
    template: ChatTemplate
    tokenizer: BaseTokenizer
    max_length: int  # tokens of prompt and completion together

    def encode_text(self, prompt: str | list[int], max_new_tokens: int) -> list[int]:
        """The tokens of a text to be continued, after BOS as in training; token ids as they are. ApiError
        where they do not fit."""
        bos = self.tokenizer.bos_id
        tokens = [bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        if len(tokens) + min(max_new_tokens, 1) > self.max_length:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens; the model's context holds {self.max_length}, with the "
                "completion: shorten the prompt",
                "prompt",
                "context_length_exceeded",
            )
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.tokenizer.vocab_size:
            raise ApiError(
                400, f"prompt must hold token ids from 0 to {self.tokenizer.vocab_size - 1}", "prompt"
            )
        return tokens

    def encode(
        self,
        messages: Messages,
        max_new_tokens: int,
        *,
        tools: Tools | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The prompt's tokens; `tools` and `options` are as in `ChatTemplate.prompt`. ApiError where the
        conversation is malformed or too long, or where the chat template cannot render it."""
        reserved = min(max_new_tokens, RESERVED_TOKENS, max(1, self.max_length // 4))

        def check(length: int, unit: str) -> None:
            if length + reserved > self.max_length:
                raise ApiError(
                    400,
                    f"the conversation has {length} {unit}; the model's context holds {self.max_length} "
                    f"tokens, {reserved} of them for the completion: shorten the conversation",
                    "messages",
                    "context_length_exceeded",
                )

        # A message takes at least one token, and rendering many with a Jinja template is slow.
        check(len(messages), "messages")
        try:
            tokens = self.template.prompt(messages, tools=tools, options=options)
        except (BadRow, ConfigError) as error:
            of_options = isinstance(error, BadRow) and error.problem == UNKNOWN_OPTION
            param = "chat_template_kwargs" if of_options else "messages"
            raise ApiError(400, str(error), param) from None
        check(len(tokens), "tokens")
        return tokens

    def stream(
        self,
        prompt: list[int],
        sampling: SamplingConfig,
        seed: int,
        stop: Sequence[str] = (),
        *,
        strip: bool = True,
    ) -> "CompletionStream":
        """The completion in chunks, up to the first of the `stop` texts; `strip`: without white space before.

        The request is submitted at once, before the first chunk is awaited: ApiError where too many wait.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(*tokens_and_reason: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(queue.put_nowait, tokens_and_reason)

        request = submitted(
            lambda: self.engine.submit(prompt, sampling=sampling, seed=seed, on_tokens=put), "messages"
        )
        return CompletionStream(queue, request, self.tokenizer, stop, strip)

    async def generate(
        self,
        prompt: list[int],
        sampling: SamplingConfig,
        seed: int,
        stop: Sequence[str] = (),
        *,
        strip: bool = True,
    ) -> Chunk:
        """The whole completion as one chunk."""
        stream = self.stream(prompt, sampling, seed, stop, strip=strip)
        try:
            chunks = [chunk async for chunk in stream]
        finally:
            stream.cancel()
        text = "".join(chunk.text for chunk in chunks)
        return Chunk(text, [i for chunk in chunks for i in chunk.tokens], chunks[-1].finish_reason)

    async def score(self, tokens: Sequence[int]) -> Scores:
        """The log-probs of given tokens."""
        loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def deliver(scores: Scores | None) -> None:
            if not result.done():  # canceled
                result.set_result(scores)

        def on_scores(scores: Scores | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(deliver, scores)

        request = submitted(lambda: self.engine.score(tokens, on_scores), "prompt")
        try:
            scores = await result
        finally:
            request.cancel()
        if scores is None:
            raise ApiError(500, STOPPED)
        return scores


STOPPED = "the model has stopped; the server's terminal shows the error"


def submitted(submit: Callable[[], T], param: str) -> T:
    """What `submit` returns; the engine's errors as an ApiError."""
    try:
        return submit()
    except Busy as error:
        raise ApiError(503, str(error), code="overloaded") from None
    except DataError as error:
        raise ApiError(400, str(error), param) from None
    except RunError as error:
        raise ApiError(500, str(error)) from None


class CompletionStream(AsyncIterator[Chunk]):
    """A completion that has been submitted, in chunks as the engine delivers them: (tokens, reason) each.

    `cancel` frees its row, whether or not anything has been read. Whoever may leave before the last chunk
    calls it.
    """

    def __init__(
        self,
        queue: asyncio.Queue,
        request: Request,
        tokenizer: BaseTokenizer,
        stop: Sequence[str],
        strip: bool,
    ):
        self.cancel = request.cancel
        self._queue, self._tokenizer, self._stop, self._strip = queue, tokenizer, stop, strip
        self._tokens: list[int] = []
        self._sent_text, self._sent_tokens, self._finished = 0, 0, False

    async def __anext__(self) -> Chunk:
        while not self._finished:
            new, reason = await self._queue.get()
            if reason == "error":
                raise ApiError(500, STOPPED)
            before, self._tokens = len(self._tokens), self._tokens + new
            text = self._text(len(self._tokens))
            if any(each in text for each in self._stop):
                text, reason = self._cut(before), "stop"
            elif reason is None:
                text = text.rstrip("\ufffd")  # the first bytes of a character that is not complete
                text = text[: len(text) - partial_stop(text, self._stop)]
            self._finished = reason is not None
            if len(text) > self._sent_text or self._finished:
                chunk = Chunk(text[self._sent_text :], self._tokens[self._sent_tokens :], reason)
                self._sent_text, self._sent_tokens = max(self._sent_text, len(text)), len(self._tokens)
                if self._finished:
                    self.cancel()  # it continues after a stop text
                return chunk
        raise StopAsyncIteration

    def _text(self, count: int) -> str:
        """The text of the first tokens."""
        text = self._tokenizer.decode(self._tokens[:count], from_start=False)
        return text.lstrip() if self._strip else text

    def _cut(self, before: int) -> str:
        """Drops the tokens after the one that completes a stop text, which came with others after the first
        `before`; returns the text before the stop text."""
        for count in range(before + 1, len(self._tokens) + 1):
            text = self._text(count)
            if found := [at for at in (text.find(each) for each in self._stop) if at >= 0]:
                del self._tokens[count:]
                return text[: min(found)]
        raise AssertionError("no stop text in the tokens")


async def gather(completions: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Awaits all of them. Where one fails, cancels the others and raises its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(completion) for completion in completions]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def partial_stop(text: str, stop: Sequence[str]) -> int:
    """The number of characters at the end of `text` that may be the beginning of a stop text."""
    lengths = (n for each in stop for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n]))
    return max(lengths, default=0)
