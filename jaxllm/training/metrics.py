"""Metrics of a run: from the sums that a step returns to named numbers, files, and throughput."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxllm.losses import Weighted
from jaxllm.training.state import Params

Metrics = dict[str, float]  # "area/name" -> number, as in a row of metrics.jsonl

# Dense bfloat16 matrix-product peak (no sparsity) in FLOP/s a chip, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
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
    known = [peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)]
    return known[0] if known else None


def memory_peak_gb() -> float | None:
    """Peak device memory so far in GB, or None where the backend does not count it."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats and "peak_bytes_in_use" in stats else None


class Throughput:
    """Speed of training between two calls of `read`, without pauses such as evaluation and saving.

    The loop adds to `steps` and to `waited`, the seconds spent waiting for batches.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float):
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.restart()

    def restart(self) -> None:
        """Restart the measurement, as after a pause."""
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def read(self) -> Metrics:
        """`perf/*` of the steps since the last reading or restart; empty if there were none."""
        if not self.steps:
            return {}
        step_time = (time.perf_counter() - self.start) / self.steps
        row = {
            "perf/tokens_per_second": self.tokens_per_step / step_time,
            "perf/step_time": step_time,
            "perf/data_wait": self.waited / self.steps,
        }
        peak, memory = peak_flops(jax.devices()[0].device_kind), memory_peak_gb()
        if peak is not None:
            row["perf/mfu"] = self.flops_per_step / step_time / (peak * jax.device_count())
        if memory is not None:
            row["perf/memory_peak_gb"] = memory
        self.restart()
        return row


class MetricWriter:
    """Writes `metrics.jsonl`, TensorBoard events and, if asked, wandb: each step once, also after a resume.

    Rows after `last_step` are leftovers of a run that continued after its last checkpoint: they are dropped
    from the file, and TensorBoard's events are rewritten from the rest.
    """

    def __init__(self, workdir: Path, last_step: int, wandb_project: str | None, config: dict[str, Any]):
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(replacement, path)
        self.file: TextIO = path.open("a")
        for old in (workdir / "tb").glob("events.*"):
            old.unlink()
        self.tensorboard = SummaryWriter(str(workdir / "tb"))
        self.wandb = start_wandb(wandb_project, workdir, config) if wandb_project else None
        for row in rows:
            self._to_tensorboard(row)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write one step's metrics, which are on disk on return. JSON has no NaN: such a value is null."""
        row = {"step": step, **{name: x if math.isfinite(x) else None for name, x in metrics.items()}}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._to_tensorboard(row)
        if self.wandb is not None:
            try:
                self.wandb.log({name: x for name, x in row.items() if name != "step"}, step=step)
            except Exception as error:
                logging.warning("logging to wandb failed; continuing without it: %s", error)
                self.wandb = None

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        for name, x in row.items():
            if name != "step" and x is not None:
                self.tensorboard.add_scalar(name, x, row["step"])

    def close(self) -> None:
        """Close the files and end the wandb run."""
        self.file.close()
        self.tensorboard.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:
                logging.warning("wandb failed to finish its run: %s", error)


def start_wandb(project: str, workdir: Path, config: dict[str, Any]) -> Any:
    """A wandb run, or None with a warning: a failing tracker does not stop training."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]

        return wandb.init(project=project, dir=str(workdir), config=config)
    except ImportError:
        logging.warning("wandb is not installed, continuing without it: pip install 'jaxllm[wandb]'")
    except Exception as error:
        logging.warning("wandb did not start, continuing without it: %s", error)
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a killed process left incomplete."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
