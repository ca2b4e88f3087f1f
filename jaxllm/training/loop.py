"""The host's side of training: feed steps, read metrics one step late, save, stop in good order."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from jaxllm.config import did_you_mean
from jaxllm.errors import ConfigError, NumericsError, Stopped
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.metrics import MetricWriter, Throughput, to_scalars
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import StopRequested, Watchdog


@dataclass(frozen=True)
class LoopConfig:
    """How long, and what happens how often. Intervals are in optimiser steps; 0 is never."""

    steps: int
    evaluate_at_start: bool  # score and sample the weights a run begins with, as step 0
    num_microbatches: int  # pieces a batch is computed in, one after another, to save memory
    log_every: int
    evaluate_every: int  # and once at the end
    sample_every: int  # and once at the end
    checkpoint_every: int  # and once at the end
    patience: int  # evaluations in a row without a better checkpoint.best_metric that end the run; 0: none
    target: float | None  # value of checkpoint.best_metric that ends the run; None: none does
    max_bad_steps: int  # so many steps in a row without a finite loss and gradient stop the run
    hang_timeout: float  # seconds without a step after which the run dumps its stacks and exits


@dataclass(frozen=True)
class Hook:
    """Something to run every so many steps and after the last: (step, state) -> metrics for that step."""

    every: int
    run: Callable[[int, TrainState], dict[str, float]]


@dataclass
class Loop:
    """What a run is made of besides its state."""

    config: LoopConfig
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]  # compiled
    feed: BatchSource  # of batches
    schedule: Callable[[int], Any]  # updates made -> learning rate
    hooks: tuple[Hook, ...]
    save: Callable[[int, TrainState, dict[str, float], bool], None]  # step, state, its row, is that finished
    wait: Callable[[], None]  # until all that was saved is on disk
    writer: MetricWriter
    throughput: Throughput
    watch: Watchdog
    best: EarlyStopping | None  # kept up to date here; None: nothing is compared
    resume_command: str
    profile: tuple[int, int] | None  # first and last step to trace
    profile_folder: str
    tracing: bool = False
    row: dict[str, float] = field(default_factory=dict)  # of the last step that was finished
    warm: set[Hook] = field(default_factory=set)  # hooks that have run, and so are compiled

    def run(self, state: TrainState, unfinished_row: dict[str, float] | None = None) -> TrainState:
        """Train from state.step to config.steps.

        `unfinished_row` is what a stopped run had measured of its last step before its evaluation was cut
        short; {} has the weights at the start evaluated.

        Raises Stopped after a signal, once the state is saved; NumericsError after max_bad_steps.
        """
        start = int(state.step)
        self.progress = Progress(start, self.config.steps)
        if unfinished_row is not None:
            self._finish_step(start, state, unfinished_row)
        late = None
        batches = self.feed.batches(state, self.watch.check)
        self.throughput.restart()
        for step in range(start + 1, self.config.steps + 1):
            if self.best is not None and self.best.over:
                break
            self._profile(step)
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopRequested:  # while a batch was made, which no step has seen
                if late is not None:
                    self._finish_step(step - 1, state, self._read(*late))
                self._stop(step - 1, state, self.row)
            self.throughput.waited += time.perf_counter() - asked
            state, metrics = self.train_step(state, batch)
            self.feed.observe(state)
            if late is not None:  # the device is busy with this step: reading the one before costs nothing
                row = self._read(*late)
                if due(step - 1, self.config.log_every):
                    self._write(step - 1, row | self.throughput.read())
            late = (step, metrics)
            self.throughput.steps += 1
            self.watch.beat()
            if self._is_boundary(step):
                self._finish_step(step, state, self._read(*late))
                late = None
                self.throughput.restart()
        self._profile(self.config.steps + 1)
        self.progress.close()
        return state

    def _is_boundary(self, step: int) -> bool:
        intervals = (self.config.checkpoint_every, *(hook.every for hook in self.hooks))
        return (
            (self.watch.requested and self.feed.may_stop(step))
            or step == self.config.steps
            or any(due(step, every) for every in intervals)
        )

    def _read(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """One step's metrics as numbers. Waits for that step."""
        row = to_scalars(metrics, "train")
        streak = int(row.pop("train/bad_streak"))
        if streak >= self.config.max_bad_steps:
            raise NumericsError(
                f"the loss or gradient was not finite in {streak} steps in a row up to step {step} "
                f"(training.max_bad_steps); the parameters are those before them. Lower "
                f"optimizer.learning_rate or set optimizer.clip_norm"
            )
        return self.feed.complete(step, row)

    def _write(self, step: int, row: dict[str, float]) -> None:
        if step > 0:
            row["train/learning_rate"] = float(self.schedule(step - int(row["train/skipped_steps"]) - 1))
            row["train/tokens"] = float(step * self.throughput.tokens_per_step)
        self.writer.write(step, row)
        self.progress.show(step, row)

    def _finish_step(self, step: int, state: TrainState, row: dict[str, float]) -> None:
        """All that is due after a step: hooks, its row, a checkpoint, the end if a signal asked for it."""
        last = step == self.config.steps
        due_hooks = [hook for hook in self.hooks if hook.every and (last or due(step, hook.every))]
        row |= self.throughput.read()  # before the hooks take their time
        finished = True
        try:
            for hook in due_hooks:
                self.watch.check()
                with nullcontext() if hook in self.warm else self.watch.paused():
                    row = row | hook.run(step, state)
                self.warm.add(hook)
        except StopRequested:
            finished = False
        is_best = False
        if finished and row and (due_hooks or last or due(step, self.config.log_every)):
            self._write(step, row)
            if self.best is not None:
                is_best = self._compare(step, row, due_hooks)
                last = last or self.best.over
        stopping = self.watch.requested
        self.row = row
        if stopping and not (last and finished):
            self._stop(step, state, row, finished)
        if last or (step > 0 and (is_best or due(step, self.config.checkpoint_every))):
            self.save(step, state, row, finished)

    def _stop(self, step: int, state: TrainState, row: dict[str, float], finished: bool = True) -> NoReturn:
        """Save, and end the run in good order."""
        self.save(step, state, row, finished)
        self.wait()
        raise Stopped(f"by a signal, saved at step {step}; resume with: {self.resume_command}")

    def _compare(self, step: int, row: dict[str, float], hooks: list[Hook]) -> bool:
        """Whether the step is the best yet; ConfigError where all hooks have run and nothing was measured."""
        if self.best.metric in row:
            return self.best.update(step, row[self.best.metric])
        if hooks == [hook for hook in self.hooks if hook.every]:
            raise ConfigError(
                f"checkpoint.best_metric={self.best.metric} is not measured"
                f"{did_you_mean(self.best.metric, row)}; choose another, or none"
            )
        return False

    def _profile(self, step: int) -> None:
        """Trace from the first wanted step that this process takes to the last one."""
        first, last = self.profile or (0, 0)
        wanted = first <= step <= min(last, self.config.steps)
        if wanted and not self.tracing:
            jax.profiler.start_trace(self.profile_folder)
        if self.tracing and not wanted:
            jax.profiler.stop_trace()
        self.tracing = wanted


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


class Progress:
    """A bar on a terminal, a line for every logged step elsewhere."""

    def __init__(self, start: int, steps: int):
        self.steps = steps
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def show(self, step: int, row: dict[str, float]) -> None:
        names = {
            "train/loss": "loss",
            "eval/loss": "eval loss",
            "eval/bits_per_byte": "eval bits/byte",
            "eval/accuracy": "accuracy",
            "eval/length_baseline": "by length",
            "reward/mean": "reward",
            "kl/reference": "KL",
            "eval/reward": "held-out reward",
            "eval/pass@1": "pass@1",
            "eval/rewards/accuracies": "accuracy",
            "eval/stopped_fraction": "answers that end",
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
        if self.bar is not None:
            self.bar.close()
