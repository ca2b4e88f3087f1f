"""The SFT loss in whole train steps: loss mask, padding, packing, NEFTune, DFT."""

import functools

import jax
import numpy as np
import pytest

from jaxllm.batches import TokenBatch
from jaxllm.data.packing import pack_rows
from jaxllm.models import Transformer
from jaxllm.stages.sft import loss_fn

T, PAD = 24, 0


def texts(count=5, seed=0, longest=20):
    """Token rows, each with the second half in the loss mask."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, longest, count)
    ids = [draw.integers(1, 40, n).astype(np.int32) for n in lengths]
    return [(row, np.arange(len(row)) >= len(row) // 2) for row in ids]


def batch_of(rows, length=T, packing=False):
    data = pack_rows(rows, sequence_length=length, pad_id=PAD, packing=packing, seed=0)
    return TokenBatch(
        *(np.stack(column) for column in zip(*(data[i] for i in range(len(data))), strict=True))
    )


PLAIN = {"z_loss": 0.0, "neftune_alpha": 0.0, "dft": False}


@pytest.fixture(scope="module")
def step(model, make_step):
    return make_step(model.init, functools.partial(loss_fn, model=model, **PLAIN))


def assert_same(a, b, rtol=2e-5, atol=1e-6):
    np.testing.assert_allclose(a[0]["loss"], b[0]["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a[1], b[1])


def test_masked_targets_change_neither_loss_nor_gradient(step):
    batch = batch_of(texts())
    other = batch._replace(targets=np.where(batch.mask, batch.targets, 39 - batch.targets))
    a, b = step(batch), step(other)
    assert a[0]["loss"] == b[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_every_target_in_the_loss_mask_changes_loss_and_gradient(step):
    batch = batch_of(texts(count=2))
    before = step(batch)
    for row, position in np.argwhere(batch.mask):
        targets = batch.targets.copy()
        targets[row, position] = (targets[row, position] + 1) % 40
        after = step(batch._replace(targets=targets))
        assert after[0]["loss"] != before[0]["loss"]
        changed = jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), before[1], after[1]))
        assert any(changed)


def test_the_stop_token_is_trained_where_it_equals_the_pad_token(step):
    rows = [
        (np.append(ids, PAD).astype(np.int32), np.append(loss_mask, True))
        for ids, loss_mask in texts(count=3)
    ]
    batch = batch_of(rows)
    stops = batch.mask & (batch.targets == PAD)
    assert stops.sum() == 3  # one per text, whatever its padding
    without = batch._replace(mask=batch.mask & ~stops)
    with_stop, stop_free = step(batch), step(without)
    assert with_stop[0]["loss"] != stop_free[0]["loss"]
    a, b = (gradient["embed"]["table"][PAD] for _, gradient in (with_stop, stop_free))
    assert np.abs(a - b).max() > 1e-3  # the gradient on the stop token's logit


def test_the_amount_of_padding_changes_nothing(step):
    assert_same(step(batch_of(texts(), length=T)), step(batch_of(texts(), length=2 * T)))


def test_the_side_of_the_padding_changes_nothing(step):
    right = batch_of(texts())
    left = []
    for row in zip(*right, strict=True):
        pads = int((row[3] == 0).sum())
        left.append([np.roll(values, pads) for values in row])
    assert_same(step(right), step(TokenBatch(*map(np.stack, zip(*left, strict=True)))))


def test_packed_and_unpacked_rows_have_the_same_loss_and_gradient(step):
    rows = texts(count=7, longest=12)
    packed, unpacked = batch_of(rows, packing=True), batch_of(rows)
    assert len(packed.tokens) < len(unpacked.tokens)
    assert_same(step(packed), step(unpacked))


def test_texts_packed_in_one_row_do_not_attend_to_each_other(step):
    rows = texts(count=2, longest=12)
    changed = [(39 - rows[0][0], np.zeros_like(rows[0][1])), rows[1]]
    rows = [(rows[0][0], np.zeros_like(rows[0][1])), rows[1]]
    a, b = batch_of(rows, packing=True), batch_of(changed, packing=True)
    assert len(a.tokens) == len(b.tokens) == 1
    assert step(a)[0]["loss"] == step(b)[0]["loss"]


def test_neftune_noise_is_bounded_and_differs_by_step(params, config):
    batch, seen = batch_of(texts()), []

    class Recording(Transformer):
        def apply(self, params, tokens, *, noise, **kwargs):
            seen.append(noise)
            return super().apply(params, tokens, noise=noise, **kwargs)

    @functools.partial(jax.jit, static_argnames="alpha")
    def evaluate(seed, alpha):
        options = PLAIN | {"neftune_alpha": alpha}
        loss, _ = loss_fn(params, batch, jax.random.key(seed), model=Recording(config), **options)
        return loss.mean, seen.pop()

    losses, noise = zip(
        *(evaluate(*case) for case in [(0, 0.0), (1, 0.0), (0, 5.0), (0, 5.0), (1, 5.0)]), strict=True
    )
    assert losses[0] == losses[1] != losses[2] == losses[3] != losses[4]
    bound = 5.0 / np.sqrt(T * config.width)
    assert 0.95 * bound < np.abs(noise[2]).max() <= bound


def test_dft_weights_each_token_by_its_probability_without_its_gradient(model, params):
    batch = batch_of(texts(count=1))

    @jax.jit
    def evaluate(params):
        logits = model.logits(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        return jax.nn.log_softmax(logits)[0], *mean(params, batch, dft=True)

    def mean(params, batch, dft):
        loss, metrics = loss_fn(params, batch, jax.random.key(0), model=model, **PLAIN | {"dft": dft})
        return loss.mean, metrics["loss"].mean

    log_probs, loss, cross_entropy = evaluate(params)
    log_probs = np.asarray(log_probs)[np.arange(T), batch.targets[0]][batch.mask[0]]
    np.testing.assert_allclose(loss, (-np.exp(log_probs) * log_probs).mean(), rtol=1e-5)
    np.testing.assert_allclose(cross_entropy, -log_probs.mean(), rtol=1e-5)

    # For a single token, the gradient is that of its cross-entropy times its probability.
    only = batch.mask & (np.cumsum(batch.mask, axis=1) == 1)
    one = batch._replace(mask=only)
    plain, weighted = jax.jit(
        lambda p: [jax.grad(mean, has_aux=True)(p, one, dft)[0] for dft in (False, True)]
    )(params)
    jax.tree.map(
        lambda w, p: np.testing.assert_allclose(w, np.exp(log_probs[0]) * p, rtol=1e-3, atol=1e-7),
        weighted,
        plain,
    )
