"""A server in a thread, with a client for it and engines whose output a test controls."""

import http.client
import json
import threading
from contextlib import contextmanager

from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve.app import build_app
from jaxllm.serve.comparison_queue import ComparisonQueue
from jaxllm.serve.preferences import PreferenceFile
from jaxllm.serve.server import LOCAL_HOSTS, bind, make_server

SAMPLING = SamplingConfig(temperature=1.0, top_k=None, top_p=None, min_p=None, max_new_tokens=12)
PROMPTS = [[{"role": "user", "content": f"{n} and {m}?"}] for n in ("one", "six") for m in ("two", "ten")]
REQUEST = {"messages": PROMPTS[0], "seed": 7}
LONE_SURROGATE = "\ud83d"  # valid in JSON as an escape, but not in UTF-8


class Client:
    """Sends requests to a server on this machine."""

    def __init__(self, port, path):
        self.port, self.path = port, path  # of the file of choices

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
        return self.post("/v1/chat/completions", {**REQUEST, **body})

    def chat_text(self, **body):
        return self.chat(**body)[1]["choices"][0]["message"]["content"]

    def stream(self, path="/v1/chat/completions", request=REQUEST, **body):
        _, text, headers = self.send("POST", path, {**request, **body, "stream": True})
        assert headers["content-type"].startswith("text/event-stream")
        events = text.removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @property
    def rows(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@contextmanager
def serving(models, path, *, prompts=(), raters_per_pair=1, token=None, sampling=SAMPLING):
    """A client of a server in a thread; choices go to `path`."""
    file = PreferenceFile(path)
    app = build_app(
        {model.name: model for model in models},
        ComparisonQueue(file, prompts, raters_per_pair),
        sampling,
        seed=0,
        allowed_hosts=[*LOCAL_HOSTS, "DESKTOP-A"],
        token=token,
    )
    bound, server = bind("127.0.0.1", 0), make_server(app)
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


class FixedTextEngine:
    """Generates a fixed text and the seed; pauses after 4 tokens while `resume` is clear."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text = tokenizer, text
        self.paused, self.resume, self.cancelled = (threading.Event() for _ in range(3))
        self.resume.set()
        self.prompts = []

    def submit(self, prompt, *, sampling, seed, on_tokens):
        self.prompts.append(prompt)
        tokens = self.tokenizer.encode(f"{self.text} {seed}")

        def work():
            for i, token in enumerate(tokens):
                if i == 4:
                    self.paused.set()
                    self.resume.wait(60)
                on_tokens([token], "stop" if i == len(tokens) - 1 else None)

        threading.Thread(target=work).start()
        return self

    def cancel(self):
        self.cancelled.set()


def fixed_text(model, text):
    """The model with a FixedTextEngine."""
    return model._replace(engine=FixedTextEngine(model.tokenizer, text))
