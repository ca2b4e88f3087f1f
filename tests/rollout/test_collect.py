"""A completion does not depend on the rest of its batch, and no row waits for a longer one."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.errors import ConfigError, DataError, Stopped
from jaxllm.parallel.sharding import MeshConfig, make_mesh, shardings
from jaxllm.rollout import collect as module
from jaxllm.rollout import scheduler
from jaxllm.rollout.collect import CHUNK_STEPS, UNFINISHED, BatchShapes, collect
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig

SAMPLED = SamplingConfig(temperature=1.0, top_k=None, top_p=0.95, min_p=None, max_new_tokens=40)
GREEDY = replace(SAMPLED, temperature=0.0, top_p=None)
STOP_IDS = tuple(range(40))  # a twelfth of the vocabulary


def random_prompts(tiny, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, tiny.vocab_size, length).tolist() for length in rng.integers(1, 30, 21)]


@pytest.fixture(scope="module")
def prompts(tiny):
    return random_prompts(tiny, 0)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), 63)


@pytest.fixture(scope="module")
def expected(model, params, prompts, keys):
    """`generate` of 3 completions of each prompt in one batch; every third is the first of its prompt."""
    repeated = [prompt for prompt in prompts for _ in range(3)]
    return {
        sampling: generate(model, params, repeated, sampling=sampling, stop_ids=STOP_IDS, keys=keys)
        for sampling in (GREEDY, SAMPLED)
    }


def rollout(model, params, prompts, keys, **changed):
    """A call of `collect`: one completion a prompt, in 8 rows, unless `changed`."""
    defaults = {"group_size": 1, "sampling": SAMPLED, "stop_ids": STOP_IDS, "decode_batch_size": 8}
    return collect(model, params, prompts, keys=keys, **{**defaults, **changed})


def assert_same(completions, tokens, log_probs, stop_reasons):
    assert completions.tokens == tokens
    assert completions.stop_reasons == stop_reasons
    for ours, theirs in zip(completions.log_probs, log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# Completions


@pytest.mark.parametrize(("sampling", "decode_batch_size"), [(GREEDY, 8), (SAMPLED, 3)])
def test_each_completion_equals_that_of_generate(
    model, params, prompts, keys, expected, sampling, decode_batch_size
):
    collected = rollout(
        model, params, prompts, keys[::3], sampling=sampling, decode_batch_size=decode_batch_size
    )
    static = expected[sampling]
    assert_same(collected, static.tokens[::3], static.log_probs[::3], static.stop_reasons[::3])
    assert len(set(map(len, collected.tokens))) > 8, "the test needs completions of different lengths"
    assert set(collected.stop_reasons) == {"stop", "length"}


@pytest.mark.parametrize("decode_batch_size", [2, 32, 64])
def test_completions_are_in_prompt_order_each_with_its_key(
    model, params, prompts, keys, expected, decode_batch_size
):
    collected = rollout(model, params, prompts, keys, group_size=3, decode_batch_size=decode_batch_size)
    static = expected[SAMPLED]
    assert_same(collected, static.tokens, static.log_probs, static.stop_reasons)


def test_a_mesh_does_not_change_the_tokens(model, params, prompts, keys, expected):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(params, mesh))
        collected = rollout(model, split, prompts, keys, group_size=3, sampling=GREEDY, decode_batch_size=16)
    assert collected.tokens == expected[GREEDY].tokens


@pytest.mark.parametrize("decode_batch_size", [8, 64])
def test_on_done_gets_every_completion_once(model, params, prompts, keys, decode_batch_size):
    received = []

    def on_done(indices, tokens):
        received.extend(zip(indices, map(list, tokens), strict=True))

    collected = rollout(
        model, params, prompts, keys, group_size=3, decode_batch_size=decode_batch_size, on_done=on_done
    )
    assert len(received) == 63
    assert dict(received) == dict(enumerate(collected.tokens))


def test_on_done_is_called_while_other_completions_are_active(model, params, prompts, keys):
    batches = []
    rollout(model, params, prompts, keys[::3], on_done=lambda indices, _: batches.append(indices))
    assert len(batches) > 5  # 21 completions in 8 rows, refilled one at a time
    assert all(batches)


# Cost


def test_a_prompt_is_prefilled_once_for_all_its_completions(model, params, prompts, keys, monkeypatch):
    prefilled = []

    def recorded(model, params, tokens):
        prefilled.extend(tokens.tolist())
        return prefill(model, params, tokens)

    prefill = scheduler.prefill
    monkeypatch.setattr(scheduler, "prefill", recorded)
    few = replace(SAMPLED, max_new_tokens=2)
    rollout(model, params, prompts, keys, group_size=3, sampling=few)
    assert [row[: len(prompt)] for row, prompt in zip(prefilled, prompts, strict=True)] == prompts


def test_short_completions_do_not_wait_for_a_long_one(model, params, tiny, keys):
    short, long = [1] * (tiny.max_length - 2), [1]
    sampling = replace(SAMPLED, max_new_tokens=16)
    prompts = [long, *[short] * 8]
    collected = rollout(model, params, prompts, keys[:9], sampling=sampling, stop_ids=(), decode_batch_size=2)
    assert list(map(len, collected.tokens)) == [16] + [2] * 8
    assert collected.steps == 16  # static batches of two would take 16 + 2 + 2 + 2 + 2


def test_the_last_active_rows_decode_in_a_smaller_batch(model, params, tiny, keys, monkeypatch):
    sizes = []

    def recorded(model, params, state, *rest, **kwargs):
        sizes.append(len(state.done))
        return decode(model, params, state, *rest, **kwargs)

    decode = module.decode
    monkeypatch.setattr(module, "decode", recorded)
    monkeypatch.setattr(module, "MIN_BATCH", 2)
    prompts = [[1] * (tiny.max_length - left) for left in (1, 2, 3, 1, 8, 1, 2, 3)]
    collected = rollout(model, params, prompts, keys[:8], stop_ids=())
    assert list(map(len, collected.tokens)) == [1, 2, 3, 1, 8, 1, 2, 3]
    assert sizes == [8, 4, 2]


def test_rounds_share_a_few_programs(counted, no_compilation, params, tiny, keys):
    rounds, keys = [random_prompts(tiny, seed) for seed in range(9)], [keys, keys[::-1]]
    model, traced = counted

    def run(seed):
        rollout(model, params, rounds[seed], keys[seed % 2], group_size=3)

    # Prompts are prefilled in one shape; 8 rows decode in 64 and 96 slots.
    for seed in range(6):
        run(seed)
    assert sorted(traced) == [(1, 32), (8, 1), (8, 1)]
    # The copies from one size to another may be compiled later, but only once.
    with no_compilation():
        for seed in range(6, 9):
            run(seed)
    assert len(traced) == 3


def test_rollouts_of_varying_prompts_share_their_programs(counted, no_compilation, params, tiny):
    """Whatever their number and lengths: a run knows its programs when it starts."""
    model, traced = counted
    shapes = BatchShapes.of(8, 3, 16, longest=40, max_length=tiny.max_length)
    assert shapes == ([8, 16], 2, 1, [48, 96, 128, 192, 256])
    assert shapes.describe(40) == (
        "at most 2 compiled programs decode (8, 16 rows x 96 cache slots), and one reads 1 x 48 prompt tokens"
    )

    numbers = (8, 1, 3, 7, 1, 8)
    keys = [jax.random.split(jax.random.key(number), number * 3) for number in numbers]

    def run(i):
        rng = np.random.default_rng(i)
        lengths = rng.integers(1, 41 if i % 2 else 10, numbers[i])
        prompts = [rng.integers(0, tiny.vocab_size, length).tolist() for length in lengths]
        rollout(model, params, prompts, keys[i], group_size=3, decode_batch_size=16, shapes=shapes)

    for i in range(2):
        run(i)
    assert sorted(traced) == [(1, 48), (8, 1), (16, 1)]
    with no_compilation():
        for i in range(2, len(numbers)):
            run(i)


def test_prompts_of_one_completion_fill_the_rows_of_groups(model, params, prompts, keys, tiny):
    """Evaluation samples one completion a prompt, with the programs of rollouts that read few prompts."""
    shapes = BatchShapes.of(2, 8, 16, longest=40, max_length=tiny.max_length)
    assert (shapes.R, shapes.P) == (16, 2)
    long = replace(SAMPLED, max_new_tokens=16)
    collected = rollout(
        model,
        params,
        prompts[:16],
        keys[:16],
        sampling=long,
        stop_ids=(),
        decode_batch_size=16,
        shapes=shapes,
    )
    assert collected.steps == 16, "all 16 rows decode together"


# Rows that are stopped and continued


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_stopped_completions_continue_to_the_same_tokens(model, params, prompts, keys, expected, sampling):
    """Stopped after every two chunks; those that had begun are read again."""
    done, collected, stopped = [], None, 0
    calls = itertools.count(1)
    while collected is None or UNFINISHED in collected.stop_reasons:
        collected = rollout(
            model,
            params,
            prompts,
            keys,
            group_size=3,
            sampling=sampling,
            decode_batch_size=16,
            on_done=lambda indices, _: done.extend(indices),
            until=lambda finished: next(calls) % 3 == 0,
            started=collected,
        )
        stopped += sum(
            len(tokens) > 0 and reason == UNFINISHED
            for tokens, reason in zip(collected.tokens, collected.stop_reasons, strict=True)
        )
    static = expected[sampling]
    assert_same(collected, static.tokens, static.log_probs, static.stop_reasons)
    assert sorted(done) == list(range(63)), "each is finished once"
    assert stopped > 20, "the test needs completions that are continued"


def test_until_is_given_how_many_have_finished(model, params, prompts, keys):
    collected = rollout(model, params, prompts, keys[::3], until=lambda finished: finished >= 5)
    finished = [reason != UNFINISHED for reason in collected.stop_reasons]
    assert 5 <= sum(finished) < 21
    assert len(collected.tokens) == len(collected.log_probs) == 21
    assert [len(x) for x in collected.tokens] == [len(x) for x in collected.log_probs]


# Stopping, and invalid arguments


def test_check_is_called_between_chunks_and_may_raise(model, params, keys):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped("enough")

    prompt = [1] * 150  # in 256 slots from the start, so that no chunk ends because the cache grows
    long = replace(SAMPLED, max_new_tokens=CHUNK_STEPS + 10)
    with pytest.raises(Stopped, match="enough"):
        rollout(model, params, [prompt], keys[:1], sampling=long, stop_ids=(), check=check)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"group_size": 0}, ConfigError, "group_size=0 must be at least 1"),
        ({"decode_batch_size": 0}, ConfigError, "decode_batch_size=0 must be at least 1"),
        ({"group_size": 3}, DataError, r"keys has shape \(4,\) for 2 prompts x 3 completions: pass one key"),
        ({"prompts": []}, DataError, r"keys has shape \(4,\) for 0 prompts x 2"),
        ({"prompts": [[1], []]}, DataError, r"prompts\[1\] has 0 tokens, must have 1 to 255"),
    ],
)
def test_invalid_arguments_are_errors(model, params, keys, bad, error, message):
    good = {"prompts": [[1, 2], [3]], "keys": keys[:4], "group_size": 2}
    with pytest.raises(error, match=message):
        rollout(model, params, **{**good, **bad})
