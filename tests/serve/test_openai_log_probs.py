"""Log-probs of chats and texts; and /v1/completions, which continues texts and scores given ones."""

from dataclasses import replace

import jax
import pytest
from http_server import REQUEST, SAMPLING

from jaxllm.rollout.generate import generate
from jaxllm.serve.openai_responses import by_text

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def generated(model):
    """A prompt with its greedy completion, and the log-probs of its tokens."""
    greedy = replace(SAMPLING, temperature=0.0)
    prompt, engine = model.template.prompt(REQUEST["messages"]), model.engine
    keys, stop_ids = jax.random.key(7)[None], model.template.stop_ids
    made = generate(
        engine.model, engine._scheduler.params, [prompt], sampling=greedy, stop_ids=stop_ids, keys=keys
    )
    return prompt, made.tokens[0], made.log_probs[0]


def test_a_chat_has_the_log_probs_of_its_tokens(client, model, generated):
    _, tokens, log_probs = generated
    choice = client.chat(temperature=0, logprobs=True, top_logprobs=3)[1]["choices"][0]
    content = choice["logprobs"]["content"]
    texts = [entry["token"] for entry in content]
    assert "".join(texts).lstrip() == choice["message"]["content"]
    assert tokens[-1] == model.tokenizer.special_ids["<|end|>"], "the stop token is not part of the text"
    assert [entry["logprob"] for entry in content] == pytest.approx(log_probs[:-1].tolist(), abs=1e-4)
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        first = entry["top_logprobs"][0]
        assert (len(entry["top_logprobs"]), first["token"], first["logprob"]) == (
            3,
            entry["token"],
            entry["logprob"],
        )
    plain = client.chat(temperature=0, logprobs=True)[1]["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * len(content)
    cut = client.chat(temperature=0, logprobs=True, stop=[texts[-1]])[1]["choices"][0]
    assert [entry["token"] for entry in cut["logprobs"]["content"]] == texts[: texts.index(texts[-1])]


def scored(choice, context):
    """What lm-eval's local-completions makes of a choice: the sum over what follows the context, and whether
    it is the greedy continuation. Its last token is the generated one."""
    log_probs = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    greedy = all(value == max(top.values()) for value, top in zip(log_probs, tops, strict=True))
    return sum(log_probs), greedy


def test_given_continuations_are_scored_as_lm_eval_does(client, generated):
    prompt, tokens, log_probs = generated
    other = [*tokens[:-1], 5]
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    status, body = client.post(TEXT, {"prompt": [prompt + tokens, prompt + other], **fields})
    assert status == 200
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    right, wrong = (scored(choice, len(prompt)) for choice in body["choices"])
    assert right == (pytest.approx(float(log_probs.sum()), abs=1e-3), True)
    assert wrong[0] < right[0]
    assert not wrong[1]
    for choice in body["choices"]:
        log_probs = choice["logprobs"]
        assert (log_probs["token_logprobs"][0], log_probs["top_logprobs"][0]) == (None, None)
        assert {len(each) for each in log_probs.values()} == {len(prompt) + len(tokens) + 1}
    _, only = client.post(TEXT, {"prompt": prompt + tokens, **fields, "max_tokens": 0})
    alone, first = (each["choices"][0]["logprobs"]["token_logprobs"] for each in (only, body))
    assert alone == first[:-1]
    assert only["usage"]["completion_tokens"] == 0


def test_a_text_is_continued_after_bos_and_token_ids_as_they_are(client, model):
    text, tokenizer = "one and two?", model.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    fields = {"temperature": 0, "max_tokens": 4, "logprobs": 0}
    status, body = client.post(TEXT, {"prompt": text, **fields})
    assert (status, body["object"], body["model"]) == (200, "text_completion", "chat")
    (choice,) = body["choices"]
    assert client.post(TEXT, {"prompt": ids, **fields})[1]["choices"] == [choice]
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert choice["logprobs"]["top_logprobs"] is None
    both = client.post(TEXT, {"prompt": [text, text], **fields, "echo": True, "n": 2})[1]["choices"]
    assert [each["index"] for each in both] == [0, 1, 2, 3]
    assert {each["text"] for each in both} == {text + choice["text"]}
    log_probs = both[0]["logprobs"]
    assert log_probs["tokens"][0] == "<s>"
    assert "".join(log_probs["tokens"][1:]).startswith(text)
    for token, at in zip(log_probs["tokens"][1 : len(ids)], log_probs["text_offset"][1:], strict=False):
        assert text.startswith(token, at)
    events = client.stream(TEXT, {"prompt": text}, temperature=0, max_tokens=4, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == text + choice["text"]


def test_a_token_that_is_no_text_has_a_name_of_its_own(model):
    tokenizer = model.tokenizer
    first, *_ = tokenizer.encode("\U0001f642")  # a smile, as bytes
    entries = {tokenizer.bos_id: -1.0, first: -2.0, tokenizer.encode("a")[0]: -3.0}
    assert by_text(tokenizer, entries) == {"<s>": -1.0, "bytes:\\xf0": -2.0, "a": -3.0}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": "one " * 99}, "prompt"),
        ({"prompt": [1] * 64, "max_tokens": 1}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_bad_field_of_a_text_request_is_named(client, change, field):
    status, body = client.post(TEXT, {"prompt": "one", **change})
    assert (status, body["error"]["param"]) == (400, field)
