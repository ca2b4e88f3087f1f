"""Comparisons over HTTP: pairs of answers, blind choices, raters' own prompts, many raters at once."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from http_server import LONE_SURROGATE, PROMPTS, serving

from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig


def compare(client, rater, choice):
    """The rater's next comparison, after making the choice; None where there is none."""
    _, body = client.post("/api/next", {"rater": rater})
    if body["offer"] is None:
        return None
    assert client.post("/api/choice", {"rater": rater, "id": body["offer"]["id"], "choice": choice})[0] == 200
    return body["offer"]


def test_two_checkpoints_are_compared_blindly_and_the_row_tells_which_is_which(model, tmp_path):
    other = model._replace(name="other", checkpoint={"path": "elsewhere", "hash": "0"})
    with serving([model, other], tmp_path / "a.jsonl", prompts=PROMPTS) as client:
        offers = [compare(client, "ann", i % 2) for i in range(4)]
        assert compare(client, "ann", 0) is None
        state = json.loads(client.send("GET", "/api/state?rater=ann")[1])
    assert set(offers[0]) == {"id", "prompt", "answers"}
    assert state["progress"]["done"] == state["progress"]["of"] == 4
    assert [row["prompt"] for row in client.rows] == [offer["prompt"] for offer in offers]
    for row in client.rows:
        assert {checkpoint["path"] for checkpoint in row["checkpoints"]} == {
            model.checkpoint["path"],
            "elsewhere",
        }
        for text, seed in zip(row["answers"], row["seeds"], strict=True):
            key = jax.random.key(seed)[None]
            prompt = model.template.prompt(row["prompt"])
            expected = generate(
                model.engine.model,
                model.engine._scheduler.params,
                [prompt],
                sampling=SamplingConfig(**row["sampling"]),
                stop_ids=model.template.stop_ids,
                keys=key,
            )
            assert model.tokenizer.decode(expected.tokens[0], from_start=False).strip() == text


def test_a_raters_own_prompt_comes_first(model, tmp_path):
    with serving([model], tmp_path / "a.jsonl", prompts=PROMPTS) as client:
        client.post("/api/next", {"rater": "ann"})
        _, body = client.post("/api/next", {"rater": "ann", "prompt": " five and ten? "})
        assert body["offer"]["prompt"] == [{"role": "user", "content": "five and ten?"}]
        assert compare(client, "ann", "bad") == body["offer"]


def test_a_lone_surrogate_in_a_prompt_is_kept(model, tmp_path):
    half, own = (f"{text} {LONE_SURROGATE}" for text in ("one", "six"))
    prompts = [[{"role": "user", "content": half}]]
    with serving([model], tmp_path / "a.jsonl", prompts=prompts) as client:
        assert compare(client, "ann", 0)["prompt"][0]["content"] == half
        _, body = client.post("/api/next", {"rater": "ann", "prompt": own})
        assert body["offer"]["prompt"][0]["content"] == own
        assert compare(client, "ann", 1) == body["offer"]
        assert client.chat(messages=prompts[0])[0] == 200


def test_equal_answers_are_not_compared(model, tmp_path):
    greedy = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=12)
    long = [{"role": "user", "content": "one " * 99}]
    with serving([model], tmp_path / "a.jsonl", prompts=[*PROMPTS, long], sampling=greedy) as client:
        assert compare(client, "ann", 0) is None
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
def test_an_invalid_request_is_an_error_that_names_the_field(client, path, body, status, field):
    code, response = client.post(path, body)
    assert (code, response["error"]["param"]) == (status, field)


def test_twenty_clients_at_once_lose_nothing(model, tmp_path):
    prompts = [[{"role": "user", "content": f"{i} and {i}?"}] for i in range(30)]
    with serving([model], tmp_path / "a.jsonl", prompts=prompts, raters_per_pair=2) as client:

        def rate(i):
            choices = []
            while offer := compare(client, f"rater {i}", i % 2):
                choices.append((f"rater {i}", offer["id"], offer["answers"], i % 2))
            return choices

        def chat(i):
            return [client.chat_text(seed=100 * i + j) for j in range(9)]

        with ThreadPoolExecutor(20) as pool:
            chatting = [pool.submit(chat, i) for i in range(10)]
            rating = [pool.submit(rate, i) for i in range(10)]
            choices = [choice for future in rating for choice in future.result()]
            chats = [future.result() for future in chatting]
        assert chats[3][2] == client.chat_text(seed=302)
        rows = [(row["rater"], row["id"], row["answers"], row["choice"]) for row in client.rows]
        assert sorted(rows) == sorted(choices)
        assert len(rows) == 2 * len({row["comparison"] for row in client.rows})
        assert len(rows) > 40
