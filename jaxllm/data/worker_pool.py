"""A function of many items, on all cores, with the results in the order of the items."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from jaxllm.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

MOST_PROCESSES = 32  # one process can read the rows of about as many
_ALONE = 3  # items that are not worth the second in which processes start


def num_processes() -> int:
    """The cores that this process may use (`taskset` and SLURM restrict them), at most MOST_PROCESSES."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(len(affinity(0)) if affinity else os.cpu_count() or 1, MOST_PROCESSES)


def map_in_order(function: Callable[[T], R], items: Iterable[T], processes: int) -> Generator[R, None, None]:
    """`function` of each item, in their order. It and the items must be picklable.

    The first items, and all of them where `processes` is 1, are processed here. At most twice as many items
    as processes are read ahead. Raises DataError where a process ends, and what `function` raises.
    """
    items = iter(items)
    yield from map(function, islice(items, _ALONE if processes > 1 else None))
    for item in items:
        yield from _map_in_processes(function, chain([item], items), processes)


def _map_in_processes(
    function: Callable[[T], R], items: Iterable[T], processes: int
) -> Generator[R, None, None]:
    # Not forked: JAX and the tokenizers have threads, whose locks a forked child would wait for forever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(function,))
    waiting = deque()
    try:
        for item in items:
            if len(waiting) == 2 * processes:
                yield waiting.popleft().result()
            with _without_main():  # which may start a process
                waiting.append(pool.submit(_call, item))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {processes} processes that read the data has ended, perhaps for lack of memory; run the "
            "same command again, or use fewer cores (taskset --cpu-list 0-3)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start here do not import the script: one that does not ask for its `__name__` would run
    as a whole in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_function: Callable[[Any], Any] | None = None  # of a worker process


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for items forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
