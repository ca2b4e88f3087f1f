"""OpenAI's chat completions API: checks requests and shapes responses.

Fields that cannot be honored are an error, except those that never change the completion (IGNORED) and those
whose value has no effect (NO_EFFECT, null, false, 0, "", [] and {}).
"""

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.data.messages import client_messages
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve.errors import ApiError
from jaxllm.serve.served_model import Chunk, ServedModel

MAX_CHOICES = 16  # largest `n`
MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters; every chunk is compared with each beginning of a stop text
SUPPORTED = {
    "model",
    "messages",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NO_EFFECT = {"response_format": ({"type": "text"},), "tool_choice": ("none", "auto")}


@dataclass(frozen=True)
class ChatRequest:
    """A request after checking."""

    model: ServedModel
    prompt: list[int]
    sampling: SamplingConfig
    seed: int
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool


def read_request(
    body: Mapping[str, Any], models: Mapping[str, ServedModel], sampling: SamplingConfig
) -> ChatRequest:
    """Checks every field; ApiError names the one that is wrong. The first of `models` and `sampling` are the
    defaults."""
    for name, value in body.items():
        allowed = (None, False, 0, "", [], {}, *NO_EFFECT.get(name, ()))
        if name not in SUPPORTED | IGNORED and value not in allowed:
            raise ApiError(400, f"{name} is not supported", name)
    name = body.get("model") or next(iter(models))
    if not isinstance(name, str) or name not in models:
        raise ApiError(
            404, f"model {name!r} does not exist; use one of {', '.join(models)}", "model", "model_not_found"
        )
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    sampling = replace(
        sampling, max_new_tokens=number(body, limit, sampling.max_new_tokens, low=1, integer=True)
    )
    try:
        sampling = replace(
            sampling,
            temperature=number(body, "temperature", sampling.temperature, high=2),
            top_p=number(body, "top_p", sampling.top_p, high=1),
            top_k=number(body, "top_k", sampling.top_k, low=1, integer=True),
            min_p=number(body, "min_p", sampling.min_p, high=1),
        )
    except ConfigError as error:
        raise ApiError(400, str(error), str(error).removeprefix("sampling.").partition("=")[0]) from None
    model, stream = models[name], flag(body, "stream")
    n = number(body, "n", 1, low=1, high=MAX_CHOICES, integer=True)
    if stream and n > 1:
        raise ApiError(400, "n must be 1 where stream is true", "n")
    return ChatRequest(
        model,
        model.encode(read_messages(body.get("messages")), sampling.max_new_tokens),
        sampling,
        seed=number(body, "seed", secrets.randbits(32), high=2**32 - 1, integer=True),
        stop=read_stop(body.get("stop")),
        n=n,
        stream=stream,
        include_usage=flag(body.get("stream_options") or {}, "include_usage"),
    )


def number(
    body: Mapping[str, Any],
    name: str,
    default: Any,
    *,
    low: float = 0,
    high: float = math.inf,
    integer: bool = False,
) -> Any:
    """A number of the request, checked to be in [low, high]; `default` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    kind = int if integer else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ApiError(
            400, f"{name} is {value!r}; it must be {'an integer' if integer else 'a number'} {bounds}", name
        )
    return value


def flag(body: Any, name: str) -> bool:
    """A boolean of the request; false where it is absent or null."""
    value = body.get(name) if isinstance(body, Mapping) else body
    if not isinstance(value, bool | None):
        raise ApiError(400, f"{name} is {value!r}; it must be true or false", name)
    return bool(value)


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Role and content of each message; the chat template checks the rest."""
    if not isinstance(value, list):
        raise ApiError(400, "messages must be a list of objects with role and content", "messages")
    try:
        return client_messages(value)
    except BadRow as error:
        raise ApiError(400, str(error), "messages") from None


def read_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(texts, list)
        or len(texts) > MAX_STOPS
        or not all(isinstance(x, str) and 0 < len(x) <= MAX_STOP_LENGTH for x in texts)
    ):
        raise ApiError(
            400,
            f"stop must be a string or a list of at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_LENGTH} "
            "characters",
            "stop",
        )
    return tuple(texts)


def usage(request: ChatRequest, tokens: int) -> dict[str, int]:
    prompt = len(request.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def response(request: ChatRequest, completions: list[Chunk]) -> dict[str, Any]:
    """The response of a request that is not streamed."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": completion.text},
            "finish_reason": completion.finish_reason,
            "logprobs": None,
        }
        for i, completion in enumerate(completions)
    ]
    return {
        **envelope(request, "chat.completion"),
        "choices": choices,
        "usage": usage(request, sum(completion.tokens for completion in completions)),
    }


async def events(request: ChatRequest, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[str, None]:
    """Server-sent events. An error is an event too, because the HTTP status has already been sent."""
    head = {**envelope(request, "chat.completion.chunk"), "choices": []}
    tokens = 0

    def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                tokens += chunk.tokens
                yield event({"content": chunk.text} if chunk.text else {}, chunk.finish_reason)
    except ApiError as error:
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    if request.include_usage:
        yield f"data: {json.dumps({**head, 'usage': usage(request, tokens)})}\n\n"
    yield "data: [DONE]\n\n"


def envelope(request: ChatRequest, kind: str) -> dict[str, Any]:
    """What responses and events have in common."""
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.model.name}
