"""Metrics of a run: from the sums that a step returns to named numbers, files, and throughput."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxllm.files import naming, write_file
from jaxllm.losses import Weighted
from jaxllm.training.state import Params
from jaxllm.training.trackers import Tracker

Metrics = dict[str, float]  # "area/name" -> number, as in a row of metrics.jsonl

# Dense bfloat16 matrix-product peak (no sparsity) in FLOP/s of a device, by how JAX's device_kind begins (a
# v5p's is "TPU v5"). From the vendors' data sheets; one TPU7x is two devices.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}


def to_scalars(metrics: dict[str, Weighted], area: str) -> Metrics:
    """Means of the `Weighted` sums, fetched from the device in one transfer.

    `loss` is renamed to `area/loss`; a name such as `policy/loss` already has an area and is kept.
    """
    fetched = jax.device_get(metrics)
    means = {name: float(w.sum) / float(w.weight) if w.weight else 0.0 for name, w in fetched.items()}
    return {name if "/" in name else f"{area}/{name}": mean for name, mean in means.items()}


def parameter_count(params: Params) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def peak_flops(device_kind: str) -> float | None:
    """The bfloat16 peak of a chip in FLOP/s, or None for one that is not in the table."""
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def memory_peak_gb() -> float | None:
    """Peak device memory so far in GB, or None where the backend does not count it."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats and "peak_bytes_in_use" in stats else None


class Throughput:
    """Speed of training between two calls of `read`, without pauses such as evaluation and saving.

    The loop adds to `steps`, to `tokens`, the positions that were computed, and to `waited`, the seconds
    spent waiting for batches.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float):
        self.tokens_per_step = tokens_per_step  # with all padding
        self.flops_per_token = flops_per_token
        self.restart()

    def restart(self) -> None:
        """Restart the measurement, as after a pause."""
        self.start, self.steps, self.tokens, self.waited = time.perf_counter(), 0, 0, 0.0

    def read(self) -> Metrics:
        """`perf/*` of the steps since the last reading or restart; empty if there were none."""
        if not self.steps:
            return {}
        seconds = time.perf_counter() - self.start
        step_time = seconds / self.steps
        row = {
            "perf/tokens_per_second": self.tokens / seconds,
            "perf/step_time": step_time,
            "perf/data_wait": self.waited / self.steps,
        }
        peak, memory = peak_flops(jax.devices()[0].device_kind), memory_peak_gb()
        if peak is not None:
            row["perf/mfu"] = self.tokens * self.flops_per_token / seconds / (peak * jax.device_count())
        if memory is not None:
            row["perf/memory_peak_gb"] = memory
        self.restart()
        return row


class MetricWriter:
    """Writes `metrics.jsonl`, TensorBoard events and trackers: each step once, also after a resume.

    Rows after `last_step` are leftovers of a run that continued after its last checkpoint: they are dropped
    from the file, and TensorBoard's events are rewritten from the rest. Of a step with several rows the last
    is kept. A tracker gets all steps that it does not have: it keeps such leftovers, which it cannot drop,
    and what it lost when the run was killed is logged again.
    """

    def __init__(self, workdir: Path, last_step: int, trackers: Sequence[Tracker] = ()):
        from tensorboardX.event_file_writer import EventsWriter

        path = workdir / "metrics.jsonl"
        rows = {row["step"]: row for row in read_metrics(path) if row["step"] <= last_step}
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
        self.path, self.file = path, path.open("a")
        for old in (workdir / "tb").glob("events.*"):
            old.unlink()
        # Not its SummaryWriter, whose thread ends at a full disk and leaves the run waiting for it.
        (workdir / "tb").mkdir(exist_ok=True)
        self.tensorboard: EventsWriter | None = EventsWriter(str(workdir / "tb" / "events"))
        self.flushed, self.flush_every = time.monotonic(), 10.0  # seconds
        self.trackers = trackers
        for row in rows.values():
            self._to_tensorboard(row)
            self._to_trackers(row)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write one step's metrics, which are on disk on return. JSON has no NaN: such a value is null."""
        row = {"step": step, **{name: x if math.isfinite(x) else None for name, x in metrics.items()}}
        with naming(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self._to_tensorboard(row)
        self._to_trackers(row)

    def _to_trackers(self, row: dict[str, Any]) -> None:
        values = {name: x for name, x in row.items() if name != "step"}
        for tracker in self.trackers:
            tracker.log(row["step"], values)

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        if self.tensorboard is None:
            return
        try:
            for name, x in row.items():
                if name != "step" and x is not None:
                    event = Event(wall_time=time.time(), step=row["step"], summary=scalar(name, x))
                    self.tensorboard.write_event(event)
            if time.monotonic() - self.flushed > self.flush_every:
                self.tensorboard.flush()
                self.flushed = time.monotonic()
        except OSError as error:
            logging.warning("writing to TensorBoard failed; continuing without it: %s", error)
            writer, self.tensorboard = self.tensorboard, None
            with suppress(OSError):
                writer.close()

    def close(self) -> None:
        """Close the files and the trackers' runs."""
        with suppress(OSError):  # a full disk, which `write` has reported
            self.file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
        for tracker in self.trackers:
            tracker.finish()


class NoMetrics:
    """The writer of a process that is not the first of its run: the first writes for all."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""


def last_complete_row(step: int, resuming: bool, unfinished_row: Metrics | None) -> int:
    """The last step with a complete row in metrics.jsonl, where a run starts or resumes at `step`: the row of
    a step whose evaluation is repeated is written again."""
    return step - (unfinished_row is not None or not resuming)


def held_out_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The held-out metrics in the rows of a metrics.jsonl, without their standard errors."""
    names = {name for row in rows for name in row if name.startswith("eval/") and not name.endswith("_se")}
    return sorted(names)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Lines that are no rows, such as one that a killed process left incomplete,
    are counted on stderr and left out."""
    rows, unreadable = [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            row = json.loads(line)
            row["step"] += 0  # TypeError or KeyError where it is no row
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            unreadable += bool(line.strip())
    if unreadable:
        print(f"warning: {path}: {unreadable} unreadable line(s) left out", file=sys.stderr)
    return rows
