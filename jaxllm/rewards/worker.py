"""The process that calls rewards. `pool` starts and kills it; it ends soon after the pool in any case.

`python -m jaxllm.rewards.worker FD TIME_LIMIT REWARDS` writes `ready` to the socket FD and then, for each
request, one `Outcome` a call. Messages are JSON, so that neither side can make the other execute code.
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
from jaxllm.rewards.load import Reward, error_line, error_place, load_reward

FLOAT32_MAX = 3.4028234663852886e38
_GRACE = 3.0  # seconds over the time limit after which a worker ends itself


class Outcome(NamedTuple):
    """The result of one call of one reward."""

    value: float | None  # None: the reward does not apply, or there was a fault
    fault: str = ""  # "error", "timeout", or "length" if the function returned several values
    message: str = ""


def call(reward: Reward, example: dict[str, Any], completion: str) -> Outcome:
    """The outcome of a call, whatever it returns or raises."""
    try:
        value = reward(example, completion)
        if value is None:
            return Outcome(None)
        if isinstance(value, list | tuple) or getattr(value, "shape", ()) != ():
            returned: Any = value
            return Outcome(None, "length", f"returned a {type(value).__name__} of {len(returned)} values")
        if not isinstance(value, numbers.Real) and not hasattr(value, "shape"):
            return Outcome(None, "error", f"returned a {type(value).__name__}, not a number")
        number = float(value)
    except BaseException as error:  # sys.exit() in a reward ends the call, not the process
        has = f"; the row has {', '.join(example)}" if isinstance(error, KeyError) else ""
        return Outcome(None, "error", f"{error_line(error)} ({error_place(error)}){has}")
    if math.isnan(number) or abs(number) > FLOAT32_MAX:
        return Outcome(None, "error", f"returned {number}")
    return Outcome(number)


def main() -> None:
    # A signal to the whole job is handled by the run, which ends its workers after saving.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    descriptor, time_limit, names = sys.argv[1:]
    os.set_inheritable(int(descriptor), False)  # a process that a reward starts must not keep the socket open
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
            _score(connection, rewards, samples, done, float(time_limit))
    except (EOFError, OSError):  # the pool has ended
        return


def _score(
    connection: Connection,
    rewards: list[Reward],
    samples: list[tuple[dict[str, Any], str]],
    done: int,
    time_limit: float,
) -> None:
    """Send an outcome for each (sample, reward), starting with number `done`."""
    armed = -math.inf
    with open(os.devnull, "w") as null:
        for number in range(done, len(samples) * len(rewards)):
            # The pool kills a call that takes too long. If the pool itself was killed, this watchdog does,
            # even where the call holds the GIL forever. Setting it takes longer than a cheap reward, so it is
            # set once a second only.
            if time.monotonic() - armed > 1:
                faulthandler.dump_traceback_later(time_limit + _GRACE, exit=True, file=null)
                armed = time.monotonic()
            example, completion = samples[number // len(rewards)]
            outcome = call(rewards[number % len(rewards)], dict(example), completion)
            connection.send_bytes(json.dumps(outcome).encode())
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
