"""Weights that are not trained: in the compute dtype, sharded as before, read once, copied once."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import parse_config

from jaxllm.rl.log_probs import LogProbs
from jaxllm.rl.rollouts import Rollout
from jaxllm.rollout.decode import unstack
from jaxllm.runs.context import InitialWeights, RunInputs
from jaxllm.runs.sampling_weights import SamplingWeights, in_compute_dtype
from jaxllm.runs.weights import initial_weights
from jaxllm.stages import build_program
from jaxllm.training.run_folder import RunFolder

T = 32


def make_program(compute_dtype, devices=1, **changes):
    fields = {
        "model.num_layers": 2,
        "model.compute_dtype": compute_dtype,
        "data.sequence_length": T,
        "rollout.sampling.max_new_tokens": 16,
        "mesh.data": 1,
        "mesh.fsdp": devices,
    }
    return build_program(parse_config("grpo_problems.py:tiny", fields | changes), jax.devices()[:devices])


def size(params):
    return sum(x.nbytes for x in jax.tree.leaves(params))


def test_kernels_are_cast_where_they_are_and_what_is_computed_in_float32_is_kept():
    program = make_program("bfloat16", devices=2)
    params = program.fresh_params() | {"scalar_head": {"kernel": jnp.zeros((4, 1))}}
    cast = in_compute_dtype(params, program.config.model)
    kept = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(cast)
        if x.dtype == jnp.float32
    }
    norms = len(kept) - ("['scalar_head']['kernel']" in kept)
    assert 0 < norms < len(kept) < len(jax.tree.leaves(cast)) / 2
    assert all("norm" in name or "scalar_head" in name for name in kept)
    moved = jax.tree.map(lambda x, y: not y.sharding.is_equivalent_to(x.sharding, x.ndim), params, cast)
    assert not any(jax.tree.leaves(moved))
    assert size(cast) < 0.51 * size(params)
    same = in_compute_dtype(params, make_program("float32").config.model)
    assert all(map(lambda x, y: x is y, jax.tree.leaves(same), jax.tree.leaves(params)))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_kl_to_a_reference_in_the_compute_dtype_is_exactly_0_at_the_start(compute_dtype):
    program = make_program(compute_dtype)
    params, folder = program.fresh_params(), RunFolder(None, "a", resuming=False, step=None)
    initial = InitialWeights(None, "", lambda keep: params)
    run = RunInputs(program, *2 * [cast_any(None)], folder, initial)
    log_probs = LogProbs(program, program.model, run.reference())
    draw = np.random.default_rng(0)
    N = program.microbatch_rows
    mask = np.zeros((N, T), bool)
    mask[:, 8:20] = True
    rollout = Rollout(**dict.fromkeys(Rollout._fields))._replace(
        tokens=draw.integers(0, 512, (N, T)).astype(np.int32),
        mask=mask,
        sampler_log_probs=np.zeros((N, T), np.float32),
    )
    old, _ = log_probs.old(params, rollout, 0)
    ref_log_probs, kl = log_probs.kl(params, old, rollout, 0)  # raises where it is not 0
    assert not kl.any()
    assert ref_log_probs[mask].max() < -1
    jax.tree.map(lambda x: x.delete(), params)  # as the first step does, which takes the state over
    assert np.isfinite(size(jax.tree.map(jnp.copy, log_probs.reference)))


def test_a_fresh_run_reads_its_initial_weights_once_for_reference_and_state():
    reads = []
    program: Any = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(lora=SimpleNamespace(rank=None)), seed=0),
        fresh_params=lambda: reads.append(1) or {"x": jnp.zeros(3)},
    )
    params = initial_weights(cast_any(None), program, RunFolder(None, "a", False, None), None).params
    first = params(keep=True)
    assert params() is first
    assert len(reads) == 1
    assert params() is not first  # nothing is held
    assert len(reads) == 2


def test_fresh_parameters_are_those_of_the_fresh_state():
    program = make_program("float32")
    made, state = program.fresh_params(), program.fresh_state()
    jax.tree.map(np.testing.assert_array_equal, made, state.params)


@pytest.mark.parametrize("replicate", [False, True])
def test_weights_to_sample_with_are_one_copy(replicate):
    program = make_program("float32", devices=2)
    params = program.fresh_params()
    weights = SamplingWeights(params, program.mesh, dtype="bfloat16", replicate=replicate)
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.set_mesh(program.mesh), weights.of(params, keys, slice(None)) as (placed, _):
        decoded = unstack(placed)  # as decoding does
        pointers = [
            [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
            for tree in (placed, decoded)
        ]
        assert pointers[0] == pointers[1]
    kernels = [x for x in jax.tree.leaves(placed) if x.ndim == 2]
    assert {x.sharding.is_fully_replicated for x in kernels} == {replicate}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), unstack(params))
    jax.tree.map(np.testing.assert_array_equal, placed, expected)


def cast_any(x: Any) -> Any:
    return x
