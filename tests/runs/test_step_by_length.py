"""A step on micro-batches of several widths is that of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharded_programs import pair_batch
from tiny_runs import parse_config

from jaxllm.batches import RolloutBatch, counted_lengths, positions
from jaxllm.runs.step_by_length import compile_step, split_batch
from jaxllm.stages import build_program

B, T = 16, 64


@functools.cache
def make_program(num_microbatches):
    """A program, and its step by length."""
    fields = {
        "training.num_microbatches": num_microbatches,
        "data.batch_size": B,
        "data.sequence_length": T,
        "model.num_layers": 1,
        "mesh.data": 1,
    }
    program = build_program(parse_config("reward_model_pairs.py:tiny", fields), jax.devices()[:1])
    return program, compile_step(program)


def short_pairs(seed):
    """As `pair_batch`, with half of the rows short."""
    batch = pair_batch(seed)
    batch.lengths[::2] = np.minimum(batch.lengths[::2], batch.prompt_lengths[::2, None] + 3)
    batch.prompt_lengths[::2] = np.minimum(batch.prompt_lengths[::2], 8)
    batch.lengths[::2] = batch.prompt_lengths[::2, None] + 3
    return batch


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_it_is_the_step_of_the_whole_batch(num_microbatches):
    program, by_length = make_program(num_microbatches)
    whole, state = program.compile(), program.fresh_state()
    states, losses = [state, jax.tree.map(jnp.copy, state)], ([], [])
    for i in range(2):
        batch = short_pairs(i)
        states[0], metrics = whole(states[0], jax.device_put(batch, program.batch_sharding))
        losses[0].append(metrics["loss"].mean)
        states[1], metrics = by_length(states[1], split_batch(program, batch))
        losses[1].append(metrics["loss"].mean)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), states[0].params, states[1].params)


def test_short_rows_are_narrow_and_few_programs_are_compiled():
    program, step = make_program(4)
    state = program.fresh_state()
    for i in range(4):
        batches = split_batch(program, short_pairs(i))
        assert [len(batch.tokens) for batch in batches] == [4] * 4
        assert [batch.tokens.shape[-1] for batch in batches][-2:] == [16, 16]
        assert positions(batches) < 0.7 * short_pairs(i).tokens.size
        state, _ = step(state, batches)
    assert step.add.cache_info().currsize <= 4
    assert int(state.step) == 4
    assert int(state.skipped_steps) == 0


def test_a_row_is_as_long_as_its_mask_reads():
    mask = np.zeros((3, 8), bool)
    mask[0, 2:5] = True  # the next tokens of positions 2 to 4, the last of which is token 5
    mask[1, 6] = True
    assert counted_lengths(mask).tolist() == [6, 8, 1]
    batch = RolloutBatch(np.zeros((3, 8), np.int32), mask, mask, mask)
    assert batch.row_lengths.tolist() == [6, 8, 1]
