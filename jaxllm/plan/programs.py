"""The programs that a run compiles, traced for the devices of its mesh: arrays are shapes throughout."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.models import Model
from jaxllm.models.config import flops_per_token
from jaxllm.parallel.global_arrays import OWN_WEIGHTS, own_mesh, own_shardings
from jaxllm.rl.config import RolloutTrainConfig
from jaxllm.rl.rollouts import rollout_shapes, sampling_model
from jaxllm.rollout.collect import bucket
from jaxllm.rollout.decode import decode, free_rows, prefill, unstack_jit
from jaxllm.rollout.score import log_probs_in_batches
from jaxllm.runs.program import Program
from jaxllm.runs.sampling_weights import SamplingWeights, cast_floats
from jaxllm.stages import find_stage
from jaxllm.training.state import split_params

STEPS = ("train", "prefill", "decode", "score")

Shapes = Any  # a tree of jax.ShapeDtypeStruct


class Step(NamedTuple):
    """A program that is ready to be compiled, and what is known of it without that."""

    traced: jax.stages.Traced
    mesh: jax.sharding.Mesh  # of the devices that run it together
    tokens: int  # that one execution reads or generates
    flops: float  # of one execution by hand, over all devices
    weights: Shapes  # that are read
    cache: Shapes = ()


def steps_of(config: Any) -> tuple[str, ...]:
    """The programs of a run, by name."""
    return STEPS if isinstance(config, RolloutTrainConfig) else ("train",)


def trace(program: Program[Any, Any], step: str, memory: float) -> Step:
    """One of the programs of a run. `memory`: bytes of a device."""
    if step == "train":
        flops = program.flops_per_token * program.tokens_per_step
        weights = program.placed_state.params
        return Step(program.trace(), program.mesh, program.tokens_per_step, flops, weights)
    config = program.config
    if step not in steps_of(config):
        raise ConfigError(f"--steps_of: stage={config.stage!r} has no {step}, only train")
    prefix = find_stage(config.stage).policy_prefix
    model = getattr(program.model, prefix) if prefix else program.model
    params = program.placed_state.params
    params = params[prefix] if prefix else params
    with jax.set_mesh(program.mesh):
        if step == "score":
            return trace_score(program, model, params)
        return trace_rollout(program, sampling_model(model, config.rollout), params, step, memory)


def trace_score(program: Program[Any, Any], model: Model, params: Shapes) -> Step:
    """Log-probs of the completions of a rollout, a micro-batch of rows at a time."""
    config = program.config
    rows, length = program.microbatch_rows, config.data.sequence_length
    sampling = config.rollout.sampling
    score = log_probs_in_batches(
        model, sampling.temperature, rows, length, program.mesh, sampling.max_new_tokens
    )
    tokens, mask = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, bool))
    traced = score.trace(params, tokens, mask)
    flops = flops_per_token(config.model, length, unembedded=config.unembedded) / 3 * rows * length
    return Step(traced, program.mesh, rows * length, flops, params)


def trace_rollout(program: Program[Any, Any], model: Model, params: Shapes, step: str, memory: float) -> Step:
    """The prefill of one refill, or decoding with as many cache slots as it may need.

    Of several hosts, each samples its own prompts on its own devices if the weights fit there.
    """
    config, mesh = program.config, program.mesh
    hosts = len({device.process_index for device in mesh.devices.flat})
    rollout, mesh, params = config.rollout, *sampled_by(params, mesh, config.rollout, hosts, memory)
    hosts = hosts if mesh is not program.mesh else 1
    new, longest = rollout.sampling.max_new_tokens, config.model.max_length

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    with jax.set_mesh(mesh):
        shapes = rollout_shapes(config, mesh, hosts)
        B, P, T = shapes.batches[-1], shapes.P, shapes.sizes[0]
        params = results(unstack_jit.trace(params))
        read = prefill.trace(model, params, array(P, T))
        if step == "prefill":
            flops = flops_per_token(config.model, T, unembedded=0.0) / 3 * P * T
            return Step(read, mesh, P * T, flops, params)
        slots = min(bucket(T + new), longest)
        state = results(free_rows.trace(model, B, slots))
        options = {"stop_ids": array(1), "sampling": rollout.sampling}
        traced = decode.trace(model, params, state, array(B, dtype=bool), array(), array(), **options)
    flops = flops_per_token(config.model, 2 * slots) / 3 * B  # each attends to all slots
    return Step(traced, mesh, B, flops, params, state.cache)


def sampled_by(
    params: Shapes, mesh: jax.sharding.Mesh, config: Any, hosts: int, memory: float
) -> tuple[jax.sharding.Mesh, Shapes]:
    """The mesh of those who sample together, and the weights as they hold them."""
    if hosts > 1:
        cast = (
            params if config.dtype is None else jax.eval_shape(lambda x: cast_floats(x, config.dtype), params)
        )
        layout = own_shardings(cast, mesh, config.replicate_params)
        own = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cast, layout)
        if device_bytes(own) <= OWN_WEIGHTS * memory:
            return own_mesh(mesh), own
    weights = SamplingWeights(params, mesh, dtype=config.dtype, replicate=config.replicate_params)
    return mesh, params if weights.place is None else results(weights.place.trace(params))


def results(traced: jax.stages.Traced) -> Shapes:
    """The shapes that a program returns, with the shardings that the compiler gives them."""
    lowered = traced.lower()
    compiled = lowered.compile()
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )


def device_bytes(tree: Shapes) -> int:
    """Bytes on a device, of shapes with their shardings."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def gradients(params: Shapes, trainable: str) -> Shapes:
    """Those of the parameters that are trained, as the train step adds them up."""
    trained = split_params(params, trainable)[0]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), trained)
