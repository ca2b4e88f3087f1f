"""The scalar head: a value for every position, the reward at the last real token."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import build_model, build_scalar_model

LENGTH = 12


@pytest.fixture(scope="module")
def scalar(tiny):
    """Compiled values and rewards, and parameters with a head that is not zero."""
    model = build_scalar_model(tiny)
    head = {"kernel": jax.random.normal(jax.random.key(9), (tiny.width, 1))}
    params = jax.jit(model.init)(jax.random.key(0)) | {"scalar_head": head}

    @jax.jit
    def values(params, tokens, **kwargs):
        return model.apply(params, tokens, **kwargs).values

    return values, jax.jit(lambda *args: model.rewards(*args).values), params


def random_tokens(config, *shape):
    return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize("tied", [True, False])
def test_its_decoder_is_a_language_model_s_without_the_vocabulary_head(tiny, tied):
    config = replace(tiny, tie_embeddings=tied)
    key = jax.random.key(3)
    decoder, scalar = (jax.jit(build(config).init)(key) for build in (build_model, build_scalar_model))
    head = scalar.pop("scalar_head")
    decoder.pop("head", None)
    jax.tree.map(np.testing.assert_array_equal, scalar, decoder)
    assert jax.tree.map(jnp.shape, head) == {"kernel": (tiny.width, 1)}


def test_initial_values_are_zero(tiny, scalar):
    apply, _, _ = scalar
    params = jax.jit(build_scalar_model(tiny).init)(jax.random.key(0))
    values = apply(params, random_tokens(tiny, 2, LENGTH))
    np.testing.assert_array_equal(values, np.zeros((2, LENGTH)))


def test_values_are_the_head_times_the_states(tiny, scalar):
    apply, _, params = scalar
    tokens = random_tokens(tiny, 2, LENGTH)
    hidden = jax.jit(build_model(tiny).apply)(params, tokens).hidden
    expected = np.asarray(hidden) @ np.asarray(params["scalar_head"]["kernel"])[:, 0]
    np.testing.assert_allclose(apply(params, tokens), expected, rtol=1e-4, atol=1e-5)


def test_packed_texts_have_the_values_of_each_alone(tiny, scalar):
    apply, _, params = scalar
    tokens = random_tokens(tiny, 1, LENGTH)
    segment_ids, positions = np.array([[1] * 5 + [2] * 7]), np.array([[*range(5), *range(7)]])
    packed = apply(params, tokens, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(packed[:, 5:], apply(params, tokens[:, 5:]), rtol=1e-4, atol=1e-5)


def test_a_reward_is_the_value_at_the_last_real_token_whatever_the_leading_axes(tiny, scalar):
    apply, rewards, params = scalar
    tokens, lengths = random_tokens(tiny, 3, 2, LENGTH), np.array([[1, LENGTH], [4, 7], [12, 2]])
    values = np.asarray(apply(params, tokens.reshape(6, LENGTH))).reshape(3, 2, LENGTH)
    expected = np.take_along_axis(values, lengths[..., None] - 1, axis=2)[..., 0]
    np.testing.assert_allclose(rewards(params, tokens, lengths), expected, rtol=1e-5, atol=1e-6)
    first = rewards(params, tokens[:, 0], lengths[:, 0])
    np.testing.assert_allclose(first, expected[:, 0], rtol=1e-5, atol=1e-6)


def test_values_are_float32_in_bfloat16_too(tiny):
    model = build_scalar_model(replace(tiny, compute_dtype="bfloat16", param_dtype="bfloat16"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert params["scalar_head"]["kernel"].dtype == jnp.bfloat16
    tokens, lengths = random_tokens(tiny, 1, LENGTH), np.array([3])
    assert jax.eval_shape(model.apply, params, tokens).values.dtype == jnp.float32
    assert jax.eval_shape(model.rewards, params, tokens, lengths).values.dtype == jnp.float32


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_last_of_unrolled_blocks_computes_only_the_tokens_of_the_rewards(tiny, scalar, remat):
    params = scalar[2]
    model = build_scalar_model(replace(tiny, scan_layers=False, remat=remat))
    tokens, lengths = random_tokens(tiny, 3, LENGTH), np.array([1, 7, LENGTH])

    def of_all(params):
        return jnp.take_along_axis(model.apply(params, tokens).values, lengths[:, None] - 1, axis=1)[:, 0]

    def of_last(params):
        return model.rewards(params, tokens, lengths).values

    def compiled(rewards):
        return (
            jax.jit(jax.value_and_grad(lambda params: jnp.square(rewards(params)).sum()))
            .lower(params)
            .compile()
        )

    all_tokens, last_tokens = compiled(of_all), compiled(of_last)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), last_tokens(params), all_tokens(params)
    )
    assert (
        last_tokens.cost_analysis()["flops"]
        < (1 - 0.5 / tiny.num_layers) * all_tokens.cost_analysis()["flops"]
    )
