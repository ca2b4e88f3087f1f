"""The same run on one device and on eight: equal losses, and a state that is really split."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.run import Program, find_stage
from jaxllm.batches import TokenBatch
from jaxllm.config import load_config, override, parse

CONFIG = str(Path(__file__).parents[1] / "configs" / "pretrain_text.py:tiny")
MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
STEPS = 5


def make_program(optimizer, mesh):
    config = load_config(CONFIG)
    changes = {"optimizer.name": optimizer, "training.num_microbatches": "2", "data.batch_size": "16"}
    changes |= {
        f"mesh.{axis}": str(size) for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    }
    for field, text in changes.items():
        override(config, find_stage(config.stage).Config, field, text)
    return Program(parse(find_stage(config.stage).Config, config), jax.devices()[: math.prod(mesh)])


def run(mesh, optimizer):
    """The losses of a few steps, and the last state, on a mesh."""
    program = make_program(optimizer, mesh)
    step, state, losses = program.compile(), program.fresh_state(), []
    for i in range(STEPS):
        draw = np.random.default_rng(i)
        tokens = draw.integers(0, 512, (16, 65)).astype(np.int32)
        segments = np.sort(draw.integers(1, 3, (16, 64)).astype(np.int32))
        positions = np.broadcast_to(np.arange(64, dtype=np.int32), (16, 64))
        batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], draw.random((16, 64)) < 0.8, segments, positions)
        state, metrics = step(state, jax.device_put(batch, program.batch_sharding))
        losses.append(float(metrics["loss"].mean))
    return losses, state


@pytest.fixture(scope="module", params=["adamw", "muon"])
def single(request):
    return request.param, *run(MESHES["1x1x1"], request.param)


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1x1x1"])
def test_a_mesh_changes_neither_losses_nor_weights_and_splits_the_whole_state(single, name):
    optimizer, losses, state = single
    found, sharded = run(MESHES[name], optimizer)
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(sharded.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)

    _, fsdp, tensor = MESHES[name]
    for part in (sharded.params, sharded.opt_state):
        arrays = [leaf for leaf in jax.tree.leaves(part) if leaf.ndim > 0]
        whole = sum(leaf.nbytes for leaf in arrays)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
        assert held / whole == pytest.approx(1 / (fsdp * tensor), rel=0.02)  # norms stay whole
    assert len({shard.device for shard in jax.tree.leaves(sharded.params)[0].addressable_shards}) == 8


def test_the_compiler_finds_a_way_between_all_layouts(capfd):
    """It says so when it has to replicate an array for want of one: the lookup of the embedding did that."""
    jax.config.update("jax_enable_compilation_cache", False)  # it speaks only while it compiles
    try:
        make_program("adamw", MESHES["2x2x2"]).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert "rematerialization" not in capfd.readouterr().err
