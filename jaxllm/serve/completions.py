"""OpenAI's chat completions, as far as a checkpoint can follow: requests checked, responses shaped."""

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.serve.errors import ApiError
from jaxllm.serve.speaker import Said, ServedModel
from jaxllm.errors import ConfigError
from jaxllm.rollout.sampling import SamplingConfig

MAX_CHOICES = 16  # n
MAX_STOPS = 4
LONGEST_STOP = 256  # characters: each piece of an answer is searched for every beginning of it
# Those we follow, those that ask nothing of the answer; any other must have a value that asks for nothing.
FIELDS = {
    "model",
    "messages",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "max_completion_tokens",
}
FIELDS |= {"seed", "stop", "n", "stream", "stream_options"}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NOTHING = {"response_format": ({"type": "text"},), "tool_choice": ("none", "auto")}  # and what is empty


@dataclass(frozen=True)
class ChatRequest:
    """What is to be answered, and how."""

    speaker: ServedModel
    prompt: list[int]
    sampling: SamplingConfig
    seed: int
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool


def read_request(
    body: Mapping[str, Any], speakers: Mapping[str, ServedModel], sampling: SamplingConfig
) -> ChatRequest:
    """Checks every field; ApiError names the one that is wrong. What is not given is as `sampling` has it."""
    for name, value in body.items():
        if name not in FIELDS | IGNORED and value not in (None, False, 0, "", [], {}, *NOTHING.get(name, ())):
            raise ApiError(400, f"{name} is not supported", name)
    name = body.get("model") or next(iter(speakers))
    if not isinstance(name, str) or name not in speakers:
        raise ApiError(
            404, f"there is no model {name!r}, only {', '.join(speakers)}", "model", "model_not_found"
        )
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    sampling = replace(
        sampling, max_new_tokens=number(body, limit, sampling.max_new_tokens, low=1, whole=True)
    )
    try:
        sampling = replace(
            sampling,
            temperature=number(body, "temperature", sampling.temperature, high=2),
            top_p=number(body, "top_p", sampling.top_p, high=1),
            top_k=number(body, "top_k", sampling.top_k, low=1, whole=True),
            min_p=number(body, "min_p", sampling.min_p, high=1),
        )
    except ConfigError as error:
        raise ApiError(400, str(error), str(error).removeprefix("sampling.").partition("=")[0]) from None
    speaker, stream = speakers[name], flag(body, "stream")
    n = number(body, "n", 1, low=1, high=MAX_CHOICES, whole=True)
    if stream and n > 1:
        raise ApiError(400, "n must be 1 where stream is true", "n")
    return ChatRequest(
        speaker,
        speaker.prompt(read_messages(body.get("messages")), sampling.max_new_tokens),
        sampling,
        seed=number(body, "seed", secrets.randbits(32), high=2**32 - 1, whole=True),
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
    whole: bool = False,
) -> Any:
    """A number of the request within bounds."""
    value = body.get(name)
    if value is None:
        return default
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        bounds = f"from {low} on" if high == math.inf else f"from {low} to {high}"
        raise ApiError(
            400, f"{name} is {value!r}, not {'an integer' if whole else 'a number'} {bounds}", name
        )
    return value


def flag(body: Any, name: str) -> bool:
    value = body.get(name) if isinstance(body, Mapping) else body
    if not isinstance(value, bool | None):
        raise ApiError(400, f"{name} is {value!r}, not true or false", name)
    return bool(value)


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages of role and content; a content of several text parts is joined."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ApiError(400, "messages must be a list of objects with role and content", "messages")
    return [{"role": role(each.get("role")), "content": content(each.get("content"))} for each in value]


def role(value: Any) -> Any:
    return "system" if value == "developer" else value


def content(value: Any) -> Any:
    if not isinstance(value, list):
        return value  # the template says what is wrong with it
    texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "the parts of a message's content must be texts", "messages")
    return "".join(texts)


def read_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(texts, list)
        or len(texts) > MAX_STOPS
        or not all(isinstance(x, str) and 0 < len(x) <= LONGEST_STOP for x in texts)
    ):
        raise ApiError(
            400,
            f"stop must be a text or a list of at most {MAX_STOPS}, each of 1 to {LONGEST_STOP} characters",
            "stop",
        )
    return tuple(texts)


def usage(request: ChatRequest, tokens: int) -> dict[str, int]:
    prompt = len(request.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def response(request: ChatRequest, answers: list[Said]) -> dict[str, Any]:
    """The whole of it."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": said.text},
            "finish_reason": said.reason,
            "logprobs": None,
        }
        for i, said in enumerate(answers)
    ]
    return {
        **envelope(request, "chat.completion"),
        "choices": choices,
        "usage": usage(request, sum(said.tokens for said in answers)),
    }


async def events(request: ChatRequest, pieces: AsyncIterator[Said]) -> AsyncIterator[str]:
    """Server-sent events; what goes wrong on the way is one too, for the status is long sent."""
    head = {**envelope(request, "chat.completion.chunk"), "choices": []}
    tokens = 0

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(pieces):
            async for said in pieces:
                tokens += said.tokens
                yield event({"content": said.text} if said.text else {}, said.reason)
    except ApiError as error:
        yield f"data: {error.response().body.decode()}\n\n"
        return
    if request.include_usage:
        yield f"data: {json.dumps({**head, 'usage': usage(request, tokens)})}\n\n"
    yield "data: [DONE]\n\n"


def envelope(request: ChatRequest, kind: str) -> dict[str, Any]:
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.speaker.name}
