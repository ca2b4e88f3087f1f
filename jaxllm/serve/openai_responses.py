"""Responses of OpenAI's API: completes what a request asks for, as JSON or as server-sent events."""

import asyncio
import codecs
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.rollout.engine import Scores
from jaxllm.serve.errors import ApiError
from jaxllm.serve.openai_api import CompletionRequest
from jaxllm.serve.served_model import Chunk, CompletionStream, gather

AT_ONCE = 4  # completions of one request in the engine's queue, so that a list of prompts does not fill it


class Choice(NamedTuple):
    """A completion of a request, and the scores of prompt and completion where log-probs are asked for."""

    prompt: list[int]
    completion: Chunk
    scores: Scores | None


async def complete(request: CompletionRequest) -> list[Choice]:
    """All completions of a request that is not streamed."""
    room = asyncio.Semaphore(AT_ONCE)
    model = request.model

    async def complete_one(prompt: list[int], seed: int) -> Choice:
        async with room:
            completion, scores = Chunk("", [], "length"), None
            if request.max_tokens:
                completion = await model.generate(
                    prompt, request.sampling, seed, request.stop, strip=request.chat
                )
            if request.top_logprobs is not None:
                scores = await model.score([*prompt, *completion.tokens])
            return Choice(prompt, completion, scores)

    return await gather(complete_one(prompt, seed) for prompt, seed in request.choices)


def response(request: CompletionRequest, choices: Sequence[Choice]) -> dict[str, Any]:
    """The response of a request that is not streamed."""
    shaped = [
        {
            "index": i,
            **(chat_content(request, choice) if request.chat else text_content(request, choice)),
            "finish_reason": choice.completion.finish_reason,
        }
        for i, choice in enumerate(choices)
    ]
    tokens = sum(len(choice.completion.tokens) for choice in choices)
    return {**envelope(request), "choices": shaped, "usage": usage(request, tokens)}


def chat_content(request: CompletionRequest, choice: Choice) -> dict[str, Any]:
    """The message, and the log-probs of the tokens that its text consists of."""
    message = {"role": "assistant", "content": choice.completion.text}
    if choice.scores is None:
        return {"message": message, "logprobs": None}
    tokenizer, tokens = request.model.tokenizer, choice.completion.tokens
    whole = tokenizer.decode(tokens, from_start=False)
    end = len(whole) - len(whole.lstrip()) + len(choice.completion.text)
    content = []
    offsets = text_offsets(tokenizer, tokens, from_start=False)
    for position, (token, at) in enumerate(zip(tokens, offsets, strict=True), len(choice.prompt)):
        if at < end:
            log_prob, top = log_probs_at(choice.scores, position, token, request.top_logprobs)
            tops = [token_entry(tokenizer, *each) for each in top.items()]
            content.append({**token_entry(tokenizer, token, log_prob), "top_logprobs": tops})
    return {"message": message, "logprobs": {"content": content, "refusal": None}}


def text_content(request: CompletionRequest, choice: Choice) -> dict[str, Any]:
    """The text, after the prompt where `echo` asks for it, and the log-probs of all its tokens: clients that
    score a text (lm-eval) count on an entry for the last one, a stop token or not."""
    tokenizer, prompt, completion = request.model.tokenizer, choice.prompt, choice.completion
    text = (tokenizer.decode(prompt) if request.echo else "") + completion.text
    if choice.scores is None:
        return {"text": text, "logprobs": None}
    first = 0 if request.echo else len(prompt)
    tokens = [*prompt, *completion.tokens][first:]
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for position, token in enumerate(tokens, first):
        log_prob, top = log_probs_at(choice.scores, position, token, request.top_logprobs)
        values.append(log_prob if position else None)  # nothing comes before the first token
        tops.append(by_text(tokenizer, {**top, token: log_prob}) if position else None)
    log_probs = {
        "tokens": [token_text(tokenizer, token) for token in tokens],
        "token_logprobs": values,
        "top_logprobs": tops if request.top_logprobs else None,
        "text_offset": text_offsets(tokenizer, tokens, from_start=request.echo),
    }
    return {"text": text, "logprobs": log_probs}


def log_probs_at(
    scores: Scores, position: int, token: int, count: int | None
) -> tuple[float, dict[int, float]]:
    """The log-prob of the token at a position, and those of the `count` most likely ones there by id."""
    pairs = zip(scores.top_ids[position].tolist(), scores.top_log_probs[position].tolist(), strict=True)
    top = dict(pairs)
    # From the same array where possible: clients compare it with the largest for equality.
    log_prob = top.get(token, float(scores.log_probs[position]))
    return log_prob, dict(list(top.items())[: count or 0])


def by_text(tokenizer: BaseTokenizer, log_probs: dict[int, float]) -> dict[str, float]:
    """The same by the tokens' text; of several tokens with the same text, the most likely one's."""
    named: dict[str, float] = {}
    for token, value in log_probs.items():
        text = token_text(tokenizer, token)
        named[text] = max(value, named.get(text, value))
    return named


def token_text(tokenizer: BaseTokenizer, token: int) -> str:
    """The text of a token; the name of a special one, and OpenAI's spelling of incomplete UTF-8."""
    if token >= tokenizer.vocab_size:  # the model may have more rows than the tokenizer has tokens
        return f"<{token}>"
    content = tokenizer.token_bytes[token]
    try:
        return content.decode() or tokenizer.pieces[token]
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def token_entry(tokenizer: BaseTokenizer, token: int, log_prob: float) -> dict[str, Any]:
    """A token in a chat's log-probs."""
    content = tokenizer.token_bytes[token] if token < tokenizer.vocab_size else b""
    return {"token": token_text(tokenizer, token), "logprob": log_prob, "bytes": list(content) or None}


def text_offsets(tokenizer: BaseTokenizer, tokens: Sequence[int], *, from_start: bool) -> list[int]:
    """Where in the decoded text each token starts, in characters."""
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    if from_start:  # some tokenizers put a space before each text
        offset = len(tokenizer.decode(tokens)) - len(tokenizer.decode(tokens, from_start=False))
    for token in tokens:
        offsets.append(max(offset, 0))
        content = tokenizer.token_bytes[token] if token < tokenizer.vocab_size else "\ufffd".encode()
        offset += len(decoder.decode(content))
    return offsets


# Streaming


class EventStream(StreamingResponse):
    """A streamed response. However it ends, even before its first event, its streams' rows are freed."""

    def __init__(self, request: CompletionRequest):
        """Submits all completions at once: ApiError, and none of them, where too many wait."""
        self.streams: list[CompletionStream] = []
        try:
            for prompt, seed in request.choices:
                stream = request.model.stream(
                    prompt, request.sampling, seed, request.stop, strip=request.chat
                )
                self.streams.append(stream)
        except ApiError:
            self.cancel()
            raise
        super().__init__(events(request, self.streams), media_type="text/event-stream")

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()


async def events(
    request: CompletionRequest, streams: Sequence[CompletionStream]
) -> AsyncGenerator[str, None]:
    """Server-sent events. An error is an event too, because the HTTP status has already been sent."""
    head, tokens = {**envelope(request), "choices": []}, 0

    def event(index: int, content: str | None, finish_reason: str | None = None, **first: str) -> str:
        if request.chat:
            shaped = {"delta": first | ({} if content is None else {"content": content})}
        else:
            shaped = {"text": content or ""}
        choice = {"index": index, **shaped, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    for index, (prompt, _) in enumerate(request.choices):
        if request.chat:
            yield event(index, "", role="assistant")
        elif request.echo:
            yield event(index, request.model.tokenizer.decode(prompt))
    try:
        async for index, chunk in merged(streams):
            tokens += len(chunk.tokens)
            yield event(index, chunk.text or None, chunk.finish_reason)
    except ApiError as error:
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    if request.include_usage:
        yield f"data: {json.dumps({**head, 'usage': usage(request, tokens)})}\n\n"
    yield "data: [DONE]\n\n"


async def merged(streams: Sequence[CompletionStream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of several streams as they come, each with the index of its stream."""
    next_chunks = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while next_chunks:
            done, _ = await asyncio.wait(next_chunks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, chunk = next_chunks.pop(task), task.result()
                if chunk.finish_reason is None:
                    next_chunks[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, chunk
    finally:
        for task in next_chunks:
            task.cancel()


# Both


def usage(request: CompletionRequest, tokens: int) -> dict[str, int]:
    """Tokens of the prompts and of all completions."""
    prompt = sum(map(len, request.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def envelope(request: CompletionRequest) -> dict[str, Any]:
    """What responses and events have in common."""
    kind = "chat.completion" if request.chat else "text_completion"
    if request.chat and request.stream:
        kind = "chat.completion.chunk"
    name = f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.model.name}
