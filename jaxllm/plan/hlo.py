"""What a compiled program sends over the network, from its text.

XLA's own cost analysis counts the body of a loop once. The text says how often each loop runs, so that
everything can be counted here; only loops whose end depends on data, such as decoding, count once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
SCATTERED = "all-reduce-scatter"  # a TPU's reduce-scatter: an all-reduce and a slice, fused

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+(?:fn)?)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """All executions of one kind of collective over the same axes of the mesh, in one run of the program."""

    op: str
    axis: str  # "fsdp", or "data x fsdp"
    devices: int  # that take part in each
    count: int
    bytes: float  # of the whole arrays: gathered, or before they are scattered or reduced


class Reading(NamedTuple):
    """What the text of a program says."""

    collectives: list[Collective]  # the one with the most bytes first
    unknown_loops: int  # loops that count once, since their end depends on data
    cycles: float  # that a TPU's compiler estimates, without kernels and waiting; 0: it estimates none


def read_program(text: str, mesh: Mapping[str, int]) -> Reading:
    """The collectives of a compiled program over a mesh (axis -> size, the first axis outermost)."""
    computations, entry = split(text)
    found: dict[tuple[str, str, int], list[float]] = {}
    unknown, cycles = 0, 0.0
    for line, op, result, times in executed(computations, entry):
        if estimated := _CYCLES.search(line):
            cycles += times * int(estimated[1])
        if op == "while":
            unknown += 1
        if op not in (*COLLECTIVES, SCATTERED):
            continue
        axis, devices = axis_of(line, mesh)
        size = array_bytes(result) * (devices if op == "reduce-scatter" else 1)
        if devices > 1:
            total = found.setdefault(("reduce-scatter" if op == SCATTERED else op, axis, devices), [0, 0.0])
            total[0] += times
            total[1] += times * size
    collectives = [Collective(*key, int(count), size) for key, (count, size) in found.items()]
    return Reading(sorted(collectives, key=lambda each: -each.bytes), unknown, cycles)


def split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line[:1] not in (" ", "}", "") and (match := _COMPUTATION.match(line)):
            name = match[2]
            entry = name if match[1] else entry
            computations[name] = []
        elif line.startswith(" ") and name:
            computations[name].append(line)
    return computations, entry


def executed(
    computations: Mapping[str, list[str]], entry: str, times: int = 1
) -> Iterator[tuple[str, str, str, int]]:
    """(line, op, type of the result, executions) of each collective, of each loop of unknown length, and of
    what has an estimate of its cycles."""
    lines = computations.get(entry, [])
    started = started_here(entry, lines)
    for line in lines:
        if (match := _INSTRUCTION.match(line)) is None:
            continue
        result, op = match[2], match[3]
        base = op.removesuffix("-start")
        if base in COLLECTIVES and started is not None and match[1] not in started:
            continue
        if base in COLLECTIVES:
            if op != base and base != "all-reduce":
                result = second(result)
            scattered = base == "all-reduce" and entry.startswith(SCATTERED)
            yield line, SCATTERED if scattered else base, result, times
        elif op == "while":
            trips = trip_count(line, computations)
            if trips is None:
                yield line, "while", result, times
            for name in re.findall(r"(?:condition|body)=%?([\w.\-]+)", line):
                yield from executed(computations, name, times * (1 if trips is None else trips))
        else:
            if "estimated_cycles" in line:
                yield line, op, result, times
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [name.strip().lstrip("%") for name in branches.split(",")]
            for name in called:
                yield from executed(computations, name, times)


def started_here(name: str, lines: list[str]) -> set[str] | None:
    """The collectives that a piece of asynchronous ones starts; None: the computation is no such piece.

    A TPU's text repeats a collective in the piece that starts it, in those after it and in the one that ends
    it. One piece may end a collective and start another.
    """
    starts = [line for line in lines if '"AsyncCollectiveStart"' in line]
    ends = any('"AsyncCollectiveDone"' in line for line in lines)
    if not (starts or ends or name.startswith("async_collective_fusion")):
        return None
    return {each for line in starts for each in re.findall(r"custom-call\(%?([\w.\-]+)", line)}


def trip_count(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """How often a loop runs: as XLA notes, or as its condition `i < N` says; None where that is unknown."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    limits = [int(n) for each in lines for n in re.findall(r" constant\((\d+)\)", each)]
    counts_up = sum("direction=LT" in each for each in lines) == 1 and len(lines) <= 8
    return limits[0] if len(limits) == 1 and counts_up else None


def second(text: str) -> str:
    """The second part of a tuple's type: the results of an operation that has started on the first."""
    depth, parts = 0, [""]
    for character in text[1:-1]:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts[min(1, len(parts) - 1)]


def array_bytes(text: str) -> float:
    """Bytes of all arrays of a type."""
    return sum(
        BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(text)
        if kind in BYTES
    )


def axis_of(line: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """The axes of the mesh that a collective goes over, and how many devices take part together."""
    total = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        ids = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
        groups = ids[ids[:, 0] != ids[:, 1]]
        varies = varying(groups, mesh)
    else:
        groups = replica_groups(line, total)
        varies = varying(groups[:1], mesh)
    names = [axis for axis in mesh if axis in varies]
    return " x ".join(names), math.prod(mesh[axis] for axis in names)


def varying(groups: np.ndarray, mesh: Mapping[str, int]) -> set[str]:
    """The axes along which the devices of a group differ."""
    if not groups.size:
        return set()
    places = np.unravel_index(groups, tuple(mesh.values()))
    return {axis for axis, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any()}


def replica_groups(line: str, total: int) -> np.ndarray:
    """Int [groups, devices of each] from `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'a'}`;
    one group of all where none is given."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        rows = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", line
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = np.arange(total)
        if order := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2] or ""):
            dims, perm = ([int(n) for n in part.split(",")] if part else None for part in order.groups())
            ids = ids.reshape(dims).transpose(perm)
        over = re.findall(r"'(\w+)'", named[3])
        rest = [axis for axis in axes if axis not in over]
        places = ids.reshape(tuple(axes.values())).transpose(
            [list(axes).index(each) for each in (*rest, *over)]
        )
        return places.reshape(-1, math.prod(axes[axis] for axis in over))
    return np.arange(total)[None]
