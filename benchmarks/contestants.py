"""Measure implementations side by side: each in a process of its own, one turn at a time.

In one process they would share an allocator and its settings, thread pools and peak memory. A contestant is a
function of one argument, `Turns`, that sets up and then takes one turn after another:

    def ours(size: int, turns: Turns) -> None:
        step = make_step(size)              # not timed
        turns.repeat(step)                  # what a step returns becomes `Turn.value`

    results = compare({"ours": partial(ours, 8), "theirs": theirs}, rounds=10, warm_up=2)

Where a library owns the loop, its callbacks call `turns.begin()` and `turns.end(value)` instead. A contestant
is pickled: a function of a module, or a `partial` of one.
"""

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """One turn of one contestant."""

    seconds: float
    cpu_seconds: float  # of all threads of its process
    peak_bytes: int  # the most memory that its process has had so far, compilation included
    value: Any  # what the contestant gave to `Turns.end`


class Turns:
    """A contestant's side: when its turns begin and end."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def begin(self) -> None:
        """Wait for the turn; ends the process when the measurement is over."""
        self.connection.send(None)
        if not self.connection.recv():
            raise SystemExit
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def end(self, value: Any = None) -> None:
        """Report the turn."""
        seconds, cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.cpu_began
        self.connection.send(Turn(seconds, cpu_seconds, peak_memory(), value))

    def repeat(self, step: Callable[[], Any]) -> None:
        """Call `step` once a turn. It must wait for its results: JAX computes asynchronously."""
        while True:
            self.begin()
            self.end(step())


Contestant = Callable[[Turns], None]


def peak_memory() -> int:
    """Bytes of memory that this process has had at most. (getrusage would count its parent's, too.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def compare(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int,
    warm_up: int = 0,
    variables: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, list[Turn]]:
    """All turns of every contestant, without the `warm_up` first of each.

    `variables`: of a contestant's environment, by its name; the settings of malloc that this process was
    started with are not passed on.

    They set up one after the other, then take one turn each in every round, so that load on the machine
    affects all. Raises RuntimeError where a contestant fails; its traceback is on stderr.
    """
    spawn = multiprocessing.get_context("spawn")
    processes, connections = {}, {}
    results: dict[str, list[Turn]] = {name: [] for name in contestants}

    def receive(name: str) -> Any:
        try:
            return connections[name].recv()
        except EOFError:
            raise RuntimeError(f"{name} failed: see its traceback above") from None

    try:
        for name, contestant in contestants.items():
            os.environ.pop("GLIBC_TUNABLES", None)
            os.environ.update((variables or {}).get(name, {}))
            connections[name], theirs = spawn.Pipe()
            processes[name] = spawn.Process(target=_run, args=(contestant, theirs))
            processes[name].start()
            theirs.close()
            receive(name)
        for _ in range(warm_up + rounds):
            for name, connection in connections.items():
                connection.send(True)
                results[name].append(receive(name))
                receive(name)  # ready for the next turn
        for name, connection in connections.items():
            connection.send(False)
            processes[name].join(timeout=60)
    finally:
        for process in processes.values():
            process.terminate()
    return {name: turns[warm_up:] for name, turns in results.items()}


def _run(contestant: Contestant, connection: Connection) -> None:
    contestant(Turns(connection))


def ratio(slower: list[Turn], faster: list[Turn], figure: Callable[[Turn], float]) -> float:
    """The median over the rounds of `figure(slower) / figure(faster)`."""
    return statistics.median(figure(a) / figure(b) for a, b in zip(slower, faster, strict=True))
