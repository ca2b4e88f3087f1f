"""A completion does not depend on the other requests, how they sample, or whether they are canceled."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.errors import DataError, RunError
from jaxllm.models import Transformer
from jaxllm.rollout import engine as module
from jaxllm.rollout import scheduler
from jaxllm.rollout.engine import TOP_SCORES, Busy, Engine
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig, row_sampling, sample, sample_rows

PLAIN = SamplingConfig(temperature=1.0, top_k=None, top_p=None, min_p=None, max_new_tokens=30)
SAMPLINGS = (
    PLAIN,
    replace(PLAIN, temperature=0.0),
    replace(PLAIN, temperature=0.7, top_p=0.9),
    replace(PLAIN, top_k=5, max_new_tokens=11),
    replace(PLAIN, temperature=1.3, min_p=0.05, top_k=40, top_p=0.95),
)
STOP_IDS = tuple(range(20))


class Listener:
    """Collects the tokens of a request."""

    def __init__(self):
        self.pieces, self.tokens = queue.Queue(), []

    def on_tokens(self, tokens, reason):
        self.pieces.put((tokens, reason))

    def next(self):
        return self.pieces.get(timeout=60)

    def all(self):
        reason = None
        while reason is None:
            tokens, reason = self.next()
            self.tokens += tokens
        return self.tokens, reason


@pytest.fixture
def start(model, params):
    """(**options) -> an engine of 4 rows, which is closed at the end."""
    engines = []

    def start(model=model, **options):
        engines.append(Engine(model, params, **{"stop_ids": STOP_IDS, "rows": 4} | options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def submit(engine, prompt, sampling=PLAIN, seed=0):
    listener = Listener()
    listener.request = engine.submit(prompt, sampling=sampling, seed=seed, on_tokens=listener.on_tokens)
    return listener


def random_requests(tiny, number=17, longest=60):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny.vocab_size, n).tolist() for n in rng.integers(1, longest, number)]
    return [(prompt, SAMPLINGS[i % len(SAMPLINGS)], i) for i, prompt in enumerate(prompts)]


def test_each_completion_equals_that_of_generate(start, model, params, tiny):
    requests = random_requests(tiny)
    engine = start()
    completions = [listener.all() for listener in [submit(engine, *request) for request in requests]]
    for kind, sampling in enumerate(SAMPLINGS):
        prompts, _, seeds = zip(*requests[kind :: len(SAMPLINGS)], strict=True)
        keys = jax.vmap(jax.random.key)(np.array(seeds))
        expected = generate(model, params, list(prompts), sampling=sampling, stop_ids=STOP_IDS, keys=keys)
        found = completions[kind :: len(SAMPLINGS)]
        assert found == list(zip(expected.tokens, expected.stop_reasons, strict=True))
    assert {reason for _, reason in completions} == {"stop", "length"}


def test_each_row_is_sampled_by_its_own_config():
    logits = np.float32(np.random.default_rng(0).normal(size=(len(SAMPLINGS) * 40, 50)) * 3)
    keys = jax.random.split(jax.random.key(0), len(logits))
    configs = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(len(logits))]
    tokens = jax.jit(sample_rows)(logits, keys, row_sampling(configs, 50))
    expected = jax.jit(lambda logits, keys: [sample(logits, keys, config)[0] for config in SAMPLINGS])
    for kind, sampled in enumerate(expected(logits, keys)):
        np.testing.assert_array_equal(tokens[kind :: len(SAMPLINGS)], sampled[kind :: len(SAMPLINGS)])


def test_tokens_are_delivered_in_chunks_and_a_late_request_does_not_wait(start):
    engine = start(stop_ids=())
    long = submit(engine, [5], replace(PLAIN, max_new_tokens=120))
    first, reason = long.next()
    assert (len(first), reason) == (module.CHUNK_STEPS, None)
    short = submit(engine, [6], replace(PLAIN, max_new_tokens=3))
    assert len(short.all()[0]) == 3
    assert long.pieces.qsize() < 14, "the long one is delivered in chunks of 8, and had not finished"
    assert len(long.all()[0]) == 120 - len(first)


def test_a_canceled_request_frees_its_row(start):
    engine = start(stop_ids=(), rows=1)
    long, waiting, canceled = (submit(engine, [i], replace(PLAIN, max_new_tokens=200)) for i in (1, 2, 3))
    long.next()
    canceled.request.cancel()
    long.request.cancel()
    assert len(waiting.all()[0]) == 200
    assert long.pieces.qsize() < 20
    assert canceled.pieces.empty()


@pytest.mark.parametrize("limit", [100, 2**31 - 1, 3 * 10**9])
def test_the_model_length_ends_a_completion(start, tiny, limit):
    engine = start(stop_ids=())
    tokens, reason = submit(engine, [1] * (tiny.max_length - 7), replace(PLAIN, max_new_tokens=limit)).all()
    assert (len(tokens), reason) == (7, "length")


def test_all_requests_share_a_few_programs(start, counted, no_compilation, tiny):
    model, traced = counted
    engine = start(model)

    def serve():
        for number in (1, 17):
            for listener in [submit(engine, *request) for request in random_requests(tiny, number, 150)]:
                listener.all()

    for _ in range(3):
        serve()
    # Prompts are prefilled 1 or 8 at a time in 32, 128 or 256 positions; 4 rows decode in 128 or 256 slots.
    assert len(traced) == len(set(traced)) + 1 <= 8, traced
    with no_compilation():
        for _ in range(3):
            serve()


def test_the_cache_shrinks_once_the_longest_request_is_done_though_others_go_on(start, monkeypatch):
    resized = []

    def resize(state, slots):
        resized.append((slots, engine.num_requests))
        return module_resize(state, slots)

    module_resize = scheduler.resize
    monkeypatch.setattr(scheduler, "resize", resize)
    engine, limit = start(stop_ids=()), replace(PLAIN, max_new_tokens=100)
    alone = submit(engine, [5], limit).all()
    short, both = Listener(), threading.Event()

    def on_tokens(*piece):
        both.wait(60)
        short.on_tokens(*piece)

    engine.submit([5], sampling=limit, seed=0, on_tokens=on_tokens)
    long = submit(engine, [1] * 150, replace(PLAIN, max_new_tokens=2))
    both.set()
    assert len(long.all()[0]) == 2
    assert short.all() == alone
    assert resized == [(256, 2), (128, 1)], "while the short one goes on"


def test_a_request_can_be_submitted_while_the_cache_shrinks(start, monkeypatch):
    began, resume = threading.Event(), threading.Event()

    def resize_slowly(state, slots):
        if slots < state.tokens.shape[1]:
            began.set()
            resume.wait(60)
        return module_resize(state, slots)

    module_resize = scheduler.resize
    monkeypatch.setattr(scheduler, "resize", resize_slowly)
    engine = start()
    submit(engine, [1] * 150).all()
    assert began.wait(60)
    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(submit, engine, [2])
        try:
            listener = submitted.result(timeout=10)
        finally:
            resume.set()
    assert listener.all()[0]


def test_prompts_longer_than_the_limit_are_prefilled_alone(start, monkeypatch):
    shapes = []

    def prefill(model, params, tokens, *arguments):
        shapes.append(tokens.shape)
        return module_prefill(model, params, tokens, *arguments)

    module_prefill = scheduler.prefill
    monkeypatch.setattr(scheduler, "prefill", prefill)
    monkeypatch.setattr(module, "MAX_BATCHED_PROMPT", 40)
    engine = start(stop_ids=())
    submit(engine, [1], replace(PLAIN, max_new_tokens=100)).next()  # the next ones wait for its chunk
    for listener in [submit(engine, [2] * n, replace(PLAIN, max_new_tokens=2)) for n in (100, 20, 110)]:
        assert len(listener.all()[0]) == 2
    assert sorted(shapes) == [(1, 32), (1, 32), (1, 128), (1, 128)]


# Scoring


def test_scores_are_the_log_probs_of_given_tokens(start, model, params):
    prompt, greedy, scored = [5, 7, 9], replace(PLAIN, temperature=0.0), queue.Queue()
    key = jax.random.key(0)[None]
    made = generate(model, params, [prompt], sampling=greedy, stop_ids=STOP_IDS, keys=key)
    engine = start()
    busy = submit(engine, [5])  # decoding goes on beside it
    engine.score(prompt + made.tokens[0], scored.put)
    scores = scored.get(timeout=60)
    assert scores.top_ids.shape == scores.top_log_probs.shape == (3 + len(made.tokens[0]), TOP_SCORES)
    np.testing.assert_allclose(scores.log_probs[3:], made.log_probs[0], atol=1e-4)
    np.testing.assert_array_equal(scores.top_ids[3:, 0], made.tokens[0])
    np.testing.assert_allclose(scores.top_log_probs[3:, 0], made.log_probs[0], atol=1e-4)
    assert (np.diff(scores.top_log_probs, axis=1) <= 0).all()
    assert busy.all()


def test_ids_beyond_the_tokenizer_are_neither_generated_nor_among_the_most_likely(start, model, params):
    engine, scored = start(stop_ids=(), vocab_size=40), queue.Queue()
    tokens, _ = submit(engine, [5, 7]).all()
    key = jax.random.key(0)[None]
    made = generate(model, params, [[5, 7]], sampling=PLAIN, stop_ids=(), keys=key, vocab_size=40)
    assert tokens == made.tokens[0]
    assert max(tokens) < 40
    engine.score([5, 7, 9], scored.put)
    assert scored.get(timeout=60).top_ids.max() < 40


@pytest.mark.parametrize("tokens", [[], [-1], [10**6], [1] * 65])
def test_tokens_that_cannot_be_scored_are_an_error_at_once(start, tokens):
    with pytest.raises(DataError):
        start(max_length=64).score(tokens, print)


# Limits, invalid prompts, closing


def test_max_length_limits_prompt_completion_and_cache(start):
    engine = start(stop_ids=(), max_length=128)
    tokens, reason = submit(engine, [1] * 121, replace(PLAIN, max_new_tokens=100)).all()
    assert (len(tokens), reason) == (7, "length")
    assert engine._scheduler.slots == 128
    with pytest.raises(DataError, match="129 tokens do not fit max_length=128"):
        submit(engine, [1] * 128)


def test_canceled_requests_do_not_count_as_waiting(start):
    engine = start(stop_ids=(), rows=1, max_waiting=1)
    submit(engine, [1], replace(PLAIN, max_new_tokens=200)).next()
    submit(engine, [2]).request.cancel()
    submit(engine, [3])


def test_a_request_beyond_the_queue_raises_busy(start):
    engine = start(stop_ids=(), rows=1, max_waiting=2)
    first = submit(engine, [1], replace(PLAIN, max_new_tokens=200))
    first.next()
    submit(engine, [2]), submit(engine, [3])
    with pytest.raises(Busy, match="2 requests are waiting"):
        submit(engine, [4])
    assert engine.num_requests == 3


@pytest.mark.parametrize(("prompt", "message"), [([], "0 tokens"), ([-1], "from -1"), ([1] * 999, "999 tok")])
def test_an_invalid_prompt_is_an_error_at_once(start, prompt, message):
    with pytest.raises(DataError, match=message):
        submit(start(), prompt)


def test_closing_delivers_an_error_to_unfinished_requests(start):
    engine = start(stop_ids=(), rows=1)
    listeners = [submit(engine, [i], replace(PLAIN, max_new_tokens=200)) for i in (1, 2)]
    listeners[0].next()
    engine.close()
    assert [listener.all()[1] for listener in listeners] == ["error", "error"]
    with pytest.raises(RunError, match="has stopped"):
        submit(engine, [1])


def test_a_failure_of_the_model_is_delivered_as_an_error(start, model, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    class Failing(Transformer):
        def apply(self, *_, **__):
            return 1 / 0

    failing = Failing(model.config)
    engine = start(failing)
    assert submit(engine, [1]).all() == ([], "error")
    engine.close()
    assert engine.error == "ZeroDivisionError: division by zero"
    with pytest.raises(RunError, match="ZeroDivisionError"):
        submit(engine, [1])
    with pytest.raises(RunError, match="ZeroDivisionError"):
        engine.score([1], print)


def test_a_failure_while_scoring_is_delivered_to_all_that_wait(start, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(module, "score_tokens", lambda *_: 1 / 0)
    scored, engine = queue.Queue(), start()
    engine.score([1, 2], scored.put)
    assert scored.get(timeout=60) is None
    engine.close()
    assert engine.error == "ZeroDivisionError: division by zero"
