"""A checkpoint that is served: conversations in, completions out while they are generated."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import Any, NamedTuple

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError, RunError
from jaxllm.rollout.engine import Busy, Engine, Request
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve.errors import ApiError

RESERVED_TOKENS = 64  # left for the completion; fewer where max_new_tokens or the model's context is small

Messages = Sequence[dict[str, str]]


class Chunk(NamedTuple):
    """Part of a completion, or a whole one."""

    text: str
    tokens: int  # generated tokens, with those that add no text
    finish_reason: str | None  # "stop" or "length" in the last chunk, else None


class ServedModel(NamedTuple):
    """A model with its engine, tokenizer and chat template."""

    name: str  # clients send it as `model`
    checkpoint: dict[str, str]  # its path and hash
    engine: Engine
    template: ChatTemplate
    tokenizer: BaseTokenizer
    max_length: int  # tokens of prompt and completion together

    def encode(self, messages: Messages, max_new_tokens: int) -> list[int]:
        """The prompt's tokens. ApiError where the conversation is malformed or too long."""
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
            tokens = self.template.prompt(messages)
        except (BadRow, ConfigError) as error:
            raise ApiError(400, str(error), "messages") from None
        check(len(tokens), "tokens")
        return tokens

    def stream(
        self, prompt: list[int], sampling: SamplingConfig, seed: int, stop: Sequence[str] = ()
    ) -> AsyncGenerator[Chunk, None]:
        """The completion in chunks, up to the first of the `stop` texts. Closing the generator frees its row.

        The request is submitted at once, before the first chunk is awaited: ApiError where too many wait.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(*tokens_and_reason: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(queue.put_nowait, tokens_and_reason)

        try:
            request = self.engine.submit(prompt, sampling=sampling, seed=seed, on_tokens=put)
        except Busy as error:
            raise ApiError(503, str(error), code="overloaded") from None
        except RunError as error:
            raise ApiError(500, str(error)) from None
        return self._chunks(queue, request, stop)

    async def generate(
        self, prompt: list[int], sampling: SamplingConfig, seed: int, stop: Sequence[str] = ()
    ) -> Chunk:
        """The whole completion as one chunk."""
        async with aclosing(self.stream(prompt, sampling, seed, stop)) as stream:
            chunks = [chunk async for chunk in stream]
        text = "".join(chunk.text for chunk in chunks)
        return Chunk(text, sum(chunk.tokens for chunk in chunks), chunks[-1].finish_reason)

    async def _chunks(
        self, queue: asyncio.Queue, request: Request, stop: Sequence[str]
    ) -> AsyncGenerator[Chunk, None]:
        """What the engine puts into the queue, (tokens, reason) each time, as text."""
        tokens: list[int] = []
        sent_text, sent_tokens, reason = 0, 0, None
        try:
            while reason is None:
                new, reason = await queue.get()
                if reason == "error":
                    raise ApiError(500, "the model has stopped; the server's terminal shows the error")
                tokens += new
                text = self.tokenizer.decode(tokens, from_start=False).lstrip()
                if found := [at for at in (text.find(each) for each in stop) if at >= 0]:
                    text, reason = text[: min(found)], "stop"
                elif reason is None:
                    text = text.rstrip("\ufffd")  # the first bytes of a character that is not complete
                    text = text[: len(text) - partial_stop(text, stop)]
                if len(text) > sent_text or reason is not None:
                    yield Chunk(text[sent_text:], len(tokens) - sent_tokens, reason)
                    sent_text, sent_tokens = max(sent_text, len(text)), len(tokens)
        finally:
            request.cancel()


async def gather(completions: Iterable[Coroutine[Any, Any, Chunk]]) -> list[Chunk]:
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
