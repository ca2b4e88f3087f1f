"""The process that calls rewards: started by `pool`, killed by it, and gone soon after it.

`python -m jaxllm.rewards.worker FD TIME_LIMIT REWARDS` answers `ready` on the socket FD and then, for each
request, one `Outcome` a call. Messages are JSON, so that neither side can make the other run anything.
"""

import faulthandler
import json
import math
import numbers
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from jaxllm.errors import ConfigError
from jaxllm.rewards.load import Reward, load_reward, place, what

FLOAT32_MAX = 3.4028234663852886e38
_GRACE = 3.0  # seconds over the time limit after which a worker ends itself


class Outcome(NamedTuple):
    """What one call of one reward came to."""

    value: float | None  # None: the reward does not apply, or there was a fault
    fault: str = ""  # "error", "timeout", or "length" where the function answered for several completions
    message: str = ""


def call(reward: Reward, example: dict[str, Any], completion: str) -> Outcome:
    """The outcome of a call that comes back, whatever it comes back with."""
    try:
        value = reward(example, completion)
        if value is None:
            return Outcome(None)
        if isinstance(value, list | tuple) or getattr(value, "shape", ()) != ():
            return Outcome(None, "length", f"returned a {type(value).__name__} of {len(value)} values")
        if not isinstance(value, numbers.Real) and not hasattr(value, "shape"):
            return Outcome(None, "error", f"returned a {type(value).__name__}, not a number")
        number = float(value)
    except BaseException as error:  # sys.exit() in a reward ends the call, not the process
        has = f"; the row has {', '.join(example)}" if isinstance(error, KeyError) else ""
        return Outcome(None, "error", f"{what(error)} ({place(error)}){has}")
    if math.isnan(number) or abs(number) > FLOAT32_MAX:
        return Outcome(None, "error", f"returned {number}")
    return Outcome(number)


def main() -> None:
    # A signal to the whole job is for the run to answer: it ends its workers when it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    descriptor, time_limit, names = sys.argv[1:]
    os.set_inheritable(int(descriptor), False)  # what a reward starts must not keep the socket open
    connection = Connection(int(descriptor))
    try:
        rewards = [load_reward(name) for name in json.loads(names)]
    except ConfigError as error:
        connection.send_bytes(str(error).encode())
        return
    connection.send_bytes(b"ready")
    try:
        while True:
            done, samples = int(connection.recv_bytes()), json.loads(connection.recv_bytes())
            _answer(connection, rewards, samples, done, float(time_limit))
    except (EOFError, OSError):  # the pool has gone
        return


def _answer(
    connection: Connection,
    rewards: list[Reward],
    samples: list[tuple[dict[str, Any], str]],
    done: int,
    time_limit: float,
) -> None:
    """Send an outcome for each (sample, reward) from number `done` on."""
    armed = -math.inf
    with open(os.devnull, "w") as nowhere:
        for number in range(done, len(samples) * len(rewards)):
            # The pool kills a call that takes too long. Where the pool itself was killed nobody would, and a
            # call may hold Python's lock for ever: this watchdog does without it. Setting it costs more than
            # a cheap reward, so once a second will do.
            if time.monotonic() - armed > 1:
                faulthandler.dump_traceback_later(time_limit + _GRACE, exit=True, file=nowhere)
                armed = time.monotonic()
            example, completion = samples[number // len(rewards)]
            outcome = call(rewards[number % len(rewards)], dict(example), completion)
            connection.send_bytes(json.dumps(outcome).encode())
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
