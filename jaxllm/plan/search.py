"""Batch x micro-batches x remat x mesh: which of them fit, and which of those could be fastest.

Every combination that divides is estimated by hand, in milliseconds; only the most promising are compiled.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jaxllm.errors import ConfigError
from jaxllm.models.config import REMAT, ModelConfig, layer_shapes
from jaxllm.parallel.sharding import AXES, placed
from jaxllm.plan.hardware import Hardware
from jaxllm.plan.hlo import Collective
from jaxllm.plan.programs import device_bytes, gradients
from jaxllm.plan.roofline import roofline
from jaxllm.rl.config import RolloutTrainConfig
from jaxllm.runs.program import Program, check_sizes
from jaxllm.stages import build_program

T = TypeVar("T")

LARGEST_TENSOR = 8  # devices along mesh.tensor, which communicates in every layer
SLACK = 1.3  # an estimate of so many times the memory may still fit
HEAD_BYTES = 2 * 512 * 2**20  # of logits, forward and backward: jaxllm.losses.linear_head


class Choice(NamedTuple):
    """A combination, by the fields that it sets, with its estimates for a device."""

    fields: dict[str, Any]
    memory: float  # bytes
    seconds_per_token: float

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.fields.items())


def choices(config: Any, hardware: Hardware) -> list[Choice]:
    """All combinations that divide, with estimates."""
    alone = replace(config.mesh, data=1, fsdp=1, sequence=1, tensor=1)
    model = replace(config.model, attention="xla")  # of which neither sizes nor shapes depend
    program = build_program(replace(config, mesh=alone, model=model), jax.devices("cpu")[:1])
    found: dict[tuple[Any, ...], Choice] = {}
    for sizes in meshes(config, hardware.count):
        mesh = AbstractMesh(sizes, AXES)
        state = placed(program.abstract_state, mesh)
        held = device_bytes(state)
        summed = device_bytes(gradients(state.params, program.trainable))
        for batch, pieces, remat in itertools.product(batches(config), powers(config.data.batch_size), REMAT):
            fields = {"data.batch_size": batch, "training.num_microbatches": pieces, "model.remat": remat}
            fields |= {f"mesh.{axis}": sizes[AXES.index(axis)] for axis in ("data", "fsdp", "tensor")}
            tried = replace(
                config,
                data=replace(config.data, batch_size=batch),
                training=replace(config.training, num_microbatches=pieces),
                model=replace(config.model, remat=remat),
            )
            with contextlib.suppress(ConfigError):
                check_sizes(tried, mesh)
                guess = estimate(program, tried, mesh, hardware, held, summed)
                # Another batch size only where it makes other micro-batches.
                found.setdefault((sizes, batch // pieces, remat), Choice(fields, *guess))
    return list(found.values())


def batches(config: Any) -> list[int]:
    """The batch size, twice it and half of it; in RL it follows from the rollout and stays."""
    size = config.data.batch_size
    return [size] if isinstance(config, RolloutTrainConfig) else [size, 2 * size, max(1, size // 2)]


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit."""
    return [2**i for i in range(limit.bit_length())]


def meshes(config: Any, count: int) -> Iterator[tuple[int, ...]]:
    """Sizes of (data, fsdp, sequence, tensor); the sequence axis stays."""
    sequence = config.mesh.sequence
    for fsdp, tensor in itertools.product(powers(count), powers(min(count, LARGEST_TENSOR))):
        if config.model.num_kv_heads % tensor == 0 and count % (fsdp * sequence * tensor) == 0:
            yield count // (fsdp * sequence * tensor), fsdp, sequence, tensor


def estimate(
    program: Program[Any, Any],
    config: Any,
    mesh: AbstractMesh,
    hardware: Hardware,
    held: float,
    summed: float,
) -> tuple[float, float]:
    """Bytes of a device, and seconds a token if nothing overlaps, of a train step with so many bytes of state
    and of gradients. For ranking: a plan is what to believe."""
    model, data, pieces = config.model, config.data, config.training.num_microbatches
    size = 4 if model.compute_dtype == "float32" else 2
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    tokens = data.batch_size * program.tokens_per_step // program.config.data.batch_size  # pairs: two rows
    local = tokens / (mesh.shape["data"] * fsdp * mesh.shape["sequence"]) / pieces  # of a micro-batch
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract_state.params)) / tensor

    saved = saved_elements(model, tensor)
    activations = local * size * (model.num_layers * saved[model.remat] + 3 * saved["none"])
    layer = 2 * parameters / model.num_layers * size  # gathered: the one at work and the next
    head = min(HEAD_BYTES, 2 * local * model.vocab_size * 4 / tensor)
    memory = held + summed + activations + head + layer

    again = model.remat in ("full", "attention")  # the forward pass, in the backward pass
    flops = program.flops_per_token * tokens * (4 / 3 if again else 1) / mesh.size
    reads = 3 if again else 2
    traffic = 2 * held + pieces * (reads * parameters * size + 2 * summed)
    row = local * model.width * size
    sent = [
        Collective("all-gather", "fsdp", fsdp, 1, pieces * reads * parameters * size),
        Collective("reduce-scatter", "fsdp", fsdp, 1, pieces * parameters * size),
        Collective("all-reduce", "data", mesh.shape["data"], 1, pieces * parameters / fsdp * size),
        Collective("all-reduce", "tensor", tensor, 1, 2 * reads * pieces * model.num_layers * row),
    ]
    return memory, roofline(hardware.chip, flops, traffic, sent).sum / tokens


def saved_elements(model: ModelConfig, tensor: int) -> dict[str, float]:
    """What a block keeps of a token for the backward pass, by `model.remat`."""
    products = sum(columns for _, columns in layer_shapes(model).values()) / tensor
    attended = model.num_heads * model.head_dim / tensor
    elementwise = 4 * model.width + (2 * model.mlp_width + 2 * attended) / tensor
    return {
        "full": model.width,
        "attention": model.width + attended,
        "dots": model.width + products,
        "none": model.width + products + elementwise,
    }


def promising(found: Sequence[Choice], memory: float, number: int) -> list[Choice]:
    """Those to compile: of what may fit, first the front of memory against time, then the fastest."""
    may_fit = [each for each in found if each.memory <= SLACK * memory]
    front = pareto(may_fit, lambda each: (each.seconds_per_token, each.memory))
    fastest = sorted(may_fit, key=lambda each: (each.seconds_per_token, each.memory))
    chosen = [*front[: (number + 1) // 2], *(each for each in fastest if each not in front)]
    return chosen[:number]


def pareto(found: Sequence[T], costs: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that no other beats in one cost without losing in the other, by the first cost."""
    front, lowest = [], np.inf
    for each in sorted(found, key=costs):
        if costs(each)[1] < lowest:
            front.append(each)
            lowest = costs(each)[1]
    return front
