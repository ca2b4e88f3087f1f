"""Results come in the order of the items, few of which are read ahead; no process is waited for in vain."""

import os
import sys
import time
import types

import pytest

from jaxllm.data import worker_pool
from jaxllm.data.worker_pool import map_in_order, num_processes
from jaxllm.errors import DataError


def slow_for_even(number):
    time.sleep(0.02 * (number % 2 == 0))
    return number, os.getpid()


def test_results_come_in_order_from_several_processes_and_few_items_are_read_ahead(tmp_path, monkeypatch):
    script = tmp_path / "script.py"  # without `if __name__ == "__main__"`
    script.write_text("raise SystemExit(1)")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    read, taken = [], []

    def items():
        for number in range(30):
            read.append(number)
            yield number

    processes = set()
    for number, process in map_in_order(slow_for_even, items(), 2):
        taken.append(number)
        processes.add(process)
        assert len(read) - len(taken) <= 2 * 2
    assert taken == list(range(30))
    assert os.getpid() in processes  # the first items
    assert len(processes) > 1


def test_few_items_start_no_process(monkeypatch):
    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", None)
    assert list(map_in_order(abs, [-1, -2], 2)) == [1, 2]
    assert list(map_in_order(abs, range(-9, 0), 1)) == list(range(9, 0, -1))


def test_a_process_that_is_killed_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(worker_pool, "_ALONE", 0)
    with pytest.raises(DataError, match=r"one of 2 processes that read the data has ended") as error:
        list(map_in_order(os._exit, [9] * 4, 2))
    assert "\n" not in str(error.value)


def test_as_many_processes_as_cores_that_this_one_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert num_processes() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)), raising=False)
    assert num_processes() == 32
