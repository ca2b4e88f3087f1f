"""The same run on one device and on eight: equal losses, and a state that is split over the devices."""

import functools
import math

import jax
import numpy as np
import pytest
from tiny_runs import parse_config

from jaxllm.batches import PairBatch, TokenBatch
from jaxllm.runs.step_by_length import compile_step, split_batch
from jaxllm.stages import build_program

FILES = {
    "pretrain": "pretrain_text.py",
    "sft": "sft_chat.py",
    "reward_model": "reward_model_pairs.py",
    "dpo": "dpo_pairs.py",
}
AXES = ("data", "fsdp", "tensor", "sequence")
ONE_DEVICE, SPLIT_MODEL = (1, 1, 1, 1), (2, 2, 2, 1)
CASES = [  # each compiles for 8 devices; tests/parallel/test_sharding.py has other meshes
    ("pretrain", "muon", SPLIT_MODEL),  # and AdamW, for what is no matrix
    ("sft", "adamw", SPLIT_MODEL),
    ("sft", "adamw", (1, 2, 1, 4)),
    ("reward_model", "adamw", SPLIT_MODEL),
    ("dpo", "adamw", (1, 2, 2, 2)),
]
STEPS, B, T = 3, 16, 64


def make_program(stage, optimizer, mesh):
    fields = {
        "optimizer.name": optimizer,
        "training.num_microbatches": 2,
        "data.batch_size": B,
        "data.sequence_length": T,
        "model.num_layers": 1,
    }
    fields |= {f"mesh.{axis}": size for axis, size in zip(AXES, mesh, strict=True)}
    return build_program(parse_config(f"{FILES[stage]}:tiny", fields), jax.devices()[: math.prod(mesh)])


def token_batch(seed):
    """Two documents per row, with some tokens outside the loss mask."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 512, (B, T + 1)).astype(np.int32)
    segments = np.sort(draw.integers(1, 3, (B, T)).astype(np.int32))
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], draw.random((B, T)) < 0.8, segments, positions)


def pair_batch(seed):
    """Completions of different lengths, with margins, weights and log-probs of a reference."""
    draw = np.random.default_rng(seed)
    prompts = draw.integers(1, 20, B).astype(np.int32)
    lengths = prompts[:, None] + draw.integers(1, 40, (B, 2)).astype(np.int32)
    return PairBatch(
        tokens=draw.integers(0, 512, (B, 2, T)).astype(np.int32),
        prompt_lengths=prompts,
        lengths=lengths,
        margin=draw.random(B).astype(np.float32),
        weight=draw.random(B).astype(np.float32),
        ref_log_probs=-6 * (lengths - prompts[:, None]) + draw.normal(size=(B, 2)).astype(np.float32),
    )


def run(stage, optimizer, mesh):
    """The losses of a few steps on a mesh, and the last state."""
    program = make_program(stage, optimizer, mesh)
    step, state, losses = compile_step(program), program.fresh_state(), []
    for i in range(STEPS):
        if stage in ("pretrain", "sft"):
            batch = jax.device_put(token_batch(i), program.batch_sharding)
        else:
            batch = split_batch(program, pair_batch(i))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].mean))
    return losses, state


run_on_one_device = functools.cache(functools.partial(run, mesh=ONE_DEVICE))


@pytest.mark.parametrize(("stage", "optimizer", "mesh"), CASES, ids=str)
def test_a_mesh_changes_neither_losses_nor_weights_and_splits_the_whole_state(stage, optimizer, mesh):
    losses, state = run_on_one_device(stage, optimizer)
    found, sharded = run(stage, optimizer, mesh)
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(sharded.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)

    _, fsdp, tensor, _ = mesh
    for part in (sharded.params, sharded.opt_state):
        arrays = [leaf for leaf in jax.tree.leaves(part) if leaf.ndim > 0]
        whole = sum(leaf.nbytes for leaf in arrays)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
        assert held / whole == pytest.approx(1 / (fsdp * tensor), rel=0.02)  # norms stay whole
    assert len({shard.device for shard in jax.tree.leaves(sharded.params)[0].addressable_shards}) == 8


def test_the_compiler_replicates_no_array_between_layouts(capfd):
    """XLA warns where it cannot reshard an array without replicating it, as once the embedding lookup."""
    jax.config.update("jax_enable_compilation_cache", False)  # it warns only while it compiles
    try:
        make_program("pretrain", "adamw", SPLIT_MODEL).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert "rematerialization" not in capfd.readouterr().err
