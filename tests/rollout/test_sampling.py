"""Which tokens can be sampled, how often, and with what log-prob."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.losses.language_model import token_log_probs
from jaxllm.rollout.sampling import (
    SamplingConfig,
    min_p,
    row_sampling,
    sample,
    sample_rows,
    top_k,
    top_p,
)

PLAIN = SamplingConfig(temperature=1.0, top_k=None, top_p=None, min_p=None, max_new_tokens=8)
draw = jax.jit(sample, static_argnames="config")


def random_logits(rows=6, vocabulary=41):
    """Logits of both signs, from a nearly flat row to a peaked one."""
    scale = np.geomspace(0.1, 20, rows)[:, None]
    return jnp.array(np.random.default_rng(0).normal(size=(rows, vocabulary)) * scale, jnp.float32)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kept(filtered, logits):
    """Which tokens a filter keeps; their logits must be unchanged."""
    left = np.isfinite(filtered)
    np.testing.assert_array_equal(np.asarray(filtered)[left], np.asarray(logits)[left])
    return left


# Filters


@pytest.mark.parametrize("k", [1, 2, 7, 40, 41, 1000])
def test_top_k_keeps_the_k_largest(k):
    logits = random_logits()
    ranks = np.argsort(np.argsort(-np.asarray(logits), axis=-1), axis=-1)
    np.testing.assert_array_equal(kept(top_k(logits, k), logits), ranks < k)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_most_likely_tokens_until_their_sum_reaches_p(p):
    logits = random_logits()
    expected = np.zeros(logits.shape, bool)
    for row, probabilities in enumerate(softmax(logits)):
        total = 0.0
        for token in np.argsort(-probabilities):
            if total < p:
                expected[row, token] = True
            total += probabilities[token]
    np.testing.assert_array_equal(kept(top_p(logits, p), logits), expected)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_keeps_tokens_by_their_ratio_to_the_most_likely(p):
    logits = random_logits()
    probabilities = softmax(logits)
    expected = probabilities >= p * probabilities.max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(kept(min_p(logits, p), logits), expected)


def test_top_p_of_one_keeps_tokens_whose_probability_rounds_to_0():
    logits = jnp.array([[30.0, 0.0, -50.0]])
    assert kept(top_p(logits, 1.0), logits).all()


def test_ties_with_the_last_token_kept_are_kept():
    logits = jnp.log(jnp.array([[0.2, 0.4, 0.2, 0.2]]))
    assert kept(top_k(logits, 2), logits).all()
    assert kept(top_p(logits, 0.5), logits).all()


def test_a_filter_keeps_dropped_tokens_dropped():
    logits = jnp.array([[-jnp.inf, 1.0, -jnp.inf, 2.0]])
    for filtered in (top_k(logits, 4), top_p(logits, 1.0), min_p(logits, 0.0)):
        assert np.isfinite(filtered).tolist() == [[False, True, False, True]]


# Samples


def draws(logits, config, number=40_000):
    """How often each token of one row of logits is sampled."""
    keys = jax.random.split(jax.random.key(0), number)
    tokens, _ = draw(jnp.tile(logits, (number, 1)), keys, config)
    return np.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, [0.4, 0.3, 0.2, 0.1]),
        (replace(PLAIN, temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (replace(PLAIN, top_k=3), [4 / 9, 3 / 9, 2 / 9, 0]),
        (replace(PLAIN, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (replace(PLAIN, min_p=0.3), [4 / 9, 3 / 9, 2 / 9, 0]),
        # Top-p sums probabilities normalized after top-k: 4/9 + 3/9 reaches 0.75, where 0.4 + 0.3 would not.
        (replace(PLAIN, top_k=3, top_p=0.75), [4 / 7, 3 / 7, 0, 0]),
        # The temperature comes first: 0.4 + 0.3 would reach 0.65, but at temperature 2 that is 0.33 + 0.28.
        (replace(PLAIN, temperature=2.0, top_p=0.65), [0.388, 0.336, 0.275, 0]),
    ],
)
def test_tokens_are_sampled_by_their_probability(config, expected):
    counts = draws(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), config)
    expected = np.array(expected)
    assert counts[expected == 0].sum() == 0
    expected = expected[expected > 0] * counts.sum() / expected.sum()
    chi_squared = np.sum((counts[: len(expected)] - expected) ** 2 / expected)
    assert chi_squared < 17  # at most 3 degrees of freedom: exceeded once in 1400 seeds


def test_a_large_vocabulary_is_sampled_by_its_probabilities():
    """Over several blocks of tokens, with blocks and tokens that never occur."""
    logits = 2 * jax.random.normal(jax.random.key(3), (700,))
    logits = logits.at[130:390].set(-jnp.inf).at[::7].set(-jnp.inf)
    counts = draws(logits, PLAIN, number=100_000)
    expected = np.asarray(jax.nn.softmax(logits)) * counts.sum()
    assert len(counts) == 700
    assert counts[expected == 0].sum() == 0
    often = expected > 5
    chi_squared = np.sum((counts[often] - expected[often]) ** 2 / expected[often])
    assert abs(chi_squared - often.sum()) < 4 * np.sqrt(2 * often.sum())


def test_a_row_of_nan_draws_a_token_that_exists():
    tokens, _ = draw(jnp.full((3, 130), jnp.nan), jax.random.split(jax.random.key(0), 3), PLAIN)
    assert (np.asarray(tokens) < 130).all()


def test_a_row_is_sampled_by_its_own_key_whatever_the_batch():
    logits, keys = random_logits(), jax.random.split(jax.random.key(1), 6)
    tokens, log_probs = draw(logits, keys, PLAIN)
    for row in (0, 3):
        alone_tokens, alone_log_probs = draw(logits[row : row + 1], keys[row : row + 1], PLAIN)
        assert alone_tokens[0] == tokens[row]
        np.testing.assert_allclose(alone_log_probs[0], log_probs[row], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-39, 9e-6])  # by the second, float32 logits overflow
def test_temperature_zero_is_greedy_whatever_the_key(temperature):
    logits, keys, config = random_logits(), jax.random.split(jax.random.key(2), 6), replace(PLAIN, top_p=0.9)
    config = replace(config, temperature=temperature)
    assert config.greedy
    tokens, log_probs = draw(logits, keys, config)
    np.testing.assert_array_equal(sample_rows(logits, keys, row_sampling([config] * 6, 41)), tokens)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(log_probs, np.log(softmax(logits).max(axis=-1)), rtol=1e-5, atol=1e-6)


def test_the_lowest_temperature_that_is_not_greedy_gives_finite_log_probs():
    config = replace(PLAIN, temperature=1e-5)
    assert not config.greedy
    tokens, log_probs = draw(random_logits(), jax.random.split(jax.random.key(2), 6), config)
    np.testing.assert_array_equal(tokens, np.argmax(random_logits(), axis=-1))
    np.testing.assert_allclose(log_probs, 0)


def test_a_filter_that_drops_nothing_is_none():
    assert replace(PLAIN, top_p=1.0, min_p=0.0).filters == {}
    assert replace(PLAIN, top_k=5, top_p=0.5, min_p=0.1).filters == {"top_k": 5, "top_p": 0.5, "min_p": 0.1}


def test_the_log_prob_includes_the_temperature_but_not_the_filters():
    config = replace(PLAIN, temperature=1.5, top_k=5, top_p=0.8, min_p=0.1)
    logits = random_logits()
    tokens, log_probs = draw(logits.astype(jnp.bfloat16), jax.random.split(jax.random.key(3), 6), config)
    expected = np.log(softmax(np.float32(logits.astype(jnp.bfloat16)) / 1.5))[np.arange(6), tokens]
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("max_new_tokens", 0),
    ],
)
def test_an_invalid_value_is_named(field, value):
    with pytest.raises(ConfigError, match=rf"sampling\.{field}={value} must be"):
        replace(PLAIN, **{field: value})


# Embeddings with more rows than the tokenizer has tokens


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, temperature=0.7, top_k=5),
        replace(PLAIN, top_p=0.9),
        replace(PLAIN, min_p=0.05),
    ],
)
def test_rows_beyond_the_tokenizer_are_never_drawn_and_change_no_log_prob(config):
    """The log-prob has the normalizer of all rows, as the trainer's, the reference's and the loss's have."""
    logits = jnp.tile(random_logits(), (50, 1)).at[:, 30:].add(20.0)  # the padding is what would be drawn
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens, log_probs = sample(logits, keys, config, vocab_size=30)
    assert tokens.max() < 30
    assert len(set(tokens.tolist())) > 5
    expected = token_log_probs(logits[:, None], tokens[:, None], temperature=config.temperature or 1.0)
    np.testing.assert_array_equal(log_probs, expected[:, 0])
    rows = row_sampling([config] * len(logits), logits.shape[-1])
    np.testing.assert_array_equal(sample_rows(logits, keys, rows, vocab_size=30), tokens)


def test_without_such_rows_nothing_changes():
    logits, keys = random_logits(), jax.random.split(jax.random.key(0), 6)
    for vocab_size in (41, 60):
        np.testing.assert_array_equal(sample(logits, keys, PLAIN, vocab_size), sample(logits, keys, PLAIN))
        programs = {
            jax.jit(sample, static_argnums=(2, 3)).lower(logits, keys, PLAIN, size).as_text()
            for size in (None, vocab_size)
        }
        assert len(programs) == 1
