"""What the models of a synthesis are asked, and what is read from their replies."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import pytest
from chat_templates import CHATML, OPENS_THOUGHT, hf_tokenizer

from jaxllm.config import load_config, parse
from jaxllm.data.chat_template import load_template
from jaxllm.errors import ConfigError, RunError
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.synthesize import server
from jaxllm.synthesize.config import SynthesizeConfig
from jaxllm.synthesize.instructions import Instructor
from jaxllm.synthesize.judge import RubricJudge, extremes, read_score, read_verdict
from jaxllm.synthesize.server import ServerWriter
from jaxllm.synthesize.writers import Written, user_turn

FILE = Path(__file__).parents[2] / "configs" / "synthesize.py"
CONFIG = parse(SynthesizeConfig, load_config(str(FILE)))
SAMPLING = SamplingConfig(temperature=0.5, top_k=None, top_p=0.9, min_p=None, max_new_tokens=7)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7.0),
        ("It is 3 of 9.\n**Score:** 8.5/10", 8.5),
        ("Score: 2, no, Score: 4", 4.0),
        ("score - 11", None),
        ("Score: 0", None),
        ("Good!", None),
    ],
)
def test_a_score_is_read_from_a_reply(reply, score):
    assert read_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "verdict"), [("Better: A", 3), ("better: **B**", 5), ("Better: Apples", None), ("A", None)]
)
def test_a_verdict_names_the_answer_that_was_shown_there(reply, verdict):
    assert read_verdict(reply, (3, 5)) == verdict


def test_the_extremes_are_the_first_of_equal_scores():
    assert extremes([2.0, None, 5.0, 1.0, 5.0, 1.0]) == (2, 3)
    assert extremes([2.0, None, 2.0]) is None
    assert extremes([None]) is None


class Replies:
    """A writer in place of a model: what a function makes of each prompt."""

    def __init__(self, reply):
        self.reply, self.prompts, self.identity = reply, [], {"model": "replies"}

    def problem(self, messages, max_new_tokens):
        return "too long for the model" if "far too long" in messages[0]["content"] else None

    def complete(self, conversations, *, group_size, sampling, keys, check):
        assert len(keys) == len(conversations)
        self.prompts += [messages[0]["content"] for messages in conversations]
        return [Written(self.reply(messages[0]["content"]), True) for messages in conversations]


def judge(reply, *answers):
    writer = Replies(reply)
    keys = jax.random.split(jax.random.key(0), 1)
    (judged,) = RubricJudge(CONFIG.judge, writer)(["Why?"], [list(answers)], keys, lambda: None)
    return judged, writer.prompts


def test_a_judge_scores_each_answer_and_compares_the_extremes_in_both_orders():
    def reply(prompt):
        if "Answer A:" not in prompt:
            return f"Score: {2 + prompt.count('fine')}"
        return "Better: A" if prompt.index("fine") < prompt.index("Answer B") else "Better: B"

    judged, prompts = judge(reply, "bad", "fine", "fine fine", "far too long")
    assert judged.scores == [2.0, 3.0, 4.0, None]
    assert judged.compared == [2, 0]
    assert judged.verdicts == [2, 2]
    assert [each.index("fine fine") < each.index("bad") for each in prompts[3:]] == [True, False]
    assert all("You grade answers" in each and "Why?" in each for each in prompts)


def test_a_judge_that_prefers_a_place_contradicts_itself():
    def reply(prompt):
        return "Better: A" if "Answer A:" in prompt else f"Score: {prompt.count('fine') + 1}"

    judged, _ = judge(reply, "bad", "fine")
    assert (judged.compared, judged.verdicts) == ([1, 0], [1, 0])


def test_answers_of_equal_score_are_not_compared():
    judged, prompts = judge(lambda prompt: "Score: 5", "one", "two")
    assert (judged.scores, judged.compared, judged.verdicts, len(prompts)) == ([5.0, 5.0], None, None, 2)


# A server


@contextmanager
def serving(answer, models=("small",)):
    """The URL of a server that responds to a request body with `answer(body)`: a status and JSON."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self, status, value):
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.respond(200, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.respond(*answer(body | {"key": self.headers["Authorization"]}))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}/v1"
        finally:
            found.shutdown()
            thread.join()


def complete(writer, *texts, group_size=1):
    conversations = [[{"role": "user", "content": text}] for text in texts]
    keys = jax.random.split(jax.random.key(0), len(texts) * group_size)
    return writer.complete(
        conversations, group_size=group_size, sampling=SAMPLING, keys=keys, check=lambda: None
    )


def reply(text, reason="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def test_a_server_completes_each_conversation_with_seeds_of_its_own(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    bodies = []

    def answer(body):
        bodies.append(body)
        text = body["messages"][0]["content"]
        return reply(f" {text}! ", "length" if text == "b" else "stop")

    with serving(answer) as url:
        writer = ServerWriter(url, "answers.model", requests=2)
        first, again = (complete(writer, "a", "b", group_size=2) for _ in range(2))
    assert first == again == [Written("a!", True)] * 2 + [Written("b!", False)] * 2
    assert writer.identity == {"model": f"{url}#small"}
    assert len({body["seed"] for body in bodies}) == 4
    one = {name: bodies[0][name] for name in ("model", "temperature", "top_p", "max_tokens", "key")}
    assert one == {"model": "small", "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "key": "Bearer a key"}
    assert "top_k" not in bodies[0]


def test_a_request_that_an_overloaded_server_refuses_is_sent_again(monkeypatch):
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    statuses = iter([503, 429])

    def answer(body):
        status = next(statuses, None)
        return (status, {"error": "busy"}) if status else reply("yes")

    with serving(answer) as url:
        assert complete(ServerWriter(url, "answers.model", requests=1), "a") == [Written("yes", True)]


def test_a_request_that_is_wrong_is_an_error_with_the_servers_words():
    with serving(lambda body: (400, {"error": "too long"})) as url:
        writer = ServerWriter(url, "answers.model", requests=1)
        with pytest.raises(RunError, match=r"HTTP 400: .*too long"):
            complete(writer, "a")


def test_a_server_or_a_model_that_is_not_there_is_an_error_that_names_the_field():
    with serving(reply, models=("small", "large")) as url:
        with pytest.raises(
            ConfigError, match=r"answers.model=.*: choose a model as .*/v1#NAME, of small, large"
        ):
            ServerWriter(url, "answers.model", requests=1)
        assert ServerWriter(f"{url}#large", "answers.model", requests=1).name == "large"
    with pytest.raises(ConfigError, match=r"judge.model=http://127.0.0.1:\d+/v1: .*refused.* OpenAI's API"):
        ServerWriter(url, "judge.model", requests=1)


# What a chat template writes around a user's turn


@pytest.mark.parametrize("template", [CHATML, OPENS_THOUGHT])
def test_a_jinja_template_tells_how_a_users_turn_begins_and_ends(template):
    tokenizer = hf_tokenizer(template)
    prefix, end = user_turn(load_template(tokenizer, None), tokenizer, "answers.model=x")
    assert tokenizer.special_ids["<|im_end|>"] == end
    assert prefix[-len(tokenizer.encode_markup("<|im_start|>user\n")) :] == tokenizer.encode_markup(
        "<|im_start|>user\n"
    )


def test_a_template_without_a_special_token_after_the_user_is_an_error():
    turns = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    )
    tokenizer = hf_tokenizer(turns + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    template = load_template(tokenizer, None)
    with pytest.raises(
        ConfigError, match=r"answers.model=x: its chat template ends a user's turn with no sp"
    ):
        user_turn(template, tokenizer, "answers.model=x")


# Instructions by a model that follows them


def instructor(source, reply, seeds=("seed one", "seed two", "seed three")):
    writer = Replies(reply)
    config = replace(CONFIG.instructions, source=source, seeds=("x",), examples=2, length=(3, 40))
    return Instructor(config, writer, seeds, seed=0), writer


def test_grown_instructions_are_made_of_seeds_and_of_earlier_ones():
    keys = jax.random.split(jax.random.key(0), 3)
    grow, writer = instructor("self_instruct", lambda prompt: "Task: Name a town.\nTask: More")
    assert [each.text for each in grow(range(4, 7), ["earlier"], keys, lambda: None)] == ["Name a town."] * 3
    assert all(prompt.count("Task: seed") == 2 for prompt in writer.prompts)
    evolve, writer = instructor("evolve", lambda prompt: f"Harder: {prompt.rpartition('Task: ')[2]}")
    found = evolve(range(4, 7), ["earlier"], keys, lambda: None)
    assert all(each.text == f"Harder: {each.made_from}" for each in found)
    assert {each.made_from for each in found} <= {"seed one", "seed two", "seed three", "earlier"}
    assert found[1:] == evolve(range(5, 7), ["earlier"], keys[1:], lambda: None)  # whatever the block


def test_a_prompt_that_does_not_fit_is_an_error_with_the_fields_to_lower():
    evolve, _ = instructor("evolve", str, seeds=["far too long"])
    with pytest.raises(ConfigError, match=r"evolve: a prompt is too long for the model: lower instructions"):
        evolve(range(1), [], jax.random.split(jax.random.key(0), 1), lambda: None)
