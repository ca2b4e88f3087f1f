"""Computes rewards beside the run, in worker processes that can be killed.

Each worker process belongs to one thread, which sends it samples and waits, with a time limit, for one
outcome after another. Processes are spawned, not forked, since JAX runs threads; they do not import jax.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import did_you_mean
from jaxllm.data.records import json_value
from jaxllm.errors import ConfigError, DataError
from jaxllm.rewards.load import load_reward
from jaxllm.rewards.worker import Outcome

_START_LIMIT = 120.0  # seconds for a worker to import its rewards
_CHECK_INTERVAL = 0.1  # seconds
_CHUNKS_PER_WORKER = 4  # so that workers finish at about the same time
_MAX_MESSAGES = 5


class Scores(NamedTuple):
    """The rewards of N samples (an example with its completion)."""

    total: np.ndarray  # float32 [N]: weighted sum of the rewards that apply
    by_name: dict[str, np.ndarray]  # float32 [N] each; NaN where the reward does not apply or the call failed
    applies: np.ndarray  # bool [N]: a reward of non-zero weight applies
    failed: np.ndarray  # bool [N]: a call of one failed, and no error_reward stands for it
    counters: dict[str, int]  # of faults, by the names under which they are logged
    messages: list[str]  # the first few distinct faults
    failures: Mapping[str, int] = types.MappingProxyType({})  # calls of each reward that failed

    @property
    def valid(self) -> np.ndarray:
        """Bool [N]: whether the total is a reward. Other samples train nothing and are in no statistic."""
        return self.applies & ~self.failed


def gather(parts: Sequence[Scores], rows: Sequence[int] | np.ndarray) -> Scores:
    """Scores of these rows of the concatenated parts."""

    def pick(columns: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(columns)[rows]

    return Scores(
        pick([part.total for part in parts]),
        {name: pick([part.by_name[name] for part in parts]) for name in parts[0].by_name},
        pick([part.applies for part in parts]),
        pick([part.failed for part in parts]),
        {name: sum(part.counters[name] for part in parts) for name in parts[0].counters},
        list(dict.fromkeys(message for part in parts for message in part.messages))[:_MAX_MESSAGES],
        {name: sum(part.failures[name] for part in parts) for name in parts[0].failures},
    )


def check_json(row: Mapping[str, Any]) -> None:
    """Raise DataError that names a column which JSON cannot hold."""
    for name, value in row.items():
        try:
            json.dumps(value, default=json_value)
        except (TypeError, ValueError) as error:
            raise DataError(f"column {name!r} cannot be written as JSON: {error}; leave it out") from None


class RewardPool:
    """A context that scores completions by the weighted sum of several rewards.

    Args:
      rewards: name -> what `load_reward` takes.
      weights: name -> weight.
      workers: number of processes; the scores do not depend on it.
      time_limit: seconds after which a call is killed.
      error_reward: reward of a call that is killed, raises or does not return a finite number; None: its
        sample has no valid total. Such calls are counted.
    """

    def __init__(
        self,
        rewards: Mapping[str, str],
        *,
        weights: Mapping[str, float],
        workers: int,
        time_limit: float,
        error_reward: float | None,
    ):
        _check(rewards, weights, workers, time_limit, error_reward)
        self._rewards, self._error_reward = dict(rewards), error_reward
        self._weights = [weights[name] for name in rewards]
        self._workers = [_Worker(list(rewards.values()), time_limit) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="reward")

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.reap()

    def submit(self, examples: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> "Pending":
        """Start scoring and return at once; `.result()` waits."""
        samples = [(dict(each), text) for each, text in zip(examples, completions, strict=True)]
        size = max(1, math.ceil(len(samples) / (len(self._workers) * _CHUNKS_PER_WORKER)))
        chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
        try:
            requests = [json.dumps(chunk, default=json_value).encode() for chunk in chunks]
        except (TypeError, ValueError) as error:
            raise DataError(f"the example of a reward must be representable in JSON: {error}") from None
        futures = [
            self._threads.submit(self._score, request, len(chunk))
            for request, chunk in zip(requests, chunks, strict=True)
        ]
        return Pending(futures, self._combine)

    def _score(self, request: bytes, size: int) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.score(request, size * len(self._rewards))
        finally:
            self._idle.put(worker)

    def _combine(self, outcomes: list[Outcome]) -> Scores:
        names = list(self._rewards)
        for number, outcome in enumerate(outcomes):
            if outcome.fault == "length":
                reward = self._rewards[names[number % len(names)]]
                raise ConfigError(f"reward {reward!r}: {outcome.message}; it must return one number")
        faults = [outcome.fault for outcome in outcomes]
        failed = np.array([fault != "" for fault in faults], bool).reshape(-1, len(names))
        values = [math.nan if each.value is None else each.value for each in outcomes]
        table = np.asarray(values, np.float64).reshape(-1, len(names))
        if self._error_reward is not None:
            table[failed], failed = self._error_reward, np.zeros_like(failed)
        weights = np.asarray(self._weights, np.float64)
        applies = ~np.isnan(table)
        messages = [
            f"reward {names[number % len(names)]!r}: {outcome.message}"
            for number, outcome in enumerate(outcomes)
            if outcome.fault
        ]
        return Scores(
            (np.where(applies, table, 0.0) @ weights).astype(np.float32),
            {name: table[:, column].astype(np.float32) for column, name in enumerate(names)},
            np.asarray(applies[:, weights != 0].any(axis=1)),
            np.asarray(failed[:, weights != 0].any(axis=1)),
            {"reward/timeouts": faults.count("timeout"), "reward/errors": faults.count("error")},
            list(dict.fromkeys(messages))[:_MAX_MESSAGES],
            {name: sum(map(bool, faults[i :: len(names)])) for i, name in enumerate(names)},
        )


def _check(
    rewards: Mapping[str, str],
    weights: Mapping[str, float],
    workers: int,
    time_limit: float,
    error_reward: float | None,
) -> None:
    """ConfigError for an argument that is not valid."""
    if not rewards:
        raise ConfigError("rewards must have at least one entry")
    for name in [*weights, *rewards]:
        if name not in rewards:
            raise ConfigError(f"weights.{name}: there is no such reward{did_you_mean(name, rewards)}")
        if name not in weights or not math.isfinite(weights[name]):
            raise ConfigError(f"weights.{name}: the reward {name!r} needs a finite weight")
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    if not (time_limit > 0 and math.isfinite(time_limit)):
        raise ConfigError(f"time_limit={time_limit} must be a positive number of seconds")
    if error_reward is not None and not math.isfinite(error_reward):
        raise ConfigError(f"error_reward={error_reward} must be finite")
    for reward in rewards.values():
        load_reward(reward)  # raises before any process is started


class Pending(NamedTuple):
    """Scores that are being computed."""

    futures: list[concurrent.futures.Future[list[Outcome]]]
    combine: Callable[[list[Outcome]], Scores]

    def result(self, check: Callable[[], None] | None = None) -> Scores:
        """Wait for the scores. `check` is called ten times a second meanwhile, and may raise to leave."""
        waiting = True
        while waiting:
            if check is not None:
                check()
            _, waiting = concurrent.futures.wait(
                self.futures, _CHECK_INTERVAL, concurrent.futures.FIRST_EXCEPTION
            )
            for future in self.futures:
                if future.done():
                    future.result()  # raises an error without waiting for the others
        return self.combine([outcome for future in self.futures for outcome in future.result()])


class _Worker:
    """One process at a time, started when needed; killed when a call takes too long, and then replaced."""

    def __init__(self, rewards: list[str], time_limit: float):
        self.rewards, self.time_limit = rewards, time_limit
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()  # its thread may start a process while close() runs
        self.closed = False

    def score(self, request: bytes, calls: int) -> list[Outcome]:
        """The outcomes of all calls of a request, in as many processes as needed."""
        outcomes: list[Outcome] = []
        while len(outcomes) < calls:
            if self.process is None or self.process.poll() is not None:
                self._start()
            try:
                self.connection.send_bytes(str(len(outcomes)).encode())
                self.connection.send_bytes(request)
                while len(outcomes) < calls:
                    if not self.connection.poll(self.time_limit):
                        self._kill()
                        outcomes.append(
                            Outcome(None, "timeout", f"took more than {self.time_limit:g} s and was killed")
                        )
                        break
                    outcomes.append(Outcome(*json.loads(self.connection.recv_bytes())))
            except (EOFError, OSError):
                self._kill()
                outcomes.append(Outcome(None, "error", "its process ended"))
        return outcomes

    def _start(self) -> None:
        self._kill()
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "jaxllm.rewards.worker"]
        arguments = [str(theirs.fileno()), str(self.time_limit), json.dumps(self.rewards)]
        with self.lock, theirs:
            if self.closed:
                raise RuntimeError("the reward pool is closed")
            self.process = subprocess.Popen(
                command + arguments,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints goes to stderr
                env=os.environ | {"PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # not reached by Ctrl-C; its child processes are killed with it
            )
            self.connection = ours
        try:
            if ours.poll(_START_LIMIT):
                message = ours.recv_bytes().decode()
            else:
                message = f"importing the rewards took more than {_START_LIMIT:g} s"
        except (EOFError, OSError):
            message = "a worker process ended while it imported its rewards"
        if message != "ready":
            self._kill()
            raise ConfigError(message)

    def _kill(self) -> None:
        with self.lock:
            self._signal()
            self.reap()

    def _signal(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for the end of a killed process, and close its connection."""
        if self.process is not None:
            self.process.wait()
            self.process = None
            self.connection.close()

    def close(self) -> None:
        """Kill the process and start no other. A thread that waits for it notices, and ends too."""
        with self.lock:
            self.closed = True
            self._signal()
