"""Requests of OpenAI's API, /v1/chat/completions and /v1/completions: reads and checks every field.

A field that cannot be honored is an error, except where it never changes the completion (IGNORED), is null,
or has a value that asks for nothing (NEUTRAL; 0 and false do not always: a repetition penalty's is 1).
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.data.messages import client_messages, read_tools
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError
from jaxllm.rollout.engine import TOP_SCORES
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve.errors import ApiError
from jaxllm.serve.served_model import ServedModel

MAX_CHOICES = 16  # largest `n`
MAX_PROMPTS = 256
MAX_STOPS = 16  # OpenAI's is 4; evaluations of code send more
MAX_STOP_LENGTH = 256  # characters; every chunk is compared with each beginning of a stop text
COMMON = {
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
}
CHAT = COMMON | {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}
CHAT |= {"tools", "chat_template_kwargs"}
TEXT = COMMON | {"prompt", "logprobs", "echo"}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}


@dataclass(frozen=True)
class CompletionRequest:
    """A request after checking."""

    chat: bool  # of /v1/chat/completions
    model: ServedModel
    prompts: list[list[int]]  # token ids; one of a chat
    sampling: SamplingConfig
    max_tokens: int  # of a completion; 0: generate nothing and score the prompt
    seed: int
    stop: tuple[str, ...]
    n: int  # completions of each prompt
    stream: bool
    include_usage: bool
    top_logprobs: int | None  # most likely tokens listed for each; None: no log-probs
    echo: bool = False  # the prompt is part of the text

    @property
    def choices(self) -> list[tuple[list[int], int]]:
        """Prompt and seed of each completion, in the order of the response's `index`."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        return [(prompt, (self.seed + i) % 2**32) for i, prompt in enumerate(prompts)]


def read_chat(
    body: Mapping[str, Any], models: Mapping[str, ServedModel], sampling: SamplingConfig
) -> CompletionRequest:
    """A request of /v1/chat/completions; ApiError names the field that is wrong. The first of `models` and
    `sampling` are the defaults."""
    check_fields(body, CHAT)
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = number(body, limit, sampling.max_new_tokens, low=1, integer=True)
    model, top = find_model(body.get("model"), models), None
    if flag(body, "logprobs"):
        top = number(body, "top_logprobs", 0, high=TOP_SCORES, integer=True)
    elif body.get("top_logprobs"):
        raise ApiError(400, "top_logprobs requires logprobs: true", "top_logprobs")
    fields = common_fields(body, sampling, max_tokens, top)
    tools, options = chat_tools(body, model), chat_options(body)
    messages = read_messages(body.get("messages"))
    prompts = [model.encode(messages, max_tokens, tools=tools, options=options)]
    return CompletionRequest(chat=True, model=model, prompts=prompts, **fields)


def read_text(
    body: Mapping[str, Any], models: Mapping[str, ServedModel], sampling: SamplingConfig
) -> CompletionRequest:
    """A request of /v1/completions, likewise."""
    check_fields(body, TEXT)
    max_tokens = number(body, "max_tokens", sampling.max_new_tokens, integer=True)
    model = find_model(body.get("model"), models)
    top, echo = number(body, "logprobs", None, high=TOP_SCORES, integer=True), flag(body, "echo")
    fields = common_fields(body, sampling, max_tokens, top)
    prompts = [model.encode_text(prompt, max_tokens) for prompt in read_prompts(body.get("prompt"))]
    return CompletionRequest(chat=False, model=model, prompts=prompts, echo=echo, **fields)


def check_fields(body: Mapping[str, Any], supported: set[str]) -> None:
    """ApiError, in OpenAI's words, for a field that asks for what this server cannot do."""
    for name, value in body.items():
        if value is None or name in supported | IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if name == "response_format" and isinstance(value, Mapping):
            kind = value.get("type")
            raise ApiError(
                400,
                f"Invalid parameter: 'response_format' of type {kind!r} is not supported with this model.",
                name,
                "unsupported_value",
            )
        raise ApiError(
            400,
            f"Unsupported parameter: {name!r} is not supported with this model.",
            name,
            "unsupported_parameter",
        )


def find_model(name: Any, models: Mapping[str, ServedModel]) -> ServedModel:
    """The model that a request names; the first of `models` where it names none."""
    name = next(iter(models)) if name is None else name
    if not isinstance(name, str) or name not in models:
        raise ApiError(
            404, f"model {name!r} does not exist; use one of {', '.join(models)}", "model", "model_not_found"
        )
    return models[name]


def common_fields(
    body: Mapping[str, Any], sampling: SamplingConfig, max_tokens: int, top_logprobs: int | None
) -> dict[str, Any]:
    """The fields of CompletionRequest that both kinds of requests read alike."""
    top_k = number(body, "top_k", sampling.top_k, low=-1, integer=True)
    try:
        sampling = replace(
            sampling,
            max_new_tokens=max(max_tokens, 1),
            temperature=number(body, "temperature", sampling.temperature, high=2),
            top_p=number(body, "top_p", sampling.top_p, high=1),
            top_k=None if top_k in (0, -1) else top_k,
            min_p=number(body, "min_p", sampling.min_p, high=1),
        )
    except ConfigError as error:
        message = str(error).removeprefix("sampling.")
        raise ApiError(400, message, message.partition("=")[0]) from None
    stream, options = flag(body, "stream"), body.get("stream_options")
    if stream and top_logprobs is not None:
        raise ApiError(400, "logprobs are not supported where stream is true", "logprobs")
    return {
        "top_logprobs": top_logprobs,
        "sampling": sampling,
        "max_tokens": max_tokens,
        "seed": number(body, "seed", secrets.randbits(32), high=2**32 - 1, integer=True),
        "stop": read_stop(body.get("stop")),
        "n": number(body, "n", 1, low=1, high=MAX_CHOICES, integer=True),
        "stream": stream,
        "include_usage": flag({} if options is None else options, "include_usage"),
    }


def read_prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a text request: a string, a list of strings, token ids, or a list of lists of them."""

    def is_prompt(prompt: Any) -> bool:
        ids = prompt if isinstance(prompt, list) and prompt else [None]
        return isinstance(prompt, str) or all(isinstance(i, int) and not isinstance(i, bool) for i in ids)

    prompts = [value] if is_prompt(value) else value
    if not isinstance(prompts, list) or not prompts or not all(map(is_prompt, prompts)):
        raise ApiError(
            400, "prompt must be a string, a list of strings, token ids, or a list of lists of them", "prompt"
        )
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"prompt has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
    return prompts


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


def chat_tools(body: Mapping[str, Any], model: ServedModel) -> list[Any] | None:
    """The functions that the model may call; ApiError where its chat template has no place for them."""
    try:
        tools = read_tools(body)
    except BadRow as error:
        raise ApiError(400, str(error), "tools") from None
    if tools is None or body.get("tool_choice") == "none":
        return None
    if not model.template.renders_tools:
        raise ApiError(
            400,
            "Unsupported parameter: 'tools' is not supported with this model: its chat template has no place "
            "for them.",
            "tools",
            "unsupported_parameter",
        )
    return tools


def chat_options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of the chat template's variables, such as {"enable_thinking": false}."""
    options = body.get("chat_template_kwargs")
    if not isinstance(options, Mapping | None):
        raise ApiError(400, "chat_template_kwargs must be an object", "chat_template_kwargs")
    return options or {}


def read_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
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
