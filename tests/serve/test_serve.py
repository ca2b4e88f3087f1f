"""experiments/serve.py over HTTP: OpenAI's API, comparisons, who is let in, and what bad input is told."""

import http.client
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from experiments import serve
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
from jaxllm.serve.app import MAX_BODY, build_app
from jaxllm.serve.board import ComparisonQueue
from jaxllm.serve.preferences import PreferenceFile
from jaxllm.serve.speaker import held_back
from jaxllm.rollout.engine import Busy
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.training.checkpoint import find_checkpoint

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingConfig(temperature=1.0, top_k=None, top_p=None, min_p=None, max_new_tokens=12)
QUESTIONS = [[{"role": "user", "content": f"{n} and {m}?"}] for n in ("one", "six") for m in ("two", "ten")]
ASK = {"messages": QUESTIONS[0], "seed": 7}
HALF = "\ud83d"  # of a surrogate pair: JSON can say it, UTF-8 cannot


class Client:
    """Sends requests to a server on this machine."""

    def __init__(self, port, path):
        self.port, self.path = port, path  # of the choices

    def send(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, {name.replace("_", "-"): x for name, x in headers.items()})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text, response.headers

    def post(self, path, body, **headers):
        status, text, _ = self.send("POST", path, body, **headers)
        return status, json.loads(text)

    def chat(self, **body):
        return self.post("/v1/chat/completions", {**ASK, **body})

    def stream(self, **body):
        _, text, headers = self.send("POST", "/v1/chat/completions", {**ASK, **body, "stream": True})
        assert headers["content-type"].startswith("text/event-stream")
        events = text.removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @property
    def rows(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class Parrot:
    """An engine that says the same to everybody, and its seed, a token at a time, while it is let."""

    def __init__(self, speaker, text):
        self.speaker, self.text = speaker, text
        self.begun, self.go_on, self.cancelled = (threading.Event() for _ in range(3))
        self.go_on.set()
        self.asked = []

    def submit(self, prompt, *, sampling, seed, say):
        self.asked.append(prompt)
        tokens = self.speaker.tokenizer.encode(f"{self.text} {seed}")

        def work():
            for i, token in enumerate(tokens):
                if i == 4:
                    self.begun.set()
                    self.go_on.wait(60)
                say([token], "stop" if i == len(tokens) - 1 else None)

        threading.Thread(target=work).start()
        return self

    def cancel(self):
        self.cancelled.set()


def parrot(speaker, text):
    return speaker._replace(engine=Parrot(speaker, text))


@contextmanager
def serving(speakers, path, *, prompts=(), raters_per_pair=1, token=None, sampling=SAMPLING):
    """A server in a thread."""
    file = PreferenceFile(path)
    board = ComparisonQueue(file, prompts, raters_per_pair)
    app = build_app(
        {speaker.name: speaker for speaker in speakers},
        board,
        sampling,
        seed=0,
        names=[*serve.LOCAL, "DESKTOP-A"],
        token=token,
    )
    bound, server = serve.bind("127.0.0.1", 0), serve.make_server(app)
    bound.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield Client(bound.getsockname()[1], path)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
        file.close()


@pytest.fixture(scope="session")
def speaker(chat_model):
    made = serve.load_speaker(str(chat_model), find_checkpoint(chat_model), 8)
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def client(speaker, tmp_path_factory):
    with serving([speaker], tmp_path_factory.mktemp("served") / "preferences.jsonl") as client:
        yield client


# OpenAI's API


def test_an_answer_is_what_generate_says_streamed_or_not(client, speaker, chat_model):
    loaded = load_checkpoint(str(chat_model))
    template = checkpoint_template(loaded)
    prompt, key = template.prompt(ASK["messages"]), jax.random.key(7)[None]
    said = generate(
        loaded.model, loaded.params, [prompt], sampling=SAMPLING, stop_ids=template.stop_ids, keys=key
    )
    text = loaded.tokenizer.decode(said.tokens[0], from_start=False).lstrip()
    status, whole = client.chat()
    assert status == 200
    assert (whole["object"], whole["model"]) == ("chat.completion", str(chat_model))
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == said.stop_reasons[0]
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(said.tokens[0])}
    assert whole["usage"] == {**counts, "total_tokens": sum(counts.values())}
    events = client.stream(stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1
    pieces = [event["choices"][0] for event in events[:-1]]
    assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == text
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [said.stop_reasons[0]]


def test_fields_change_the_answer_as_they_say(client):
    _, several = client.chat(n=3)
    texts = [choice["message"]["content"] for choice in several["choices"]]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert texts[1] == client.chat(seed=8)[1]["choices"][0]["message"]["content"] != texts[0]
    greedy = {client.chat(temperature=0, seed=seed)[1]["choices"][0]["message"]["content"] for seed in (1, 2)}
    assert len(greedy) == 1
    assert client.chat(max_tokens=2)[1]["usage"]["completion_tokens"] == 2
    assert client.chat(max_completion_tokens=3, max_tokens=2)[1]["usage"]["completion_tokens"] == 3
    stop = texts[0][3:5]
    cut = client.chat(stop=[stop, "never said"])[1]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (texts[0][: texts[0].index(stop)], "stop")
    parts = [{"type": "text", "text": "one and"}, {"type": "text", "text": " two?"}]
    assert (
        client.chat(messages=[{"role": "user", "content": parts}])[1]["choices"][0]["message"]["content"]
        == texts[0]
    )


def test_a_stop_text_said_in_pieces_is_never_shown(speaker, tmp_path):
    with serving([parrot(speaker, "Yes, one two three.")], tmp_path / "a.jsonl") as client:
        deltas = [event["choices"][0]["delta"] for event in client.stream(stop=["e two t", "seven"])]
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes, on"
        assert len(deltas) > 4, "in one piece it would show nothing"


@pytest.mark.parametrize(
    ("text", "stop", "held"), [("ab\n", ("\n\nc",), 1), ("ab", ("\n",), 0), ("aa", ("aab", "ax"), 2)]
)
def test_what_may_begin_a_stop_text_is_not_said_yet(text, stop, held):
    assert held_back(text, stop) == held


def test_models_are_listed(client, chat_model):
    status, text, _ = client.send("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(text)["data"]] == [str(chat_model)]


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
        ({"stop": list("abcde")}, 400, "stop"),
        ({"stop": "x" * 257}, 400, "stop"),
        ({"n": 99}, 400, "n"),
        ({"n": 2, "stream": True}, 400, "n"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": 3}, 400, "include_usage"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({HALF: 1}, 400, HALF),
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
        {"tool_choice": "auto"},
    ],
)
def test_fields_that_ask_for_nothing_are_no_error(client, fields):
    assert client.chat(**fields)[0] == 200


class SlowTemplate:
    """Takes its time to render, until it is let."""

    stop_ids = ()

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def prompt(self, messages):
        self.begun.set()
        self.go_on.wait(60)
        return [1] * len(messages)


def test_a_slow_template_holds_up_nobody_else(speaker, tmp_path):
    slow = parrot(speaker, "Yes.")._replace(template=SlowTemplate())
    with serving([slow], tmp_path / "a.jsonl") as client, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(client.chat)
        assert slow.template.begun.wait(20)
        try:
            assert pool.submit(client.send, "GET", "/v1/models").result(timeout=20)[0] == 200
        finally:
            slow.template.go_on.set()
        assert asked.result()[0] == 200


def test_more_messages_than_the_model_reads_tokens_are_not_rendered(speaker, tmp_path):
    slow = speaker._replace(template=SlowTemplate())
    with serving([slow], tmp_path / "a.jsonl") as client:
        status, body = client.chat(messages=QUESTIONS[0] * speaker.max_length)
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert not slow.template.begun.is_set()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a": \xff}', b"[" * 100_000, b"9" * 9999])
def test_a_body_that_is_no_object_is_refused(client, body):
    status, text, _ = client.send("POST", "/v1/chat/completions", body)
    assert (status, "JSON" in text) == (400, True)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_row(speaker, tmp_path, stream):
    slow = parrot(speaker, "Yes, one two three four five six.")
    slow.engine.go_on.clear()
    with serving([slow], tmp_path / "a.jsonl") as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({**ASK, "stream": stream}))
        assert slow.engine.begun.wait(20)
        assert not slow.engine.cancelled.is_set()
        connection.close()
        assert slow.engine.cancelled.wait(20)
        slow.engine.go_on.set()


class Narrow:
    """An engine with room for one request, to which it says nothing."""

    def __init__(self):
        self.taken, self.cancelled = False, threading.Event()

    def submit(self, prompt, *, sampling, seed, say):
        if self.taken:
            raise Busy("try again in a moment")
        self.taken = True
        return self

    def cancel(self):
        self.cancelled.set()


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", {**ASK, "n": 2}), ("/api/next", {"rater": "ann", "prompt": "Well?"})],
)
def test_where_one_answer_is_refused_the_others_are_not_written(speaker, tmp_path, path, body):
    engine = Narrow()
    with serving([speaker._replace(engine=engine)], tmp_path / "a.jsonl") as client:
        assert client.post(path, body)[0] == 503
        assert engine.cancelled.wait(20)


# Comparisons


def judge(client, rater, choice):
    """Ask for the next comparison and choose; None when there is none."""
    _, body = client.post("/api/next", {"rater": rater})
    if body["offer"] is None:
        return None
    assert client.post("/api/choice", {"rater": rater, "id": body["offer"]["id"], "choice": choice})[0] == 200
    return body["offer"]


def test_two_checkpoints_are_compared_blindly_and_the_row_says_which_was_which(speaker, tmp_path):
    other = speaker._replace(name="other", checkpoint={"path": "elsewhere", "hash": "0"})
    with serving([speaker, other], tmp_path / "rows.jsonl", prompts=QUESTIONS) as client:
        offers = [judge(client, "ann", i % 2) for i in range(4)]
        assert judge(client, "ann", 0) is None
        state = json.loads(client.send("GET", "/api/state?rater=ann")[1])
    assert set(offers[0]) == {"id", "prompt", "answers"}
    assert state["progress"]["done"] == state["progress"]["of"] == 4
    assert [row["prompt"] for row in client.rows] == [offer["prompt"] for offer in offers]
    for row in client.rows:
        assert {made["path"] for made in row["checkpoints"]} == {speaker.checkpoint["path"], "elsewhere"}
        for text, seed in zip(row["answers"], row["seeds"], strict=True):
            key = jax.random.key(seed)[None]
            prompt = speaker.template.prompt(row["prompt"])
            said = generate(
                speaker.engine.model,
                speaker.engine._params,
                [prompt],
                sampling=SamplingConfig(**row["sampling"]),
                stop_ids=speaker.template.stop_ids,
                keys=key,
            )
            assert speaker.tokenizer.decode(said.tokens[0], from_start=False).strip() == text


def test_a_prompt_of_ones_own_is_compared_first(speaker, tmp_path):
    with serving([speaker], tmp_path / "rows.jsonl", prompts=QUESTIONS) as client:
        client.post("/api/next", {"rater": "ann"})
        _, body = client.post("/api/next", {"rater": "ann", "prompt": " five and ten? "})
        assert body["offer"]["prompt"] == [{"role": "user", "content": "five and ten?"}]
        assert judge(client, "ann", "bad") == body["offer"]


def test_half_a_character_in_a_prompt_is_no_bug(speaker, tmp_path):
    half, own = (f"{text} {HALF}" for text in ("one", "six"))
    prompts = [[{"role": "user", "content": half}]]
    with serving([speaker], tmp_path / "rows.jsonl", prompts=prompts) as client:
        assert judge(client, "ann", 0)["prompt"][0]["content"] == half
        _, body = client.post("/api/next", {"rater": "ann", "prompt": own})
        assert body["offer"]["prompt"][0]["content"] == own
        assert judge(client, "ann", 1) == body["offer"]
        assert client.chat(messages=prompts[0])[0] == 200


def test_answers_that_cannot_differ_are_not_compared(speaker, tmp_path):
    greedy = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=12)
    long = [{"role": "user", "content": "one " * 99}]
    with serving([speaker], tmp_path / "a.jsonl", prompts=[*QUESTIONS, long], sampling=greedy) as client:
        assert judge(client, "ann", 0) is None
        status, body = client.post("/api/next", {"rater": "ann", "prompt": "Hello"})
        assert (status, body["error"]["param"]) == (422, "prompt")


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/api/next", {}, 400, "rater"),
        ("/api/next", {"rater": "a" * 41}, 400, "rater"),
        ("/api/next", {"rater": "a\nb"}, 400, "rater"),
        ("/api/next", {"rater": "ann", "prompt": " "}, 400, "prompt"),
        ("/api/next", {"rater": "ann", "prompt": "one " * 99}, 400, "messages"),
        ("/api/choice", {"rater": "ann", "id": "x", "choice": 2}, 400, "choice"),
        ("/api/choice", {"rater": "ann", "id": "x", "choice": True}, 400, "choice"),
        ("/api/choice", {"rater": "ann", "id": "x", "choice": []}, 400, "choice"),
        ("/api/choice", {"rater": "ann", "id": 3, "choice": 1}, 400, "id"),
        ("/api/choice", {"rater": "ann", "id": "x", "choice": 1}, 409, "id"),
        ("/api/undo", {"rater": "nobody yet"}, 409, "rater"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(client, path, body, status, field):
    code, answer = client.post(path, body)
    assert (code, answer["error"]["param"]) == (status, field)


def test_twenty_clients_at_once_lose_nothing(speaker, tmp_path):
    prompts = [[{"role": "user", "content": f"{i} and {i}?"}] for i in range(30)]
    with serving([speaker], tmp_path / "rows.jsonl", prompts=prompts, raters_per_pair=2) as client:

        def rate(i):
            judged = []
            while offer := judge(client, f"rater {i}", i % 2):
                judged.append((f"rater {i}", offer["id"], offer["answers"], i % 2))
            return judged

        def chat(i):
            return [client.chat(seed=100 * i + j)[1]["choices"][0]["message"]["content"] for j in range(9)]

        with ThreadPoolExecutor(20) as pool:
            said = [pool.submit(chat, i) for i in range(10)]
            rated = [pool.submit(rate, i) for i in range(10)]
            judged = [each for future in rated for each in future.result()]
            chats = {i: future.result() for i, future in enumerate(said)}
        assert chats[3][2] == client.chat(seed=302)[1]["choices"][0]["message"]["content"]
        rows = [(row["rater"], row["id"], row["answers"], row["choice"]) for row in client.rows]
        assert sorted(rows) == sorted(judged)
        assert len(rows) == 2 * len({row["comparison"] for row in client.rows})
        assert len(rows) > 40


# Who is let in


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "desktop-a:8000"}, 200),
        ({"Host": "Desktop-A:8000", "Origin": "http://desktop-a:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://["}, 403),
    ],
)
def test_foreign_hosts_and_origins_are_refused(client, headers, status):
    for method, path in (("GET", "/"), ("GET", "/v1/models")):
        assert client.send(method, path, **headers)[0] == status


def test_a_large_body_is_refused_also_where_its_length_is_not_said(client):
    body = b'{"a": "' + b"x" * MAX_BODY + b'"}'
    assert client.send("POST", "/v1/chat/completions", body)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    parts = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    connection.request("POST", "/api/next", parts, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_every_answer_has_the_headers_that_keep_scripts_out(client):
    for path, status in (
        ("/", 200),
        ("/page.js", 200),
        ("/v1/models", 200),
        ("/../serve.py", 404),
        ("/x", 404),
    ):
        code, _, headers = client.send("GET", path)
        assert code == status
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    assert client.send("GET", "/x", Host="evil.example")[2]["content-security-policy"]


def test_the_page_fetches_nothing_from_elsewhere_and_writes_no_html():
    page = {file.name: file.read_text() for file in (ROOT / "experiments" / "page").iterdir()}
    assert set(page) == {"index.html", "page.js", "page.css"}
    assert not re.search(r"https?://|\son\w+=|style=|<script>|<style", page["index.html"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page["page.js"])


def test_without_the_token_there_is_only_the_page(speaker, tmp_path):
    token = "correct horse battery"
    with serving([speaker], tmp_path / "a.jsonl", token=token) as client:
        assert client.send("GET", "/")[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": token},
            {"Cookie": "jaxllm=x"},
        ):
            assert client.send("GET", "/v1/models", **headers)[0] == 401
            assert client.post("/v1/chat/completions", ASK, **headers)[0] == 401
            assert client.post("/api/next", {"rater": "ann"}, **headers)[0] == 401
        assert client.send("GET", "/v1/models", Authorization=f"Bearer {token}")[0] == 200
        for wrong in ("wröng", HALF):
            assert client.post("/api/login", {"token": wrong})[0] == 401
        status, _, headers = client.send("POST", "/api/login", {"token": token})
        cookie, *attributes = headers["set-cookie"].split("; ")
        assert status == 200
        assert {"HttpOnly", "SameSite=strict"} <= set(attributes)
        assert token not in cookie
        for others in ("", "a=b; ", 'theme={"dark": 1}; ', "x=1, 2; ", "flag; ", "user=J\xf6rg; "):
            assert client.send("GET", "/v1/models", Cookie=others + cookie)[0] == 200
