"""benchmarks/contestants.py: implementations in processes of their own take turns."""

import os
import time
from functools import partial
from operator import attrgetter

import pytest

from benchmarks.contestants import Turns, compare, ratio


def contestant(seconds: float, megabytes: int, turns: Turns) -> None:
    held = bytearray(b"x") * (megabytes << 20)

    def step() -> tuple[int, float, int]:
        time.sleep(seconds)
        return os.getpid(), time.monotonic(), len(held)

    turns.repeat(step)


def broken(turns: Turns) -> None:
    turns.begin()
    raise ValueError("no such kernel")


def test_contestants_take_turns_each_in_a_process_with_its_own_time_and_peak_memory():
    slow, fast = partial(contestant, 0.1, 200), partial(contestant, 0.001, 0)
    results = compare({"slow": slow, "fast": fast}, rounds=2, warm_up=1)
    assert [len(turns) for turns in results.values()] == [2, 2]
    order = sorted((turn.value[1], name) for name, turns in results.items() for turn in turns)
    assert [name for _, name in order] == ["slow", "fast"] * 2
    processes = {name: {turn.value[0] for turn in turns} for name, turns in results.items()}
    assert len(processes["slow"] | processes["fast"] | {os.getpid()}) == 3
    assert results["slow"][0].peak_bytes - results["fast"][0].peak_bytes > 190 << 20
    assert ratio(results["slow"], results["fast"], attrgetter("seconds")) > 5


def test_a_contestant_that_fails_ends_the_measurement_and_is_named():
    with pytest.raises(RuntimeError, match=r"^theirs failed: see its traceback"):
        compare({"theirs": broken}, rounds=1)
