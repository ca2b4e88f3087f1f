"""Held-out loss and bits per byte against sums worked out from dense logits."""

import functools

import jax
import numpy as np
import pytest

from configs.base.models import model
from jaxllm.batches import TokenBatch
from jaxllm.config import parse
from jaxllm.evaluation.perplexity import evaluate, ratio, row_sums
from jaxllm.models import ModelConfig, build_model

BYTES = np.arange(512, dtype=np.int32) % 5  # of each token; some stand for no text


@pytest.fixture(scope="module")
def setup():
    decoder = build_model(parse(ModelConfig, model("tiny")))
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 512, (6, 17)).astype(np.int32)
    shape = (6, 16)
    batch = TokenBatch(
        tokens[:, :-1],
        tokens[:, 1:],
        draw.random(shape) < 0.7,
        np.ones(shape, np.int32),
        np.broadcast_to(np.arange(16, dtype=np.int32), shape),
    )
    score = jax.jit(functools.partial(row_sums, byte_lengths=BYTES, model=decoder))
    return decoder, jax.jit(decoder.init)(jax.random.key(0)), batch, score


def test_loss_bits_and_accuracy_are_those_of_the_dense_logits(setup):
    decoder, params, batch, score = setup
    log_probs = np.asarray(jax.nn.log_softmax(jax.jit(decoder.logits)(params, batch.tokens)), np.float64)
    nats = -np.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0][batch.mask]
    found = evaluate(params, [batch], score, lambda: None)
    assert found["eval/loss"] == pytest.approx(nats.mean(), rel=1e-5)
    num_bytes = BYTES[batch.targets[batch.mask]].sum()
    assert found["eval/bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / num_bytes, rel=1e-5)
    right = (log_probs.argmax(-1) == batch.targets)[batch.mask]
    assert found["eval/accuracy"] == pytest.approx(right.mean(), abs=1e-6)


def test_rows_that_fill_a_batch_change_nothing(setup):
    _, params, batch, score = setup
    filler = jax.tree.map(np.zeros_like, batch)
    plain = evaluate(params, [batch], score, lambda: None)
    assert evaluate(params, [batch, filler], score, lambda: None) == plain


def test_check_may_end_it_between_batches(setup):
    _, params, batch, score = setup
    calls = iter([None, None, KeyError])

    def check():
        if (error := next(calls)) is not None:
            raise error

    with pytest.raises(KeyError):
        evaluate(params, [batch] * 5, score, check)
    assert next(calls, "spent") == "spent"


def test_standard_error_of_equal_rows_is_that_of_a_mean():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    mean, error = ratio(values * 10, np.full(4, 10.0))
    assert mean == 3.0
    assert error == pytest.approx(values.std(ddof=1) / 2)


def test_standard_error_covers_the_truth_as_often_as_it_should():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        lengths = draw.integers(5, 50, 100).astype(float)
        mean, error = ratio(2.0 * lengths + draw.normal(size=100) * lengths**0.5, lengths)
        hits += abs(mean - 2.0) < 2 * error
    assert 460 <= hits <= 490  # 95.4% of 500 is 477
