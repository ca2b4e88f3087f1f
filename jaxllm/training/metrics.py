"""From the sums that a step returns to what a person reads: names, files, speed."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

import jax

# Dense bfloat16 matrix-product peak, FLOP/s a chip, from the makers' data sheets (no sparsity).
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


def to_scalars(metrics: dict[str, Any], area: str) -> dict[str, float]:
    """`Weighted` sums on the device to named Python floats (one transfer): `loss` to `area/loss`, while
    `policy/loss` has an area already."""
    fetched = jax.device_get(metrics)
    means = {name: float(w.sum) / float(w.weight) if w.weight else 0.0 for name, w in fetched.items()}
    return {name if "/" in name else f"{area}/{name}": mean for name, mean in means.items()}


def parameter_count(params: Any) -> int:
    """How many numbers a parameter tree (of arrays or shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def peak_flops(device: jax.Device) -> float | None:
    """The chip's bfloat16 peak, or None where it is not in the table: no figure beats a wrong one."""
    known = [peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)]
    return known[0] if known else None


def memory_peak_gb() -> float | None:
    """Most device memory used so far, GB, where the backend counts it."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats and "peak_bytes_in_use" in stats else None


class Throughput:
    """Speed between two readings, pauses (evaluation, saving) taken out."""

    def __init__(self, tokens_per_step: int, flops_per_step: float):
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading."""
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def read(self) -> dict[str, float]:
        """`perf/*` over the steps since the last reading; empty where there were none."""
        if not self.steps:
            return {}
        step_time = (time.perf_counter() - self.start) / self.steps
        row = {
            "perf/tokens_per_second": self.tokens_per_step / step_time,
            "perf/step_time": step_time,
            "perf/data_wait": self.waited / self.steps,
        }
        peak, memory = peak_flops(jax.devices()[0]), memory_peak_gb()
        if peak is not None:
            row["perf/mfu"] = self.flops_per_step / step_time / (peak * jax.device_count())
        if memory is not None:
            row["perf/memory_peak_gb"] = memory
        self.restart()
        return row


class MetricWriter:
    """`metrics.jsonl` and TensorBoard always, wandb where asked: each step once, also after a resume.

    Rows after `last_step` are leftovers of a run that went on after its last checkpoint: they are
    dropped from the file, and TensorBoard's events are written anew from it.
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

    def write(self, step: int, row: dict[str, float]) -> None:
        """One step's metrics, on disk when this returns. JSON has no NaN: such a value is null."""
        row = {"step": step} | {name: x if math.isfinite(x) else None for name, x in row.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._to_tensorboard(row)
        if self.wandb is not None:
            try:
                self.wandb.log({name: x for name, x in row.items() if name != "step"}, step=step)
            except Exception as error:
                logging.warning("wandb failed and is left out from here on: %s", error)
                self.wandb = None

    def _to_tensorboard(self, row: dict[str, float]) -> None:
        for name, x in row.items():
            if name != "step" and x is not None:
                self.tensorboard.add_scalar(name, x, row["step"])

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:
                logging.warning("wandb failed at the end: %s", error)


def start_wandb(project: str, workdir: Path, config: dict[str, Any]) -> Any:
    """A wandb run, or None with a warning: a tracker that fails never stops a run."""
    try:
        import wandb

        return wandb.init(project=project, dir=str(workdir), config=config)
    except ImportError:
        logging.warning("wandb is not installed, going on without: pip install 'jaxllm[wandb]'")
    except Exception as error:
        logging.warning("wandb did not start, going on without: %s", error)
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
