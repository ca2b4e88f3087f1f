"""One program of one run, compiled for one kind of hardware: in its own process, since compilers may abort.

python -m jaxllm.plan.candidate JOB.json RESULT.json
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.files import to_json
from jaxllm.models.config import flops_per_token
from jaxllm.plan.flops import traced_flops
from jaxllm.plan.hardware import Hardware, find_hardware
from jaxllm.plan.hlo import Collective, read_program
from jaxllm.plan.programs import Step, device_bytes, gradients, trace
from jaxllm.plan.roofline import Roofline, roofline
from jaxllm.plan.targets import Target, find_target
from jaxllm.runs.program import Program
from jaxllm.stages import build_program, find_stage

_REFUSED = re.compile(
    r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG])|\(([\d.]+)([KMG])\) exceeds[^(]*\(([\d.]+)([KMG])\)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Plan:
    """What is planned of one program. Bytes and seconds are a device's."""

    step: str
    hardware: str
    mesh: dict[str, int] = field(default_factory=dict)
    compiler: str = ""
    notes: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)  # that a search has set
    error: str = ""  # why there is no plan
    fits: bool | None = None
    over: float = 0.0  # bytes that are missing
    available: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)  # bytes by what they hold; `peak` is all
    tokens: int = 0
    flops: dict[str, float] = field(default_factory=dict)  # of all devices: by hand, and traced
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0
    cycles: float = 0.0  # by a TPU's compiler, without kernels and waiting: to compare two plans
    roofline: Roofline | None = None
    devices: int = 0
    seconds: float = 0.0  # to make this plan

    @property
    def mfu(self) -> float:
        """The model's FLOPs over those that the devices could do within the bound."""
        assert self.roofline is not None
        peak = find_hardware(self.hardware).chip.flops * self.devices
        return self.flops["by hand"] / self.roofline.bound / peak

    @property
    def tokens_per_second(self) -> float:
        """Of the devices that run the program together, within the bound."""
        assert self.roofline is not None
        return self.tokens / self.roofline.bound


def read_plan(values: Mapping[str, Any]) -> Plan:
    """A plan from its JSON."""
    collectives = tuple(Collective(*each) for each in values["collectives"])
    time = Roofline(**values["roofline"]) if values["roofline"] else None
    return Plan(**{**values, "collectives": collectives, "roofline": time, "notes": tuple(values["notes"])})


def make_plan(config: Any, hardware: Hardware, step: str, target: Target) -> Plan:
    """Compile a step of a run. What the compiler refuses for want of memory is an answer as well."""
    began = time.perf_counter()
    notes = [target.note] if target.note else []
    if target.compiler == "cpu":
        config = replace(config, model=replace(config.model, attention="xla"))
    program = build_program(config, target.devices)
    try:
        traced = trace(program, step, hardware.memory)
    except jax.errors.JaxRuntimeError as error:  # of what comes before it, such as making the cache
        return replace(Plan(step, hardware.name), **refusal(str(error)), available=hardware.memory)
    mesh = {axis: size for axis, size in traced.mesh.shape.items() if size > 1}
    devices = traced.mesh.size
    plan = Plan(step, hardware.name, mesh, target.compiler, devices=devices, tokens=traced.tokens)
    memory = known_memory(program, traced, step)
    plan = replace(plan, notes=tuple(notes), available=hardware.memory, memory=memory)
    try:
        compiled = traced.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return replace(plan, **refusal(str(error)), seconds=time.perf_counter() - began)
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None
    assert text is not None
    temporaries, own = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    arguments, results = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = arguments + results + temporaries + own
    memory |= {"temporaries": max(0, temporaries - memory.get("gradients", 0)), "peak": peak}
    reading = read_program(text, dict(traced.mesh.shape))
    flops = {"by hand": traced.flops, "traced": executed_flops(program, traced, step)}
    bytes_read = memory_traffic(program, traced, step, memory)
    return replace(
        plan,
        fits=peak <= hardware.memory,
        over=max(0.0, peak - hardware.memory),
        memory=memory,
        flops=flops,
        collectives=tuple(reading.collectives),
        unknown_loops=reading.unknown_loops,
        cycles=reading.cycles,
        roofline=roofline(hardware.chip, flops["traced"] / devices, bytes_read, reading.collectives),
        seconds=time.perf_counter() - began,
    )


def refusal(message: str) -> dict[str, Any]:
    """What a compiler said of a program that does not fit; any other message is an error."""
    match = _REFUSED.search(message)
    if "RESOURCE_EXHAUSTED" not in message and match is None:
        return {"error": message.strip().partition("\n")[0]}
    if match is None:
        return {"fits": False}
    used, unit, limit, limit_unit = [part for part in match.groups() if part]
    over = float(used) * _UNITS[unit] - float(limit) * _UNITS[limit_unit]
    return {"fits": False, "over": over}


def known_memory(program: Program[Any, Any], step: Step, name: str) -> dict[str, float]:
    """Bytes of a device that follow from shapes and shardings alone."""
    if name != "train":
        parts = {"weights": step.weights, "cache": step.cache} if step.cache else {"weights": step.weights}
        return {name: device_bytes(part) for name, part in parts.items()}
    state = program.placed_state
    return {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "gradients": device_bytes(gradients(state.params, program.trainable)),
    }


def executed_flops(program: Program[Any, Any], step: Step, name: str) -> float:
    """FLOPs of all devices with what is recomputed: as traced, and by hand the attention of kernels."""
    flops = traced_flops(step.traced.jaxpr.jaxpr, step.mesh.size)
    model = program.config.model
    if model.attention == "xla" or name == "decode":
        return flops
    length = program.config.data.sequence_length
    attention = flops_per_token(model, length) - flops_per_token(model, 0)
    return flops + attention * step.tokens * (len(program.models) if name == "train" else 1 / 3)


def memory_traffic(program: Program[Any, Any], step: Step, name: str, memory: Mapping[str, float]) -> float:
    """Bytes that a device reads and writes at least."""
    model = program.config.model
    size = np.dtype("float32" if model.compute_dtype == "float32" else "float16").itemsize
    elements = sum(x.size for x in jax.tree.leaves(step.weights)) / step.mesh.shape["tensor"]
    if name != "train":
        return elements * size + memory.get("cache", 0)
    pieces = program.config.training.num_microbatches
    reads = 2 if model.remat == "none" else 3  # forward, backward, and again what was not kept
    state = 2 * (memory["parameters"] + memory["optimizer"])
    return state + pieces * (reads * elements * size + 2 * memory["gradients"])


def main(job_file: str, result_file: str) -> None:
    """Read the job, write the plan."""
    job = json.loads(Path(job_file).read_text())
    hardware = find_hardware(job["hardware"])
    config = parse(find_stage(job["config"]["stage"]).Config, job["config"])
    try:
        plan = make_plan(config, hardware, job["step"], find_target(hardware))
    except ConfigError as error:
        plan = Plan(job["step"], job["hardware"], error=str(error))
    Path(result_file).write_bytes(to_json(asdict(plan)))


if __name__ == "__main__":
    main(*sys.argv[1:])
