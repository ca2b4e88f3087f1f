"""Run trials as processes of this machine, so many at a time, each pinned to its share of it."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxllm.errors import ConfigError, NumericsError, Stopped
from jaxllm.files import locked
from jaxllm.sweep.machine import Share
from jaxllm.sweep.record import LOGS, Sweep
from jaxllm.sweep.trials import Trial

POLL = 0.5  # seconds between two looks at the processes
STILL_SAVING = 120.0  # seconds that a run is waited for whose sweep was killed

# A killed sweep cannot stop its trials; Linux does, as a SIGTERM would (1 is PR_SET_PDEATHSIG).
_PINNED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "cores = [int(core) for core in sys.argv[1].split(',') if core]; "
    "cores and os.sched_setaffinity(0, cores); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclasses.dataclass
class Running:
    trial: Trial
    share: Share
    process: subprocess.Popen
    began: float
    pruned: bool = False


def run_trials(
    sweep: Sweep,
    trials: Iterator[Trial],
    command: Callable[[Trial], Sequence[str]],
    shares: Sequence[Share],
    *,
    retries: int,
    report: Callable[[Trial], None],
    should_prune: Callable[[Trial], bool] = lambda trial: False,
) -> None:
    """Run each trial to its end; the next one is taken whenever a share is free.

    A crashed trial is started again `retries` times. One that a signal from elsewhere stopped (exit code 75)
    resumes. A config error (78) or divergence (70) would only repeat itself.

    Args:
      report: called when a trial ends.
      should_prune: asked while a trial runs; it is then stopped by SIGTERM, so that its state is saved.

    Raises Stopped after SIGINT or SIGTERM, once all trials have saved; a second signal kills them.
    """
    free, running = list(shares), []
    with _signals() as signals:
        told = 0
        try:
            while True:
                while free and not signals and (trial := next(trials, None)) is not None:
                    trial.attempts = 0
                    running.append(_start(sweep, trial, command(trial), free.pop(0)))
                if not running:
                    break
                time.sleep(POLL)
                for each in list(running):
                    code = each.process.poll()
                    if code is None:
                        if len(signals) > told:
                            each.process.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)
                        elif not each.pruned and should_prune(each.trial):
                            each.pruned = True
                            each.process.terminate()
                        continue
                    running.remove(each)
                    _end(sweep, each, code, bool(signals), retries)
                    if each.trial.status == "waiting":
                        running.append(_start(sweep, each.trial, command(each.trial), each.share))
                    else:
                        free.append(each.share)
                        report(each.trial)
                told = len(signals)
        finally:  # of an error of ours: none runs on unwatched
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.wait()
    if signals:
        raise Stopped("every trial has stopped; the same command again continues from what each has saved")


def _start(sweep: Sweep, trial: Trial, command: Sequence[str], share: Share) -> Running:
    _wait_for_lock(sweep.folder / trial.name)
    log = sweep.folder / LOGS / f"{trial.name}.txt"
    log.parent.mkdir(exist_ok=True)
    trial.status, trial.attempts = "running", trial.attempts + 1
    sweep.save()
    if sys.platform == "linux":
        command = [sys.executable, "-c", _PINNED, ",".join(map(str, share.cores)), *command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **share.environment},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops each trial once
        )
    return Running(trial, share, process, time.perf_counter())


def _end(sweep: Sweep, ended: Running, code: int, stopping: bool, retries: int) -> None:
    """Set what has become of the trial: "waiting" if it is to be started again."""
    trial = ended.trial
    trial.exit_code, trial.message = code, ""
    trial.seconds += time.perf_counter() - ended.began
    if code == 0:
        trial.status = "finished"
    elif ended.pruned and code in (Stopped.exit_code, -signal.SIGTERM):
        trial.status = "pruned"
    elif stopping and code in (Stopped.exit_code, -signal.SIGTERM, -signal.SIGKILL):
        trial.status = "stopped"
    elif code == Stopped.exit_code:
        trial.status, trial.attempts = "waiting", trial.attempts - 1
    else:
        log = (sweep.folder / LOGS / f"{trial.name}.txt").read_text(errors="replace")
        trial.message = " ".join(log.strip().splitlines()[-1:])
        again = code not in (ConfigError.exit_code, NumericsError.exit_code) and trial.attempts <= retries
        trial.status = "diverged" if code == NumericsError.exit_code else "failed"
        if again:
            trial.status = "stopped" if stopping else "waiting"
    if trial.status != "waiting":
        sweep.observe(trial)
    sweep.save()


def _wait_for_lock(folder: Path) -> None:
    """Until a run whose sweep was killed has saved and ended."""
    deadline = time.monotonic() + STILL_SAVING
    while (folder / "lock").exists() and time.monotonic() < deadline:
        try:
            locked(folder / "lock").close()
        except BlockingIOError:
            time.sleep(POLL)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that come, in place of what they would do."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
