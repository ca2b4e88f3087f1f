"""What may end a run from outside its steps: a signal, or a hang."""

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import jax

from jaxllm.errors import ProcessLost
from jaxllm.parallel import processes

EXIT_HANG = ProcessLost.exit_code


T = TypeVar("T")


class StopRequested(Exception):
    """Raised by the checks of a `Watchdog` after a signal, to leave an evaluation or a rollout early."""


def leave_together(work: Callable[[], T]) -> T:
    """What `work` returns, which each process does on its own. Where one leaves it by StopRequested, all do
    once they are done."""
    results = []
    with suppress(StopRequested):
        results.append(work())
    if processes.any_process("stop", not results):
        raise StopRequested
    return results[0]


class Watchdog:
    """A context that turns the first SIGTERM or SIGINT into a request to stop, and a hang into exit code 71.

    The second signal ends the process at once; the last checkpoint stays valid. A hang is a time of
    max(hang_timeout, 10 x the median time between beats) without a `beat`: the stacks of all threads are
    written to logs/hang.txt.

    In a run of several processes a signal to one of them stops all, after the same step: SIGTERM is left to
    JAX's preemption service, which tells the others. Only a second SIGINT ends a process at once, since those
    that the scheduler sends reach the processes at different times.
    """

    def __init__(self, workdir: Path, hang_timeout: float):
        """`hang_timeout` is in seconds; 0: nothing counts as a hang."""
        self.requested = False
        self.hang_timeout = hang_timeout
        self.several = jax.process_count() > 1
        self.log = workdir / "logs" / (f"hang-{jax.process_index()}.txt" if self.several else "hang.txt")
        self.notified = False  # whether this process knows of a signal to one of several
        self.interrupted = False  # by a first SIGINT, which is passed on as a SIGTERM
        self.polls = 0
        self.intervals: list[float] = []
        self.last_beat: float | None = None  # None while no beat is expected
        self.closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        numbers = (signal.SIGINT,) if self.several else (signal.SIGTERM, signal.SIGINT)
        self.previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        if self.several:
            processes.on_stop(self._on_notice)
        if self.hang_timeout:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def beat(self) -> None:
        """Tell the watchdog that a step is done."""
        now = time.monotonic()
        if self.last_beat is not None:
            self.intervals = [*self.intervals[-99:], now - self.last_beat]
        self.last_beat = now

    def check(self) -> None:
        """To be called during long work between steps: it counts as a beat.

        Raises StopRequested if a signal has come; in each of several processes at its own time.
        """
        if self.requested or self.notified:
            raise StopRequested
        if self.last_beat is not None:
            self.last_beat = time.monotonic()

    def check_together(self) -> None:
        """`check` in work that several processes do together: all leave it at the same call."""
        if self.several:
            self.notified = processes.any_process("stop", self.notified)
        self.check()

    def poll(self) -> None:
        """To be called after every step: sets `requested` in several processes at the same step."""
        if self.several:
            self.requested |= processes.reached_stop(self.polls)
            self.polls += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing counts as a hang: a first call may compile for minutes."""
        self.last_beat = None
        yield
        self.last_beat = time.monotonic()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.requested or self.interrupted:
            os._exit(128 + number)
        if self.several:  # as the scheduler would
            self.interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.requested = True
        name = signal.Signals(number).name
        message = f"\n{name}: saving and stopping after this step; a second signal stops at once, unsaved"
        print(message, file=sys.stderr, flush=True)

    def _on_notice(self) -> None:
        self.notified = True
        if processes.is_first():
            print("\na signal: all processes save and stop after the same step", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.hang_timeout / 4)):
            last, limit = self.last_beat, self.hang_timeout
            if self.intervals:
                limit = max(limit, 10 * statistics.median(self.intervals))
            if last is not None and time.monotonic() - last > limit:
                message = f"error: no step finished in {limit:.0f} s (training.hang_timeout); the stacks are"
                try:
                    self.log.parent.mkdir(parents=True, exist_ok=True)
                    with self.log.open("w") as file:
                        faulthandler.dump_traceback(file, all_threads=True)
                    print(f"{message} in {self.log}", file=sys.stderr, flush=True)
                except OSError as error:  # a full disk, or the disk is what hangs
                    print(f"{message} here, since {self.log}: {error.strerror}", file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                if self.several:
                    processes.end_lost(processes.missing() or f"no step finished in {limit:.0f} s")
                os._exit(EXIT_HANG)
