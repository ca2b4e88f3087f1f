"""The losses of the reward model and of DPO in whole train steps."""

import functools

import jax
import numpy as np
import pytest

from jaxllm.batches import PairBatch
from jaxllm.losses import bradley_terry_loss
from jaxllm.stages import dpo, reward_model

T = 24


def pairs(count=4, length=T, seed=0, pad=0):
    """Prompts with two completions each, padded on the right."""
    draw = np.random.default_rng(seed)
    tokens = np.full((count, 2, length), pad, np.int32)
    prompt_lengths = draw.integers(2, 8, count).astype(np.int32)
    lengths = prompt_lengths[:, None] + draw.integers(2, 10, (count, 2)).astype(np.int32)
    for pair, prompt, ends in zip(tokens, prompt_lengths, lengths, strict=True):
        pair[:, :prompt] = draw.integers(1, 40, prompt)
        for side, end in zip(pair, ends, strict=True):
            side[prompt:end] = draw.integers(1, 40, end - prompt)
    ones = np.ones(count, np.float32)
    return PairBatch(tokens, prompt_lengths, lengths, 0 * ones, ones, np.zeros((count, 2), np.float32))


def with_random_head(scalar_model, seed=0):
    """Parameters with a random head instead of zeros, so that rewards differ."""
    params = scalar_model.init(jax.random.key(seed))
    kernel = params["scalar_head"]["kernel"]
    return params | {"scalar_head": {"kernel": jax.random.normal(jax.random.key(seed + 1), kernel.shape)}}


@pytest.fixture
def step(scalar_model, take_step):
    def run(batch, center_coefficient=0.0):
        loss = functools.partial(
            reward_model.loss_fn, model=scalar_model, center_coefficient=center_coefficient
        )
        return take_step(scalar_model.init, loss, batch, params=with_random_head(scalar_model))

    return run


# The reward model


def test_an_untrained_reward_model_has_loss_log_2(scalar_model):
    batch = pairs()
    loss, metrics = reward_model.loss_fn(
        scalar_model.init(jax.random.key(0)), batch, None, model=scalar_model, center_coefficient=0.01
    )
    assert float(loss.mean) == pytest.approx(np.log(2))
    assert float(metrics["margin"].mean) == 0


def test_the_loss_is_bradley_terry_of_the_rewards_at_the_last_tokens(step, scalar_model):
    batch, params = pairs(), with_random_head(scalar_model)
    values = scalar_model.apply(params, batch.tokens.reshape(-1, T)).values.reshape(-1, 2, T)
    rewards = np.take_along_axis(np.asarray(values), batch.lengths[..., None] - 1, axis=2)[..., 0]
    expected, _ = bradley_terry_loss(rewards[:, 0], rewards[:, 1], center_coefficient=0.01)
    np.testing.assert_allclose(step(batch, 0.01)[0]["loss"], expected.mean, rtol=1e-5)


def test_padding_changes_neither_reward_nor_gradient(step):
    batch = pairs()
    a, b = step(batch), step(pairs(pad=17))
    assert a[0]["loss"] == b[0]["loss"]
    longer = step(pairs(length=2 * T))
    np.testing.assert_allclose(longer[0]["loss"], a[0]["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), longer[1], a[1])


@pytest.mark.parametrize("end_of_text", [0, 2])
def test_an_end_of_text_inside_the_prompt_does_not_move_the_position_of_the_reward(scalar_model, end_of_text):
    batch, params = pairs(count=2), with_random_head(scalar_model)
    batch.tokens[:, :, 1] = end_of_text
    values = np.asarray(scalar_model.apply(params, batch.tokens.reshape(-1, T)).values).reshape(-1, 2, T)
    found = np.asarray(scalar_model.rewards(params, batch.tokens, batch.lengths).values)
    np.testing.assert_allclose(
        found, np.take_along_axis(values, batch.lengths[..., None] - 1, axis=2)[..., 0], rtol=1e-5, atol=1e-6
    )
    assert np.abs(found - values[:, :, 1]).min() > 1e-3  # not at the position of the end of text


def test_a_pair_of_weight_2_counts_twice(step):
    batch = pairs(count=3)
    twice = PairBatch(*(np.concatenate([field, field[:1]]) for field in batch))
    weighted = batch._replace(weight=np.array([2, 1, 1], np.float32))
    a, b = step(twice), step(weighted)
    np.testing.assert_allclose(a[0]["loss"], b[0]["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a[1], b[1])
    without = step(PairBatch(*(field[:2] for field in batch)))
    nothing = step(batch._replace(weight=np.array([1, 1, 0], np.float32)))
    np.testing.assert_allclose(nothing[0]["loss"], without[0]["loss"], rtol=1e-5)


def test_a_margin_raises_the_loss(step):
    batch = pairs()
    assert step(batch._replace(margin=np.full(4, 2.0, np.float32)))[0]["loss"] > step(batch)[0]["loss"]


# DPO

OPTIONS = {"beta": 0.1, "variant": "sigmoid", "label_smoothing": 0.0, "length_normalized": False}


def with_reference(batch, model, params):
    return batch._replace(ref_log_probs=np.asarray(dpo.completion_log_probs(params, batch, model=model)[0]))


def test_the_loss_is_log_2_and_the_margin_0_where_policy_and_reference_agree(model):
    params, batch = model.init(jax.random.key(0)), pairs()
    batch = with_reference(batch, model, params)
    loss, metrics = dpo.loss_fn(params, batch, None, model=model, **OPTIONS)
    assert float(loss.mean) == pytest.approx(np.log(2), rel=1e-7)
    assert float(metrics["rewards/margins"].mean) == 0
    assert float(metrics["rewards/accuracies"].mean) == 0  # a tie counts as wrong


def test_log_probs_are_those_of_the_completion_with_its_last_token(model):
    params, batch = model.init(jax.random.key(0)), pairs(count=2)
    found = np.asarray(dpo.completion_log_probs(params, batch, model=model)[0])
    for pair, side in np.ndindex(2, 2):
        end = batch.lengths[pair, side]
        row = batch.tokens[pair, side, :end]
        log_probs = np.asarray(jax.nn.log_softmax(model.logits(params, row[None])))[0]
        expected = sum(log_probs[t - 1, row[t]] for t in range(batch.prompt_lengths[pair], end))
        np.testing.assert_allclose(found[pair, side], expected, rtol=1e-5)


def test_padding_does_not_change_dpo(model, take_step):
    params = model.init(jax.random.key(1))
    loss = functools.partial(dpo.loss_fn, model=model, **OPTIONS)
    results = []
    for batch in (pairs(), pairs(pad=9), pairs(length=2 * T)):
        results.append(take_step(model.init, loss, with_reference(batch, model, params)))
    for other in results[1:]:
        np.testing.assert_allclose(other[0]["loss"], results[0][0]["loss"], rtol=1e-5)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6), other[1], results[0][1]
        )


def test_the_loss_is_on_both_completions_and_not_on_the_prompt(model, take_step):
    params, batch = model.init(jax.random.key(1)), pairs(count=1)
    loss = functools.partial(dpo.loss_fn, model=model, **OPTIONS)
    _, gradient = take_step(model.init, loss, with_reference(batch, model, params))
    rejected_only = batch._replace(lengths=batch.lengths.copy())
    rejected_only.lengths[0, 0] = batch.prompt_lengths[0]  # an empty chosen completion
    _, other = take_step(model.init, loss, with_reference(rejected_only, model, params))
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.abs(x - y).max() > 1e-5), gradient, other)))
    neither = batch._replace(lengths=np.stack([batch.prompt_lengths] * 2, axis=1))
    _, nothing = take_step(model.init, loss, with_reference(neither, model, params))
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(nothing))


def test_a_step_raises_the_chosen_log_prob_over_the_rejected_one(model, take_step):
    params, batch = model.init(jax.random.key(0)), pairs()
    batch = with_reference(batch, model, params)
    loss = functools.partial(dpo.loss_fn, model=model, **OPTIONS)
    _, gradient = take_step(model.init, loss, batch, params=params)
    after = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    moved = np.asarray(dpo.completion_log_probs(after, batch, model=model)[0]) - batch.ref_log_probs
    assert (moved[:, 0] > moved[:, 1]).all()


@pytest.mark.parametrize("variant", ["robust", "hinge", "ipo", "apo_zero", "sppo"])
def test_every_variant_trains(model, take_step, variant):
    params = model.init(jax.random.key(1))
    options = OPTIONS | {"variant": variant, "length_normalized": variant == "ipo"}
    loss = functools.partial(dpo.loss_fn, model=model, **options)
    metrics, _ = take_step(model.init, loss, with_reference(pairs(), model, params))
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
