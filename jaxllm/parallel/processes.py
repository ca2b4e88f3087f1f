"""One run in several processes, on one host or many: how they start, agree and fail together.

Process 0 is the first: it decides what depends on a disk, and writes the run's files. All processes run the
same program and call the functions below in the same order. They talk through the key-value store of JAX's
coordination service, which runs in process 0; arrays go between devices (`jaxllm.parallel.global_arrays`).
In a single process everything here returns at once.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import distributed  # no public name: pyproject.toml bounds the version of jax
from jax.experimental import multihost_utils

from jaxllm import errors
from jaxllm.errors import ConfigError, ProcessLost, RunError, Stopped
from jaxllm.parallel.cluster import Place, find_place

T = TypeVar("T")

TIMEOUT = 600.0  # seconds for all to reach a barrier
NO_TIMEOUT = 7 * 24 * 3600.0  # where one may compile or read for long: the watchdog limits the rest
JOIN = 300.0  # seconds for all to start
ANSWER = 10.0  # seconds for a process to answer a roll call
FAREWELL = 1.0  # seconds from telling the others of a failure to the end
HEARTBEAT = int(os.environ.get("JAXLLM_HEARTBEAT", "100"))  # seconds without one: JAX ends the others

_listeners: list[threading.Thread] = []
_counts: dict[str, int] = {}  # calls so far by name, so that every call has keys of its own


# Start


def initialize(place: Place, timeout: float = JOIN) -> None:
    """Join the other processes, before JAX touches a device. Raises ConfigError where process 0 cannot be
    reached in `timeout` seconds; where others are missing then, JAX aborts process 0 (exit code 134)."""
    if place.index > 0:
        _reach(place, timeout)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.gpus,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"process {place.index} of {place.count} cannot join at {place.coordinator}: {reason}"
        ) from None


def _reach(place: Place, timeout: float) -> None:
    """Wait until process 0 listens. JAX itself would end the process without a word on the reason."""
    host, _, port = place.coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"process {place.index} of {place.count} cannot reach process 0 at {place.coordinator} "
                    f"in {timeout:.0f} s ({error.strerror or error}): start all, with an address of "
                    "process 0 that the others reach and a port that is open"
                ) from None
            time.sleep(0.5)


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Join the other processes, if there are any (`find_place`). A context in which they fail together: what
    is raised in one ends all of them with its message and its exit code."""
    place = find_place(coordinator, num_processes, process_id)
    if place is None:
        yield
        return
    initialize(place)
    _listen("jaxllm/failure", _end_with)
    _listen("jaxllm/roll_call", lambda _: _client().key_value_set(f"jaxllm/here/{place.index}", "", True))
    try:
        yield
        _part()
    except Stopped:
        _part()
        raise
    except BaseException as error:
        code = error.exit_code if isinstance(error, RunError) else RunError.exit_code
        _tell(f"{error}".partition("\n")[0] or type(error).__name__, code)
        atexit.register(_leave, code)
        raise


def _part() -> None:
    """End the connection, once all processes are here, and with it the threads that listen: an interpreter
    that ends while they wait in C++ aborts."""
    barrier("end")
    jax.distributed.shutdown()
    for thread in _listeners:
        thread.join(ANSWER)


def is_first() -> bool:
    """Whether this process decides and writes; the only one does."""
    return jax.process_index() == 0


def coordinator() -> str | None:
    """HOST:PORT of process 0; None in a single process."""
    return distributed.global_state.coordinator_address


@contextlib.contextmanager
def own_output(folder: Path) -> Iterator[None]:
    """A context in which processes other than the first print into `folder/process-INDEX.txt`."""
    if is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / f"process-{jax.process_index()}.txt").open("a", buffering=1) as file,
        contextlib.redirect_stdout(file),
    ):
        yield


# Agreement


def exchange(name: str, value: str = "", timeout: float = TIMEOUT) -> list[str]:
    """What every process gives here, in the order of the processes; a barrier by the name of `name`.

    Raises ProcessLost, which names the missing processes, where not all of them are here in `timeout`
    seconds after the first.
    """
    if jax.process_count() == 1:
        return [value]
    client, key = _client(), _next_key(name)
    client.key_value_set(f"{key}/{jax.process_index()}", value)
    began = time.monotonic()
    try:
        client.wait_at_barrier(key, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        waited = time.monotonic() - began
        lost = set(range(jax.process_count())) - _found(key)
        raise ProcessLost(
            f"{name}: {named(sorted(lost))} not here after {waited:.0f} s; {RELAUNCH}"
            if lost
            else f"{name}: {str(error).partition(chr(10))[0]}"
        ) from None
    return [
        text
        for _, text in sorted((_number(path), text) for path, text in client.key_value_dir_get(f"{key}/"))
    ]


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Wait until all processes are here. Raises ProcessLost as `exchange` does."""
    exchange(name, timeout=timeout)


def any_process(name: str, flag: bool, timeout: float = NO_TIMEOUT) -> bool:
    """Whether the flag is set in any process."""
    return any(exchange(name, "1" if flag else "", timeout)) if jax.process_count() > 1 else flag


def reached_stop(call: int) -> bool:
    """Whether all processes are to stop at this call, after a SIGTERM to any of them; without waiting.

    Calls are numbered, the same in all processes. JAX's preemption service chooses the number.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(call)


def on_stop(act: Callable[[], None]) -> None:
    """Call `act` from another thread, once, when any of several processes has had a SIGTERM."""
    _listen("RECEIVED_PREEMPTION_NOTICE", lambda _: act())  # the preemption service's own key


def first_process_decides(choose: Callable[[], T]) -> T:
    """Return in every process what `choose()` returns in process 0, a JSON value: their views of a disk may
    differ. Whatever it raises there ends the call everywhere: a RunError as itself."""
    if jax.process_count() == 1:
        return choose()
    client, key = _client(), _next_key("decision")
    if jax.process_index() == 0:
        try:
            choice = choose()
        except BaseException as error:
            failure = [type(error).__name__, str(error)]
            client.key_value_set(key, json.dumps({"failure": failure}))
            raise
        client.key_value_set(key, json.dumps({"choice": choice}))
        return choice
    found = json.loads(client.blocking_key_value_get(key, int(1000 * NO_TIMEOUT)))
    if "failure" in found:
        name, message = found["failure"]
        kind = getattr(errors, name, RunError)
        raise kind(f"process 0: {message}")
    return found["choice"]


def together(name: str, act: Callable[[], T]) -> list[T]:
    """What `act()`, a JSON value, returns in each process. What it raises in one ends the call in all, there
    as a RunError. May be called from another thread, with names of its own."""
    if jax.process_count() == 1:
        return [act()]
    failure, own = None, {}
    try:
        own = {"value": act()}
    except Exception as error:
        failure, own = error, {"failure": f"{type(error).__name__}: {error}".partition("\n")[0]}
    found = [json.loads(text) for text in exchange(name, json.dumps(own), NO_TIMEOUT)]
    if failure is not None:
        raise failure
    for process, each in enumerate(found):
        if "failure" in each:
            raise RunError(f"process {process}: {each['failure']}")
    return [each["value"] for each in found]


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """The first process runs the block before the others: what it leaves on a disk they find there."""
    if not is_first():
        exchange(name, timeout=NO_TIMEOUT)
    yield
    if is_first():
        exchange(name, timeout=NO_TIMEOUT)


def check_equal(name: str, value: str, error: type[RunError]) -> None:
    """Raise `error`, which names the processes that differ from process 0, where values are not the same."""
    found = exchange(name, value)
    if different := [i for i, each in enumerate(found) if each != found[0]]:
        numbers = ", ".join(map(str, different))
        raise error(f"{name} is not that of process 0 in process {numbers}: give all of them the same files")


# Failure

RELAUNCH = "start the job again, and it resumes"


def missing(timeout: float = ANSWER) -> list[int]:
    """The processes that do not answer a roll call: killed, stopped, or cut off."""
    answered: set[int] = set()

    def call() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set("jaxllm/roll_call", "", True)
            end = time.monotonic() + timeout
            while len(answered) < jax.process_count() and time.monotonic() < end:
                time.sleep(0.2)
                answered.update(_found("jaxllm/here"))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout + 2)  # the coordinator itself may be what does not answer
    return sorted(set(range(jax.process_count())) - answered) if answered else [0]


@contextlib.contextmanager
def naming_lost() -> Iterator[None]:
    """A context in which work that fails because another process ended is an error that names it. The process
    then ends at once: what it would wait for on its way out may need the lost one."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ProcessLost) as error:
        if jax.process_count() == 1:
            raise
        lost = missing()
        if not lost and not isinstance(error, ProcessLost):
            raise
        end_lost(lost or str(error))


def end_lost(lost: list[int] | str) -> None:
    """Say in all processes which ones are lost, or what else happened, and end this one."""
    message = lost if isinstance(lost, str) else f"{named(lost)} not answering; {RELAUNCH}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    _tell(message, ProcessLost.exit_code)
    _leave(ProcessLost.exit_code)


def named(indices: list[int]) -> str:
    """`process 1 is`, `processes 1, 3 are`."""
    numbers = ", ".join(map(str, indices))
    return f"process {numbers} is" if len(indices) == 1 else f"processes {numbers} are"


def _tell(message: str, code: int) -> None:
    """End the others. The first failure is the one that they hear of."""

    def tell() -> None:
        content = json.dumps({"process": jax.process_index(), "message": message, "code": code})
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set("jaxllm/failure", content)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(ANSWER)


def _end_with(content: str) -> None:
    """End this process, wherever it waits, after another one failed."""
    found = json.loads(content)
    if found["process"] != jax.process_index():
        line = f"error: process {found['process']}: {found['message']}"
        print(line, file=sys.stderr if is_first() else sys.stdout, flush=True)
        if is_first():
            time.sleep(3 * FAREWELL)  # JAX aborts a process that outlives the coordinator
        _flush()
        os._exit(found["code"])


def _leave(code: int) -> None:
    """End the process without JAX's farewell, which waits for all others; but not before they have heard."""
    time.sleep(FAREWELL)
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


# The key-value store


def _client() -> Any:
    return distributed.global_state.client


def _next_key(name: str) -> str:
    _counts[name] = _counts.get(name, 0) + 1
    return f"jaxllm/{name.replace('/', ' ')}/{_counts[name]}"


def _number(path: str) -> int:
    return int(path.rpartition("/")[2])


def _found(key: str) -> set[int]:
    """The processes that have set KEY/INDEX."""
    return {_number(path) for path, _ in _client().key_value_dir_get(f"{key}/")}


def _listen(key: str, act: Callable[[str], None]) -> None:
    """Call `act` with the value of a key once it is set, in a thread that does not keep the process alive."""

    def wait() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the end of the run
            act(_client().blocking_key_value_get(key, int(1000 * NO_TIMEOUT)))

    thread = threading.Thread(target=wait, daemon=True, name=key)
    thread.start()
    _listeners.append(thread)
