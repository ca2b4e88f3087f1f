"""Groups of equal rewards are left out of GRPO's updates, and these stay the same."""

import jax
import numpy as np
import pytest
from tiny_runs import parse_config

from jaxllm.batches import RolloutBatch
from jaxllm.losses.aggregate import MODES, aggregate, row_weights
from jaxllm.losses.grpo import MODES as VARIANTS
from jaxllm.rl.rollouts import select
from jaxllm.stages import build_program
from jaxllm.stages.grpo import leaves_out_rows
from jaxllm.training.state import split_params
from jaxllm.training.step import gradient_sums

B, T = 16, 32
NAN = np.nan


def make_program(variant):
    fields = {
        "objective.variant": variant,
        "training.num_microbatches": 4,
        "training.steps": 4,
        "data.sequence_length": T,
        "rollout.num_prompts": 4,
        "rollout.group_size": 4,
        "rollout.num_minibatches": 1,
        "rollout.sampling.max_new_tokens": 16,
        "model.num_layers": 1,
        "mesh.data": 1,
    }
    return build_program(parse_config("grpo_problems.py:tiny", fields), jax.devices()[:1])


def make_batch():
    """Four groups of four, the second and the last of equal rewards."""
    draw = np.random.default_rng(0)
    starts, lengths = draw.integers(1, 8, B), draw.integers(1, 16, B)
    positions = np.arange(T)
    mask = (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
    log_probs = np.where(mask, -6 + 0.1 * draw.normal(size=(B, T)), 0).astype(np.float32)
    advantages = np.repeat(np.array([1, 0, 1, 0]), 4) * np.tile([1.0, -1, 0.5, -0.5], 4)
    tokens = draw.integers(0, 512, (B, T)).astype(np.int32)
    return RolloutBatch(tokens, mask, log_probs, advantages.astype(np.float32))


def gradient(program, params, batch):
    """Of the mean loss, and the weight of the loss."""
    loss_fn = program.train_step.keywords["loss_fn"]

    @jax.jit
    def compute(params, batch):
        grads, loss, _ = gradient_sums(
            loss_fn, *split_params(params, ""), batch, jax.random.key(0), num_microbatches=1
        )
        return jax.tree.map(lambda x: x / loss.weight, grads), loss.weight

    return compute(params, batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_without_them_is_the_same(variant):
    fields, program = make_batch(), make_program(variant)
    params = program.init(jax.random.key(0)).params
    expected, weight = gradient(program, params, fields)
    own = row_weights(fields.mask, VARIANTS[variant], max_length=16)
    weights = np.where(fields.advantages != 0, NAN, own)
    batch = select(fields, np.random.default_rng(1).permutation(B), weights, 4)
    assert len(batch.tokens) == 8
    found, found_weight = gradient(program, params, batch)
    assert float(found_weight) == pytest.approx(float(weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(found)) > 1e-4


def test_rows_that_fill_up_a_microbatch_are_kept():
    fields, weights = make_batch(), np.full(B, 2.0, np.float32)
    weights[5] = NAN
    batch = select(fields, np.arange(B), weights, 4)
    assert len(batch.tokens) == 4
    assert (batch.tokens[0] == fields.tokens[5]).all()
    assert batch.extra_weight.sum() == 2.0 * 12
    assert len(select(fields, np.arange(B), np.full(B, 2.0, np.float32), 4).tokens) == 4  # none has one
    assert select(fields, np.arange(B), None, 4).extra_weight is None


@pytest.mark.parametrize("mode", MODES)
def test_row_weights_add_up_to_that_of_the_mask(mode):
    mask = make_batch().mask.copy()
    mask[3] = False
    total = aggregate(mask, mask, mode, max_length=16).weight
    assert float(row_weights(mask, mode, max_length=16).sum()) == pytest.approx(float(total))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective.kl_coefficient", 0.1),
        ("objective.entropy_coefficient", 0.1),
        ("objective.advantage", "reinforce_plus_plus"),
        ("training.num_microbatches", 1),
    ],
)
def test_rows_with_another_gradient_stay(field, value):
    kept = {"training.num_microbatches": 2}
    assert leaves_out_rows(parse_config("grpo_problems.py:tiny", kept))
    assert not leaves_out_rows(parse_config("grpo_problems.py:tiny", kept | {field: value}))
