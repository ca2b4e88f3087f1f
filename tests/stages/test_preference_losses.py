"""The losses of the reward model and of DPO in whole train steps."""

import functools

import jax
import jax.numpy as jnp
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


@pytest.fixture(scope="module")
def scalar_params(scalar_model):
    """Parameters with a random head instead of zeros, so that rewards differ."""
    params = jax.jit(scalar_model.init)(jax.random.key(0))
    kernel = params["scalar_head"]["kernel"]
    return params | {"scalar_head": {"kernel": jax.random.normal(jax.random.key(1), kernel.shape)}}


@pytest.fixture(scope="module")
def reward_step(scalar_model, make_step):
    loss = functools.partial(reward_model.loss_fn, model=scalar_model, center_coefficient=0.01)
    return make_step(scalar_model.init, loss)


@pytest.fixture
def step(reward_step, scalar_params):
    return functools.partial(reward_step, params=scalar_params)


# The reward model


def test_an_untrained_reward_model_has_loss_log_2(reward_step):
    metrics, _ = reward_step(pairs())
    assert metrics["loss"] == pytest.approx(np.log(2))
    assert metrics["margin"] == 0


def test_the_loss_is_bradley_terry_of_the_rewards_at_the_last_tokens(step, scalar_model, scalar_params):
    batch = pairs()
    values = jax.jit(scalar_model.apply)(scalar_params, batch.tokens.reshape(-1, T)).values.reshape(-1, 2, T)
    rewards = np.take_along_axis(np.asarray(values), batch.lengths[..., None] - 1, axis=2)[..., 0]
    expected, _ = bradley_terry_loss(rewards[:, 0], rewards[:, 1], center_coefficient=0.01)
    np.testing.assert_allclose(step(batch)[0]["loss"], expected.mean, rtol=1e-5)


def test_padding_changes_neither_reward_nor_gradient(step):
    batch = pairs()
    a, b = step(batch), step(pairs(pad=17))
    assert a[0]["loss"] == b[0]["loss"]
    longer = step(pairs(length=2 * T))
    np.testing.assert_allclose(longer[0]["loss"], a[0]["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), longer[1], a[1])


@pytest.mark.parametrize("end_of_text", [0, 2])
def test_an_end_of_text_inside_the_prompt_does_not_move_the_position_of_the_reward(
    scalar_model, scalar_params, end_of_text
):
    batch = pairs()
    batch.tokens[:, :, 1] = end_of_text
    values = jax.jit(scalar_model.apply)(scalar_params, batch.tokens.reshape(-1, T)).values.reshape(-1, 2, T)
    found = np.asarray(jax.jit(scalar_model.rewards)(scalar_params, batch.tokens, batch.lengths).values)
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


@pytest.fixture(scope="module")
def reference(model):
    """The parameters of another model than the policy."""
    return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def dpo_step(model, make_step):
    return make_step(model.init, functools.partial(dpo.loss_fn, model=model, **OPTIONS))


def with_reference(batch, model, reference):
    return batch._replace(ref_log_probs=np.asarray(dpo.score_batch(reference, batch, model=model)))


def test_the_loss_is_log_2_and_the_margin_0_where_policy_and_reference_agree(model, params):
    @jax.jit
    def evaluate(params):
        batch = pairs()
        agreed = batch._replace(ref_log_probs=dpo.completion_log_probs(params, batch, model=model)[0])
        return dpo.loss_fn(params, agreed, None, model=model, **OPTIONS)

    loss, metrics = evaluate(params)
    assert float(loss.mean) == pytest.approx(np.log(2), rel=1e-7)
    assert float(metrics["rewards/margins"].mean) == 0
    assert float(metrics["rewards/accuracies"].mean) == 0  # a tie counts as wrong


def test_log_probs_are_those_of_the_completion_with_its_last_token(model, params):
    batch = pairs()
    found = dpo.score_batch(params, batch, model=model)
    log_probs = jax.jit(lambda params, rows: jax.nn.log_softmax(model.logits(params, rows)))
    every = np.asarray(log_probs(params, batch.tokens.reshape(-1, T))).reshape(-1, 2, T, 40)
    for pair, side in np.ndindex(found.shape):
        row = batch.tokens[pair, side]
        completion = range(batch.prompt_lengths[pair], batch.lengths[pair, side])
        expected = sum(every[pair, side, t - 1, row[t]] for t in completion)
        np.testing.assert_allclose(found[pair, side], expected, rtol=1e-5)


def test_padding_does_not_change_dpo(model, reference, dpo_step):
    batches = (pairs(), pairs(pad=9), pairs(length=2 * T))
    first, *others = (dpo_step(with_reference(batch, model, reference)) for batch in batches)
    for other in others:
        np.testing.assert_allclose(other[0]["loss"], first[0]["loss"], rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6), other[1], first[1])


def test_the_loss_is_on_both_completions_and_not_on_the_prompt(model, reference, dpo_step):
    batch = pairs()
    _, gradient = dpo_step(with_reference(batch, model, reference))
    for side in (0, 1):
        one_empty = batch._replace(lengths=batch.lengths.copy())
        one_empty.lengths[:, side] = batch.prompt_lengths
        _, other = dpo_step(with_reference(one_empty, model, reference))
        differ = jax.tree.map(lambda x, y: bool(np.abs(x - y).max() > 1e-5), gradient, other)
        assert any(jax.tree.leaves(differ))
    neither = batch._replace(lengths=np.stack([batch.prompt_lengths] * 2, axis=1))
    _, nothing = dpo_step(with_reference(neither, model, reference))
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(nothing))


def test_a_step_raises_the_chosen_log_prob_over_the_rejected_one(model, params, dpo_step):
    batch = with_reference(pairs(), model, params)
    _, gradient = dpo_step(batch, params)
    after = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    moved = np.asarray(dpo.score_batch(after, batch, model=model)) - batch.ref_log_probs
    assert (moved[:, 0] > moved[:, 1]).all()


def test_every_variant_trains(model, params, reference):
    batch = with_reference(pairs(), model, reference)
    variants = ("robust", "hinge", "ipo", "apo_zero", "sppo")

    def losses(params):
        for variant in variants:
            options = OPTIONS | {"variant": variant, "length_normalized": variant == "ipo"}
            yield dpo.loss_fn(params, batch, None, model=model, **options)[0].mean

    gradients = jax.jit(jax.jacrev(lambda params: jnp.stack(list(losses(params)))))(params)
    for variant, *gradient in zip(variants, *jax.tree.leaves(gradients), strict=True):
        assert all(np.isfinite(leaf).all() for leaf in gradient), variant
        assert any(np.abs(leaf).max() for leaf in gradient), variant
