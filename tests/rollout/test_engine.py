"""What a request is told is its own affair: not who shares the batch, how others sample, or who goes away."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.errors import DataError, RunError
from jaxllm.rollout import engine as module
from jaxllm.rollout.engine import Busy, Engine
from jaxllm.rollout.generate import generate, resize_jit
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
    """Collects what is said to it."""

    def __init__(self):
        self.pieces, self.tokens = queue.Queue(), []

    def say(self, tokens, reason):
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
    """(**options) -> an engine of 4 rows, closed at the end."""
    engines = []

    def start(model=model, **options):
        engines.append(Engine(model, params, **{"stop_ids": STOP_IDS, "rows": 4} | options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def ask(engine, prompt, sampling=PLAIN, seed=0):
    listener = Listener()
    listener.request = engine.submit(prompt, sampling=sampling, seed=seed, say=listener.say)
    return listener


def random_requests(tiny, number=17, longest=60):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny.vocab_size, n).tolist() for n in rng.integers(1, longest, number)]
    return [(prompt, SAMPLINGS[i % len(SAMPLINGS)], i) for i, prompt in enumerate(prompts)]


def test_each_request_is_told_what_generate_says_whoever_shares_the_batch(start, model, params, tiny):
    requests = random_requests(tiny)
    engine = start()
    told = [listener.all() for listener in [ask(engine, *request) for request in requests]]
    for (prompt, sampling, seed), (tokens, reason) in zip(requests, told, strict=True):
        key = jax.random.key(seed)[None]
        alone = generate(model, params, [prompt], sampling=sampling, stop_ids=STOP_IDS, keys=key)
        assert (tokens, reason) == (alone.tokens[0], alone.stop_reasons[0])
    assert {reason for _, reason in told} == {"stop", "length"}


def test_a_row_samples_as_its_own_config_says():
    logits = np.float32(np.random.default_rng(0).normal(size=(len(SAMPLINGS) * 40, 50)) * 3)
    keys = jax.random.split(jax.random.key(0), len(logits))
    configs = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(len(logits))]
    tokens = jax.jit(sample_rows)(logits, keys, row_sampling(configs, 50))
    for kind, config in enumerate(SAMPLINGS):
        rows = slice(kind, None, len(SAMPLINGS))
        np.testing.assert_array_equal(tokens[rows], sample(logits[rows], keys[rows], config)[0])


def test_tokens_come_as_they_are_said_and_a_late_request_does_not_wait(start):
    engine = start(stop_ids=())
    long = ask(engine, [5], replace(PLAIN, max_new_tokens=120))
    first, reason = long.next()
    assert (len(first), reason) == (module.STRETCH, None)
    short = ask(engine, [6], replace(PLAIN, max_new_tokens=3))
    assert len(short.all()[0]) == 3
    assert long.pieces.qsize() < 14, "the long one is told in pieces of 8, and had not ended"
    assert len(long.all()[0]) == 120 - len(first)


def test_who_goes_away_makes_room(start):
    engine = start(stop_ids=(), rows=1)
    endless, waiting, gone = (ask(engine, [i], replace(PLAIN, max_new_tokens=200)) for i in (1, 2, 3))
    endless.next()
    gone.request.cancel()
    endless.request.cancel()
    assert len(waiting.all()[0]) == 200
    assert endless.pieces.qsize() < 20
    assert gone.pieces.empty()


@pytest.mark.parametrize("limit", [100, 2**31 - 1, 3 * 10**9])
def test_the_model_length_ends_an_answer(start, tiny, limit):
    engine = start(stop_ids=())
    tokens, reason = ask(engine, [1] * (tiny.max_length - 7), replace(PLAIN, max_new_tokens=limit)).all()
    assert (len(tokens), reason) == (7, "length")


def test_a_handful_of_programs_serves_all(start, counted, no_compilation, tiny):
    model, traced = counted
    engine = start(model)

    def serve():
        for number in (1, 17):
            for listener in [ask(engine, *request) for request in random_requests(tiny, number, 150)]:
                listener.all()

    for _ in range(3):
        serve()
    # Prompts are read 1 or 8 at a time in 32, 128 or 256 positions; 4 rows decode in 128 or 256 slots.
    assert len(traced) == len(set(traced)) + 1 <= 8, traced
    with no_compilation():
        for _ in range(3):
            serve()


def test_a_request_is_taken_in_while_the_caches_shrink(start, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def resize_slowly(state, slots):
        if slots < state.tokens.shape[1]:
            began.set()
            go_on.wait(60)
        return resize_jit(state, slots)

    monkeypatch.setattr(module, "resize_jit", resize_slowly)
    engine = start()
    ask(engine, [1] * 150).all()
    assert began.wait(60)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, engine, [2])
        try:
            listener = asked.result(timeout=10)
        finally:
            go_on.set()
    assert listener.all()[0]


# Limits, bad input, the end


def test_more_than_may_wait_are_refused(start):
    engine = start(stop_ids=(), rows=1, max_waiting=2)
    first = ask(engine, [1], replace(PLAIN, max_new_tokens=200))
    first.next()
    ask(engine, [2]), ask(engine, [3])
    with pytest.raises(Busy, match="2 requests are waiting"):
        ask(engine, [4])
    assert engine.occupied == 3


@pytest.mark.parametrize(("prompt", "message"), [([], "0 tokens"), ([-1], "from -1"), ([1] * 999, "999 tok")])
def test_a_prompt_that_cannot_be_read_is_refused_at_once(start, prompt, message):
    with pytest.raises(DataError, match=message):
        ask(start(), prompt)


def test_the_end_is_told_to_all_who_listen(start):
    engine = start(stop_ids=(), rows=1)
    listeners = [ask(engine, [i], replace(PLAIN, max_new_tokens=200)) for i in (1, 2)]
    listeners[0].next()
    engine.close()
    assert [listener.all()[1] for listener in listeners] == ["error", "error"]
    with pytest.raises(RunError, match="has ended"):
        ask(engine, [1])


def test_a_failure_of_the_model_is_told_and_not_waited_for(start, model, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    failing = model._replace(apply=lambda *_, **__: 1 / 0)
    engine = start(failing)
    assert ask(engine, [1]).all() == ([], "error")
    engine.close()
    with pytest.raises(RunError, match="ZeroDivisionError"):
        ask(engine, [1])
