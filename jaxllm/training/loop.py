"""The host side of training: run the steps, read metrics one step late, evaluate, save, stop cleanly."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NoReturn

import jax
import numpy as np
import optax
from tqdm import tqdm

from jaxllm.batches import positions
from jaxllm.config import did_you_mean
from jaxllm.errors import ConfigError, NumericsError, Stopped
from jaxllm.losses import Weighted
from jaxllm.parallel import processes
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.metrics import Metrics, MetricWriter, NoMetrics, Throughput, to_scalars
from jaxllm.training.state import TrainState
from jaxllm.training.step import Batch
from jaxllm.training.watchdog import StopRequested, Watchdog


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to do what. Intervals are in optimizer steps; 0 is never."""

    steps: int
    evaluate_at_start: bool  # evaluate and sample the initial weights too, as step 0
    num_microbatches: int  # parts of a batch, computed one after another to save memory
    log_every: int
    evaluate_every: int  # and once at the end
    sample_every: int  # and once at the end
    checkpoint_every: int  # and once at the end
    patience: int  # stop after this many evaluations in a row do not improve checkpoint.best_metric; 0: never
    target: float | None  # stop once checkpoint.best_metric reaches this value; None: never
    max_bad_steps: int  # stop after this many steps in a row whose loss or gradient is not finite
    hang_timeout: float  # seconds without a step after which the run writes its stacks and exits; 0: never

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int | float) and name != "target" and value < 0:
                raise ConfigError(f"training.{name}={value} must not be negative")


@dataclass(frozen=True)
class Hook:
    """Something to run every `every` steps and after the last: (step, state) -> metrics of that step."""

    every: int
    run: Callable[[int, TrainState], Metrics]


@dataclass
class Loop:
    """All that a run needs to train, besides its state."""

    config: LoopConfig
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Weighted]]]  # compiled
    source: BatchSource
    schedule: optax.Schedule  # number of updates made -> learning rate
    hooks: tuple[Hook, ...]
    save: Callable[[int, TrainState, Metrics, bool], None]  # step, state, its metrics, whether all hooks ran
    wait: Callable[[], None]  # returns once everything saved is on disk
    writer: MetricWriter | NoMetrics
    throughput: Throughput
    watchdog: Watchdog
    early_stopping: EarlyStopping | None  # updated here; None: no metric is compared
    resume_command: str
    profile: tuple[int, int] | None  # first and last step to trace
    profile_folder: str
    tracing: bool = False
    row: Metrics = field(default_factory=dict)  # of the last step whose metrics are complete, also before
    warm: set[Hook] = field(default_factory=set)  # hooks that have run before, and so are compiled

    def run(self, state: TrainState, unfinished_row: Metrics | None = None) -> TrainState:
        """Train from state.step to config.steps.

        Args:
          unfinished_row: the metrics of the last step of a run that a signal stopped during the evaluation
            of that step, which is then repeated; {} evaluates the initial weights.

        Raises Stopped after a signal, once the state is saved; NumericsError after max_bad_steps.
        """
        start = int(state.step)
        self.progress = Progress(start, self.config.steps)
        if unfinished_row is not None:
            self._finish_step(start, state, unfinished_row)
        unread = None  # the latest step and its metrics, still on the device
        batches = self.source.batches(state, self.watchdog.check)
        self.throughput.restart()
        for step in range(start + 1, self.config.steps + 1):
            if self.early_stopping is not None and self.early_stopping.should_stop:
                break
            self._profile(step)
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopRequested:  # while a batch was being made: no step has used it
                if unread is not None:
                    self._finish_step(step - 1, state, self._read(*unread))
                self._stop(step - 1, state, self.row)
            self.throughput.waited += time.perf_counter() - began
            state, metrics = self.train_step(state, batch)
            self.source.after_step(state)
            if unread is not None:  # the device is busy with this step: reading the one before is free
                row = self._read(*unread)
                if due(step - 1, self.config.log_every):
                    self._write(step - 1, row | self.throughput.read())
            unread = (step, metrics)
            self.throughput.steps += 1
            self.throughput.tokens += positions(batch)
            self.watchdog.beat()
            self.watchdog.poll()
            if self._is_boundary(step):
                self._finish_step(step, state, self._read(*unread))
                unread = None
                self.throughput.restart()
        self._profile(self.config.steps + 1)
        self.progress.close()
        return state

    def _is_boundary(self, step: int) -> bool:
        """Whether `_finish_step` has something to do after this step."""
        intervals = (self.config.checkpoint_every, *(hook.every for hook in self.hooks))
        return (
            (self.watchdog.requested and self.source.can_stop_after(step))
            or step == self.config.steps
            or any(due(step, every) for every in intervals)
        )

    def _read(self, step: int, metrics: dict[str, Weighted]) -> Metrics:
        """One step's metrics as numbers. Waits for that step."""
        row = to_scalars(self.source.merge(step, metrics), "train")
        streak = int(row.pop("train/bad_streak"))
        if streak >= self.config.max_bad_steps:
            raise NumericsError(
                f"the loss or gradient was not finite in {streak} steps in a row, up to step {step} "
                f"(training.max_bad_steps); the parameters are unchanged since step {step - streak}. Lower "
                f"optimizer.learning_rate or set optimizer.clip_norm"
            )
        return self.source.finish_row(step, row)

    def _write(self, step: int, row: Metrics) -> None:
        if step > 0:  # step 0 is the initial weights: no update was made
            rate = self.schedule(step - int(row["train/skipped_steps"]) - 1)
            row["train/learning_rate"] = float(np.asarray(rate))
            row["train/tokens"] = float(step * self.throughput.tokens_per_step)
        self.writer.write(step, row)
        self.progress.show(step, row)

    def _finish_step(self, step: int, state: TrainState, row: Metrics) -> None:
        """Run what is due after a step: hooks, logging, a checkpoint, and stopping after a signal."""
        last = step == self.config.steps
        due_hooks = [hook for hook in self.hooks if hook.every and (last or due(step, hook.every))]
        row |= self.throughput.read()  # before the hooks take their time
        finished = True
        try:
            for hook in due_hooks:
                self.watchdog.check_together()
                with nullcontext() if hook in self.warm else self.watchdog.paused():
                    row = row | hook.run(step, state)
                self.warm.add(hook)
        except StopRequested:  # in every process: they agree before they leave
            finished, self.watchdog.requested = False, True
        is_best = False
        if finished and row and (due_hooks or last or due(step, self.config.log_every)):
            self._write(step, row)
            if self.early_stopping is not None:
                is_best = self._is_best(self.early_stopping, step, row, due_hooks)
                last = last or self.early_stopping.should_stop
        stopping = self.watchdog.requested
        self.row = row
        if stopping and not (last and finished):
            self._stop(step, state, row, finished)
        if last or (step > 0 and (is_best or due(step, self.config.checkpoint_every))):
            self.save(step, state, row, finished)

    def _stop(self, step: int, state: TrainState, row: Metrics, finished: bool = True) -> NoReturn:
        """Save, and end the run with Stopped."""
        self.save(step, state, row, finished)
        self.wait()
        processes.barrier(f"save of step {step}")  # exit code 75 of one process may end the others
        if self.watchdog.several:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped(f"by a signal, saved at step {step}; resume with: {self.resume_command}")

    def _is_best(self, early_stopping: EarlyStopping, step: int, row: Metrics, hooks: list[Hook]) -> bool:
        """Whether the step is the best so far. ConfigError if all hooks ran and none measured the metric."""
        metric = early_stopping.metric
        if metric in row:
            return early_stopping.update(step, row[metric])
        if hooks == [hook for hook in self.hooks if hook.every]:
            raise ConfigError(
                f"checkpoint.best_metric={metric} is not measured{did_you_mean(metric, row)}; "
                f"choose a metric that is, or none"
            )
        return False

    def _profile(self, step: int) -> None:
        """Start or stop the profiler before `step`: it traces the steps from `profile` that are run."""
        first, last = self.profile or (0, 0)
        wanted = processes.is_first() and first <= step <= min(last, self.config.steps)
        if wanted and not self.tracing:
            jax.profiler.start_trace(self.profile_folder)
        if self.tracing and not wanted:
            jax.profiler.stop_trace()
        self.tracing = wanted


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


class Progress:
    """A progress bar on a terminal, a line for every logged step elsewhere."""

    def __init__(self, start: int, steps: int):
        self.steps = steps
        self.bar = None
        if sys.stderr.isatty() and processes.is_first():
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def show(self, step: int, row: Metrics) -> None:
        """Print the metrics of a step that tell whether training works."""
        names = {
            "train/loss": "loss",
            "eval/loss": "eval loss",
            "eval/bits_per_byte": "eval bits/byte",
            "eval/accuracy": "accuracy",
            "eval/length_baseline": "length baseline",
            "reward/mean": "reward",
            "kl/reference": "KL",
            "eval/reward": "held-out reward",
            "eval/pass@1": "pass@1",
            "eval/rewards/accuracies": "accuracy",
            "eval/stopped_fraction": "held-out stopped",
        }
        values = {short: f"{row[name]:.4g}" for name, short in names.items() if name in row}
        if "perf/tokens_per_second" in row:
            values["tokens/s"] = f"{row['perf/tokens_per_second']:,.0f}"
        if self.bar is not None:
            self.bar.set_postfix(values)
            self.bar.update(step - self.bar.n)
            return
        if "perf/step_time" in row:
            left = (self.steps - step) * row["perf/step_time"]
            values["left"] = f"{int(left // 60)}:{int(left % 60):02d}"
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        print(f"step {step}/{self.steps}  {text}", flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
