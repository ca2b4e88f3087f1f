"""OpenAI's API over HTTP: completions, streaming, stop texts, checked fields, clients that disconnect."""

import asyncio
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from http_server import LONE_SURROGATE, PROMPTS, REQUEST, SAMPLING, fixed_text, serving
from starlette.requests import ClientDisconnect

from jaxllm.rollout.engine import Busy, Request
from jaxllm.rollout.generate import generate
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
from jaxllm.serve import openai_responses
from jaxllm.serve.openai_api import read_chat
from jaxllm.serve.served_model import CompletionStream, partial_stop


def test_a_completion_equals_that_of_generate_streamed_or_not(client, model, chat_model):
    loaded = load_checkpoint(str(chat_model))
    template = checkpoint_template(loaded)
    prompt, key = template.prompt(REQUEST["messages"]), jax.random.key(7)[None]
    expected = generate(
        loaded.model,
        loaded.params,
        [prompt],
        sampling=SAMPLING,
        stop_ids=template.stop_ids,
        keys=key,
        vocab_size=loaded.tokenizer.vocab_size,
    )
    text = loaded.tokenizer.decode(expected.tokens[0], from_start=False).lstrip()
    status, whole = client.chat()
    assert status == 200
    assert (whole["object"], whole["model"]) == ("chat.completion", "chat")
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == expected.stop_reasons[0]
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(expected.tokens[0])}
    assert whole["usage"] == {**counts, "total_tokens": sum(counts.values())}
    events = client.stream(stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1
    chunks = [event["choices"][0] for event in events[:-1]]
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == text
    reasons = [chunk["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [expected.stop_reasons[0]]


def test_fields_change_the_completion_as_documented(client):
    _, several = client.chat(n=3)
    texts = [choice["message"]["content"] for choice in several["choices"]]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert texts[1] == client.chat_text(seed=8) != texts[0]
    assert len({client.chat_text(temperature=0, seed=seed) for seed in (1, 2)}) == 1
    assert client.chat(max_tokens=2)[1]["usage"]["completion_tokens"] == 2
    assert client.chat(max_completion_tokens=3, max_tokens=2)[1]["usage"]["completion_tokens"] == 3
    stop = texts[0][3:5]
    cut = client.chat(stop=[stop, "not generated"])[1]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (texts[0][: texts[0].index(stop)], "stop")
    parts = [{"type": "text", "text": "one and"}, {"type": "text", "text": " two?"}]
    assert client.chat_text(messages=[{"role": "user", "content": parts}]) == texts[0]


def test_a_stop_text_that_arrives_in_chunks_is_never_sent(model, tmp_path):
    with serving([fixed_text(model, "Yes, one two three.")], tmp_path / "a.jsonl") as client:
        deltas = [event["choices"][0]["delta"] for event in client.stream(stop=["e two t", "seven"])]
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes, on"
        assert len(deltas) > 4, "one chunk would test nothing"


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("ab\n", ("\n\nc",), 1), ("ab", ("\n",), 0), ("aa", ("aab", "ax"), 2)]
)
def test_the_longest_beginning_of_a_stop_text_at_the_end_is_found(text, stop, length):
    assert partial_stop(text, stop) == length


def test_models_are_listed_by_name_with_their_paths(client, chat_model):
    status, text, _ = client.send("GET", "/v1/models")
    assert status == 200
    (model,) = json.loads(text)["data"]
    assert (model["id"], model["object"]) == ("chat", "model")
    assert model["path"] == str(chat_model / "checkpoints" / "30")
    assert client.chat(model="chat")[0] == 200
    assert client.chat(model=str(chat_model))[0] == 404
    status, text, _ = client.send("GET", "/v1/models/chat")
    assert (status, json.loads(text)) == (200, model)


def test_one_model_is_described_by_its_name_with_slashes_or_not(model, tmp_path):
    best = fixed_text(model, "Yes.")._replace(name="chat/best")
    with serving([best], tmp_path / "a.jsonl") as client:
        for path in ("/v1/models/chat/best", "/v1/models/chat%2Fbest"):
            assert json.loads(client.send("GET", path)[1])["id"] == "chat/best"
        status, text, _ = client.send("GET", "/v1/models/chat")
    assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"messages": None}, 400, "messages"),
        ({"messages": "Hello"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "one " * 99}]}, 400, "messages"),
        ({"model": "another"}, 404, "model"),
        ({"model": ["a"]}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**32}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": 3}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"stop": False}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": "x" * 257}, 400, "stop"),
        ({"n": 99}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"model": ""}, 404, "model"),
        ({"model": 0}, 404, "model"),
        ({"top_k": -2}, 400, "top_k"),
        # 0 and false are not neutral where 1 and true are.
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"length_penalty": 0.0}, 400, "length_penalty"),
        ({"skip_special_tokens": False}, 400, "skip_special_tokens"),
        ({"unknown": False}, 400, "unknown"),
        ({"unknown": 0}, 400, "unknown"),
        ({"stream_options": 0}, 400, "include_usage"),
        ({"stream_options": []}, 400, "include_usage"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "stream": True}, 400, "logprobs"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": 3}, 400, "include_usage"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({LONE_SURROGATE: 1}, 400, LONE_SURROGATE),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ],
)
def test_a_bad_field_is_named(client, change, status, field):
    code, body = client.chat(**change)
    assert (code, body["error"]["param"]) == (status, field)
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ann", "frequency_penalty": 0, "tools": [], "logprobs": False, "top_p": None},
        {"response_format": {"type": "text"}, "tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"parallel_tool_calls": False, "repetition_penalty": 1.0, "presence_penalty": 0.0, "logit_bias": {}},
        {"top_k": 0},
        {"top_k": -1, "min_p": 0, "top_p": 1},
        # Clients send every field that they know, most of them null.
        {"temperature": None, "stop": None, "n": None, "stream": None, "stream_options": None, "seed": 7},
        {"model": None, "max_tokens": None, "response_format": None, "tools": None, "unknown": None},
        {"logprobs": None, "top_logprobs": None, "top_k": None, "min_p": None},
    ],
)
def test_fields_without_an_effect_are_allowed(client, fields):
    plain = client.chat_text(seed=7)
    assert client.chat_text(**fields) == plain


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_mode_is_declined_in_openais_words(client, kind):
    _, body = client.chat(response_format={"type": kind})
    assert body["error"] == {
        "message": f"Invalid parameter: 'response_format' of type '{kind}' is not supported with this model.",
        "type": "invalid_request_error",
        "param": "response_format",
        "code": "unsupported_value",
    }
    _, body = client.chat(tools=[{"type": "function"}])
    assert body["error"]["message"].startswith(
        "Unsupported parameter: 'tools' is not supported with this model: its chat template has no place"
    )
    assert body["error"]["code"] == "unsupported_parameter"


# Stop texts, several completions


@pytest.mark.parametrize(
    ("text", "stop", "shown", "counted"),
    [
        ("one, two, three, four", ["two"], "one, ", "one, two"),
        ("one, two, three, four", [", t"], "one", "one, t"),
        # Of two stop texts, the one that is complete first, however many tokens arrive together.
        ("one, two, three", ["one, two, three", "two"], "one, ", "one, two"),
        ("one, two", ["seven"], "one, two", "one, two"),
    ],
)
def test_tokens_after_a_stop_text_are_neither_sent_nor_counted(model, text, stop, shown, counted):
    tokens = model.tokenizer.encode(text)
    assert len(tokens) > 2

    async def read(pieces):
        queue = asyncio.Queue()
        for piece in pieces[:-1]:
            queue.put_nowait((piece, None))
        queue.put_nowait((pieces[-1], "length"))
        request = Request([1], 1, 2, None, sampling=SAMPLING, on_tokens=print, delivered=1)
        chunks = [chunk async for chunk in CompletionStream(queue, request, model.tokenizer, stop, True)]
        assert request.canceled
        return "".join(chunk.text for chunk in chunks), [i for chunk in chunks for i in chunk.tokens]

    for pieces in ([tokens], [[token] for token in tokens]):
        content, counted_tokens = asyncio.run(read(pieces))
        assert content == shown
        decoded = model.tokenizer.decode(counted_tokens)
        assert decoded.startswith(counted)
        assert not model.tokenizer.decode(counted_tokens[:-1]).startswith(counted)


def test_several_completions_are_streamed_together(client):
    _, whole = client.chat(n=3)
    events = client.stream(n=3, stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"]
    chunks = [event["choices"][0] for event in events[:-1]]
    for choice in whole["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(chunk["delta"].get("content", "") for chunk in mine)
        assert text == choice["message"]["content"]
        reasons = [chunk["finish_reason"] for chunk in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]


class SlowTemplate:
    """Renders only once `resume` is set."""

    stop_ids = ()

    def __init__(self):
        self.paused, self.resume = threading.Event(), threading.Event()

    def prompt(self, messages, **_):
        self.paused.set()
        self.resume.wait(60)
        return [1] * len(messages)


def test_a_slow_template_does_not_block_other_requests(model, tmp_path):
    slow = fixed_text(model, "Yes.")._replace(template=SlowTemplate())
    with serving([slow], tmp_path / "a.jsonl") as client, ThreadPoolExecutor(2) as pool:
        response = pool.submit(client.chat)
        assert slow.template.paused.wait(20)
        try:
            assert pool.submit(client.send, "GET", "/v1/models").result(timeout=20)[0] == 200
        finally:
            slow.template.resume.set()
        assert response.result()[0] == 200


def test_more_messages_than_the_context_has_tokens_are_not_rendered(model, tmp_path):
    slow = model._replace(template=SlowTemplate())
    with serving([slow], tmp_path / "a.jsonl") as client:
        status, body = client.chat(messages=PROMPTS[0] * model.max_length)
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert not slow.template.paused.is_set()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a": \xff}', b"[" * 100_000, b"9" * 9999])
def test_a_body_that_is_not_a_json_object_is_an_error(client, body):
    status, text, _ = client.send("POST", "/v1/chat/completions", body)
    assert (status, "JSON" in text) == (400, True)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_row(model, tmp_path, stream):
    slow = fixed_text(model, "Yes, one two three four five six.")
    slow.engine.resume.clear()
    with serving([slow], tmp_path / "a.jsonl") as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({**REQUEST, "stream": stream}))
        assert slow.engine.paused.wait(20)
        assert not slow.engine.cancelled.is_set()
        connection.close()
        assert slow.engine.cancelled.wait(20)
        slow.engine.resume.set()


def test_a_stream_that_ends_before_its_first_event_frees_its_rows(model):
    slow = fixed_text(model, "Yes, one two three four five six.")
    slow.engine.resume.clear()

    async def disconnected(*_):
        raise OSError("the client has gone")

    async def respond():
        request = read_chat({**REQUEST, "n": 2}, {"chat": slow}, SAMPLING)
        response = openai_responses.EventStream(request)
        with pytest.raises(ClientDisconnect):
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, disconnected, disconnected)

    asyncio.run(respond())
    assert slow.engine.cancelled.is_set()
    slow.engine.resume.set()


class OneRequestEngine:
    """An engine that accepts one request and never generates anything for it."""

    def __init__(self):
        self.full, self.cancelled = False, threading.Event()

    def submit(self, prompt, *, sampling, seed, on_tokens):
        if self.full:
            raise Busy("try again in a moment")
        self.full = True
        return self

    def cancel(self):
        self.cancelled.set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**REQUEST, "n": 2}),
        ("/v1/chat/completions", {**REQUEST, "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": ["one", "two"]}),
        ("/api/next", {"rater": "ann", "prompt": "Well?"}),
    ],
)
def test_where_one_of_several_completions_fails_the_others_are_cancelled(model, tmp_path, path, body):
    engine = OneRequestEngine()
    with serving([model._replace(engine=engine)], tmp_path / "a.jsonl") as client:
        assert client.post(path, body)[0] == 503
        assert engine.cancelled.wait(20)
