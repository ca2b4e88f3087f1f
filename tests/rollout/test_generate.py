"""A completion is the model's next tokens up to the first stop token, whatever else is in the batch."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import DataError
from jaxllm.losses.language_model import token_log_probs
from jaxllm.models import build_model
from jaxllm.parallel.sharding import MeshConfig, make_mesh, shardings
from jaxllm.rollout.collect import bucket, collect
from jaxllm.rollout.decode import decode, free_rows
from jaxllm.rollout.generate import generate, stream
from jaxllm.rollout.sampling import SamplingConfig, sample

GREEDY = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=20)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=50, top_p=0.95)
LENGTHS = (30, 1, 7, 18, 30)  # 6 rows, whose cache of 48 slots grows to 64 on the way


@pytest.fixture(scope="module")
def prompts(tiny):
    rng = np.random.default_rng(0)
    return [rng.integers(0, tiny.vocab_size, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def keys(prompts):
    return jax.random.split(jax.random.key(0), len(prompts))


@pytest.fixture(scope="module")
def greedy(model, params, prompts, keys):
    return generate(model, params, prompts, sampling=GREEDY, stop_ids=(), keys=keys)


@pytest.fixture(scope="module")
def sampled(model, params, prompts, keys):
    return generate(model, params, prompts, sampling=SAMPLED, stop_ids=(), keys=keys)


def full_pass(model, params, prompts, completions):
    """Prompts with completions in one forward pass: logits [N, T, V], targets, and the completions' mask."""
    rows = [prompt + tokens for prompt, tokens in zip(prompts, completions, strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
        mask[b, len(prompts[b]) : len(row)] = True
    logits = jax.jit(model.logits)(params, tokens)
    return logits[:, :-1], tokens[:, 1:], mask[:, 1:]


# Tokens and log-probs


def test_greedy_tokens_are_the_argmax_of_a_full_forward_pass(model, params, prompts, greedy):
    assert [len(tokens) for tokens in greedy.tokens] == [20] * len(prompts)
    assert len(set(greedy.tokens[0])) > 5, "the test needs a completion that is not constant"
    logits, targets, mask = full_pass(model, params, prompts, greedy.tokens)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1)[mask], targets[mask])


@pytest.mark.parametrize("row", [0, 1, 3])
def test_a_completion_is_the_same_without_the_rest_of_the_batch(
    model, params, prompts, keys, greedy, sampled, row
):
    one = {"prompts": prompts[row : row + 1], "stop_ids": (), "keys": keys[row : row + 1]}
    alone = generate(model, params, sampling=GREEDY, **one)
    assert alone.tokens[0] == greedy.tokens[row]
    alone = generate(model, params, sampling=SAMPLED, **one)
    assert alone.tokens[0] == sampled.tokens[row]
    np.testing.assert_allclose(alone.log_probs[0], sampled.log_probs[row], rtol=1e-3, atol=1e-4)


def test_the_draw_at_position_t_uses_the_key_folded_with_t(model, params, prompts, keys, sampled):
    logits, _, mask = full_pass(model, params, prompts, sampled.tokens)
    for row, tokens in enumerate(sampled.tokens):
        folded = jax.vmap(partial(jax.random.fold_in, keys[row]))(jnp.arange(len(tokens)))
        assert sample(logits[row][mask[row]], folded, SAMPLED)[0].tolist() == tokens


def test_different_keys_give_different_completions_of_one_prompt(model, params, prompts, keys, sampled):
    same_prompt = [prompts[0]] * len(prompts)
    completions = generate(model, params, same_prompt, sampling=SAMPLED, stop_ids=(), keys=keys[::-1]).tokens
    assert completions[-1] == sampled.tokens[0]
    assert len({tuple(tokens) for tokens in completions}) == len(completions)


def test_log_probs_are_those_that_training_computes(tiny, noisy_params, prompts, keys):
    model = build_model(replace(tiny, logit_softcap=3.0, sliding_window=16, layer_pattern=("local",)))
    params = noisy_params(model)
    completions = generate(model, params, prompts, sampling=SAMPLED, stop_ids=(), keys=keys)
    logits, targets, mask = full_pass(model, params, prompts, completions.tokens)
    expected = token_log_probs(logits, targets, temperature=SAMPLED.temperature)
    np.testing.assert_allclose(np.concatenate(completions.log_probs), expected[mask], rtol=1e-3, atol=1e-4)


def test_ids_beyond_the_tokenizer_are_never_generated(model, params, prompts, keys):
    """As many as 40 of the model's rows have a token; log-probs are those of training, over all rows."""
    options = {"sampling": replace(SAMPLED, top_k=None), "stop_ids": (), "vocab_size": 40}
    completions = generate(model, params, prompts, keys=keys, **options)
    assert max(map(max, completions.tokens)) < 40
    logits, targets, mask = full_pass(model, params, prompts, completions.tokens)
    expected = token_log_probs(logits, targets, temperature=SAMPLED.temperature)
    np.testing.assert_allclose(np.concatenate(completions.log_probs), expected[mask], rtol=1e-3, atol=1e-4)
    collected = collect(model, params, prompts, keys=keys, group_size=1, decode_batch_size=8, **options)
    assert collected.tokens == completions.tokens


def test_a_mesh_does_not_change_the_tokens(model, params, prompts, keys, sampled):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(params, mesh))
        completions = generate(model, split, prompts[:4], sampling=SAMPLED, stop_ids=(), keys=keys[:4])
    assert completions.tokens == sampled.tokens[:4]


# Where a completion ends


def test_a_completion_ends_with_its_first_stop_token(model, params, prompts, keys, greedy):
    stop_ids = (greedy.tokens[0][5], greedy.tokens[2][11], greedy.tokens[3][0])
    stopped = generate(model, params, prompts, sampling=GREEDY, stop_ids=stop_ids, keys=keys)
    for row, tokens in enumerate(greedy.tokens):
        end = min((tokens.index(stop) + 1 for stop in stop_ids if stop in tokens), default=len(tokens))
        assert stopped.tokens[row] == tokens[:end]
        assert stopped.stop_reasons[row] == ("stop" if set(tokens) & set(stop_ids) else "length")
        assert len(stopped.log_probs[row]) == end
    assert {"stop", "length"} == set(stopped.stop_reasons)


def test_decoding_ends_with_the_last_active_row(model, params, prompts, keys, greedy):
    assert greedy.steps == 20
    stop_ids = tuple({tokens[3] for tokens in greedy.tokens})
    stopped = generate(model, params, prompts, sampling=GREEDY, stop_ids=stop_ids, keys=keys)
    assert stopped.steps == max(map(len, stopped.tokens)) <= 4


@pytest.mark.parametrize("limit", [20, 2**31 - 1, 3 * 10**9])
def test_the_model_length_ends_a_completion(model, params, tiny, keys, limit):
    prompts = [[1] * (tiny.max_length - 1), [1] * (tiny.max_length - 3)]
    sampling = replace(GREEDY, max_new_tokens=limit)
    completions = generate(model, params, prompts, sampling=sampling, stop_ids=(), keys=keys[:2])
    assert [len(tokens) for tokens in completions.tokens] == [1, 3]
    assert completions.stop_reasons == ["length", "length"]


def test_a_stop_token_in_the_last_place_is_a_stop(model, params, prompts, keys, greedy):
    short = replace(GREEDY, max_new_tokens=1)
    completions = generate(
        model, params, prompts[:1], sampling=short, stop_ids=greedy.tokens[0][:1], keys=keys[:1]
    )
    assert completions.tokens == [greedy.tokens[0][:1]]
    assert completions.stop_reasons == ["stop"]


def test_a_stream_is_the_completion_in_chunks(model, params, prompts, keys, sampled):
    chunks = list(stream(model, params, prompts[0], sampling=SAMPLED, stop_ids=(), key=keys[0], max_steps=7))
    assert [token for chunk in chunks for token in chunk] == sampled.tokens[0]
    assert all(1 <= len(chunk) <= 7 for chunk in chunks)


# Cost


def test_batches_of_similar_shapes_share_programs(counted, params):
    model, traced = counted

    def run(lengths, max_new_tokens):
        generate(
            model,
            params,
            [[1] * length for length in lengths],
            sampling=replace(GREEDY, max_new_tokens=max_new_tokens),
            stop_ids=(),
            keys=jax.random.split(jax.random.key(0), len(lengths)),
        )

    run([33, 5, 48], 80)  # prefill at 48; decoding at 96 and 128 slots
    assert len(traced) == 3
    for lengths, max_new_tokens in [
        ([40, 40, 40], 80),
        ([48, 1, 2], 3),
        ([35, 36, 37], 20),
        ([1, 48, 3], 71),
    ]:
        run(lengths, max_new_tokens)
    assert len(traced) == 3


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (33, 48), (48, 48), (49, 64)]
)
def test_sizes_are_rounded_up_by_at_most_half(size, expected):
    assert bucket(size) == expected


def test_the_cache_is_donated(model, params):
    state = free_rows(model, 2, 32)
    decode(model, params, state, np.ones(2, bool), 2, 0, stop_ids=np.array([1], np.int32), sampling=GREEDY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


# Invalid arguments


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompts": []}, r"keys has shape \(1,\) for 0 prompts"),
        ({"prompts": [[1], [2]]}, r"keys has shape \(1,\) for 2 prompts"),
        ({"prompts": [[]]}, r"prompts\[0\] has 0 tokens, must have 1 to 255"),
        ({"prompts": [[1] * 256]}, r"prompts\[0\] has 256 tokens, must have 1 to 255"),
        ({"prompts": [[1, 512]]}, r"prompts\[0\] has token ids from 1 to 512, which must be from 0 to 511"),
        ({"prompts": [[-1, 5]]}, r"prompts\[0\] has token ids from -1 to 5, which must be from 0 to 511"),
        ({"stop_ids": (3, 600)}, r"stop_ids has token ids from 3 to 600, which must be from 0 to 511"),
    ],
)
def test_invalid_prompts_are_errors(model, params, keys, bad, message):
    good = {"prompts": [[1, 2]], "stop_ids": (), "keys": keys[:1]}
    with pytest.raises(DataError, match=message):
        generate(model, params, sampling=GREEDY, **{**good, **bad})
