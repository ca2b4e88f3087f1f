"""Prefill gives the cache that decoding at given positions gives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import build_model


@pytest.mark.parametrize("window", [None, 3])
def test_prefill_equals_decoding_at_given_positions(tiny, window):
    model = build_model(
        replace(tiny, sliding_window=window, layer_pattern=("local" if window else "global",))
    )
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, tiny.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    apply = jax.jit(model.apply)
    prefilled = apply(params, tokens, cache=model.init_cache(2, 9))
    decoded = apply(params, tokens, positions=positions, cache=model.init_cache(2, 9))
    np.testing.assert_allclose(prefilled.hidden, decoded.hidden, atol=1e-5)
    for a, b in zip(jax.tree.leaves(prefilled.cache), jax.tree.leaves(decoded.cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert not np.asarray(a)[:, :, 7:].any()
        assert np.asarray(a)[:, :, :7].any(axis=-1).all()


def test_unembed_is_the_head_and_its_softcap(tiny):
    model = build_model(replace(tiny, logit_softcap=2.0))
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = 50 * jax.random.normal(jax.random.key(1), (3, tiny.width))
    plain = np.asarray(hidden, np.float64) @ np.asarray(model.head(params), np.float64)
    np.testing.assert_allclose(model.unembed(params, hidden), 2 * np.tanh(plain / 2), atol=1e-4)
    assert np.abs(plain).max() > 2  # so the softcap matters
