"""Plans as a table for people. Everything in it is planned, nothing measured."""

from collections.abc import Mapping, Sequence

from jaxllm.plan.candidate import Plan
from jaxllm.plan.hardware import Hardware, find_hardware
from jaxllm.plan.roofline import ASSUMPTIONS

KNOBS = {
    "temporaries": "raise training.num_microbatches, or set model.remat=full",
    "parameters": "split them with a larger mesh.fsdp or mesh.tensor",
    "optimizer": "split it with a larger mesh.fsdp, or train adapters (model.lora.rank)",
    "gradients": "split them with a larger mesh.fsdp, or train adapters (model.lora.rank)",
    "cache": "lower rollout.decode_batch_size",
    "weights": "set rollout.dtype=bfloat16 or rollout.replicate_params=false",
}


def gigabytes(size: float) -> str:
    """In GB (10^9 bytes), with as many digits as help."""
    return f"{size / 1e9:.3g}" if size < 100e9 else f"{size / 1e9:.0f}"


def duration(seconds: float) -> str:
    """In s or ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def first_knob(plan: Plan) -> str:
    """What to change first where a program does not fit: that of the largest part of its memory."""
    parts = {name: size for name, size in plan.memory.items() if name in KNOBS}
    if "temporaries" not in parts:  # the compiler gave up on them
        parts["temporaries"] = plan.available + plan.over - sum(parts.values())
    largest = max(parts, key=lambda name: parts[name])
    if plan.step != "train" and largest == "temporaries":
        return "lower rollout.decode_batch_size" if plan.step == "decode" else KNOBS["temporaries"]
    return KNOBS[largest]


def describe(plan: Plan) -> str:
    """A plan in a few lines."""
    if plan.error:
        return f"{plan.step}: no plan: {plan.error}"
    memory = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.memory.items() if name != "peak")
    available = gigabytes(plan.available)
    if not plan.fits:
        over = f" by {gigabytes(plan.over)} GB" if plan.over else ""
        return "\n".join(
            [
                f"{plan.step}: does not fit{over} into {available} GB a device: {memory} GB",
                f"  first: {first_knob(plan)}",
            ]
        )
    lines = [
        f"{plan.step}: fits, {gigabytes(plan.memory['peak'])} of {available} GB a device: {memory} GB",
    ]
    time = plan.roofline
    assert time is not None
    recomputed = plan.flops["traced"] / plan.flops["by hand"] - 1
    lines.append(
        f"  {plan.flops['by hand']:.3g} FLOPs by hand, {plan.flops['traced']:.3g} traced ({recomputed:+.0%}) "
        f"over {plan.devices} devices"
    )
    lines.append(
        f"  at least {duration(time.bound)} by {time.limit} (compute {duration(time.compute)}, memory "
        f"{duration(time.memory)}, network {duration(time.network)}; their sum {duration(time.sum)}): "
        f"{plan.tokens_per_second:.3g} tokens/s, MFU {plan.mfu:.0%} at most"
    )
    if plan.cycles:
        lines.append(f"  {plan.cycles:.3g} cycles by the compiler (without kernels and waiting: to compare)")
    for each in plan.collectives[:6]:
        lines.append(f"  {each.op} over {each.axis}: {each.count} times, {gigabytes(each.bytes)} GB")
    if len(plan.collectives) > 6:
        rest = plan.collectives[6:]
        total = gigabytes(sum(each.bytes for each in rest))
        lines.append(
            f"  {len(rest)} more kinds of collectives: {sum(each.count for each in rest)} times, {total} GB"
        )
    if plan.unknown_loops:
        lines.append("  a loop whose end depends on data counts once: all of this is one token of each row")
    return "\n".join(lines)


def describe_budget(plan: Plan, tokens: float, price_per_hour: float | None) -> str:
    """Hours and cost of train steps on a number of tokens, at the bound."""
    hours = tokens / plan.tokens_per_second / 3600
    chip_hours = hours * find_hardware(plan.hardware).count
    text = f"  {tokens:.3g} tokens: {hours:,.3g} hours of train steps at least, {chip_hours:,.3g} chip-hours"
    if price_per_hour is None:
        return text
    return f"{text}, {chip_hours * price_per_hour:,.2f} at {price_per_hour:g} a chip-hour"


def mesh_text(mesh: Mapping[str, int]) -> str:
    """`data=2 x fsdp=4`, without axes of one device."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items()) or "one device"


def header(hardware: Hardware, plans: Sequence[Plan]) -> str:
    """The hardware, the meshes, the compiler, the assumptions and the notes of plans."""
    made = [plan for plan in plans if plan.compiler]
    lines = [f"planned, not measured: {hardware.name}, {hardware.count} x {hardware.chip.kind}"]
    for what, found in (
        ("mesh", [mesh_text(plan.mesh) for plan in made]),
        ("compiled by", [plan.compiler for plan in made]),
    ):
        lines[0] += "".join(f", {what} {each}" for each in dict.fromkeys(found))
    lines.append(f"roofline: {'; '.join(ASSUMPTIONS)}")
    return "\n".join([*lines, *dict.fromkeys(f"note: {note}" for plan in plans for note in plan.notes)])
