"""Several processes are one run: which devices and rows each has, and how they agree and fail together.

tests/runs/test_several_processes.py trains with them.
"""

import signal
import socket
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_runs import start_processes

from jaxllm.errors import ConfigError
from jaxllm.parallel.cluster import Place, find_place, gpus_of
from jaxllm.parallel.global_arrays import own_mesh, own_rows, share
from jaxllm.parallel.processes import initialize
from jaxllm.parallel.sharding import (
    AXES,
    MeshConfig,
    across_slices,
    batch_sharding,
    make_mesh,
    order_of_devices,
)

# Rows and devices


class PlayedSharding:
    """A sharding as the process sees it that has these devices."""

    def __init__(self, sharding, own):
        self.sharding, self.own = sharding, own

    def addressable_devices_indices_map(self, shape):
        found = self.sharding.devices_indices_map(shape)
        return {device: index for device, index in found.items() if device in self.own}


class PlayedDevice:
    """A device of a process, and perhaps of a slice."""

    device_kind, platform = "played", "cpu"

    def __init__(self, number, process, slice_index=0):
        self.id, self.process_index, self.slice_index = number, process, slice_index

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def with_sequence(shape):
    """(data, fsdp, tensor) as the sizes of all axes."""
    data, fsdp, tensor = shape
    return data, fsdp, 1, tensor


def played_mesh(shape, process_of):
    """A mesh (data, fsdp, tensor) whose device i belongs to process process_of[i]."""
    devices = np.array([PlayedDevice(i, process) for i, process in enumerate(process_of)], object)
    return SimpleNamespace(devices=devices.reshape(with_sequence(shape)), axis_names=AXES)


@pytest.mark.parametrize(
    ("mesh", "first", "second"),
    [
        ((8, 1, 1), [0, 1, 2, 3], [4, 5, 6, 7]),
        ((2, 2, 2), [0, 1, 2, 3], [4, 5, 6, 7]),
        ((1, 8, 1), [0, 1, 2, 3], [4, 5, 6, 7]),
        ((1, 1, 8), [*range(8)], [*range(8)]),  # tensor crosses processes: each needs every row
    ],
    ids=str,
)
def test_the_rows_of_a_process_follow_from_the_sharding(mesh, first, second):
    sharding = batch_sharding(make_mesh(MeshConfig(*mesh)))
    halves = jax.devices()[:4], jax.devices()[4:]
    assert [own_rows(PlayedSharding(sharding, half), 8).tolist() for half in halves] == [first, second]


def test_a_process_whose_devices_lie_apart_has_rows_that_lie_apart():
    devices = np.array(jax.devices()).reshape(4, 2, 1, 1)
    own = own_rows(PlayedSharding(batch_sharding(Mesh(devices, AXES)), set(devices[:, 0].flat)), 16)
    assert own.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]


@pytest.mark.parametrize(
    ("shape", "process_of", "expected"),
    [
        ((4, 1, 1), [0, 0, 1, 1], (2, 1, 1)),
        ((1, 4, 1), [0, 0, 1, 1], (1, 2, 1)),
        ((1, 2, 2), [0, 0, 1, 1], (1, 1, 2)),
        ((1, 1, 4), [0, 0, 1, 1], (2, 1, 1)),  # tensor crosses processes
        ((2, 1, 2), [0, 1, 0, 1], (2, 1, 1)),
        ((2, 2, 1), [0, 1, 1, 0], (2, 1, 1)),  # no block of the mesh
    ],
    ids=str,
)
def test_a_process_samples_on_its_part_of_the_mesh_or_on_all_its_devices(
    monkeypatch, shape, process_of, expected
):
    monkeypatch.setattr("jaxllm.parallel.global_arrays.Mesh", lambda devices, names, axis_types: devices)
    mesh = played_mesh(shape, process_of)
    mesh.axis_types = ()
    own = own_mesh(mesh, 1)
    assert own.shape == with_sequence(expected)
    assert {device.process_index for device in own.flat} == {1}


@pytest.mark.parametrize(("number", "sizes"), [(8, [2, 2, 2, 2]), (5, [1, 1, 2, 1]), (2, [0, 1, 1, 0])])
def test_things_are_shared_in_order_and_about_equally(monkeypatch, number, sizes):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    found = []
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(np.arange(number)[share(number)])
    assert [len(part) for part in found] == sizes
    assert np.concatenate(found).tolist() == [*range(number)]


@pytest.mark.parametrize(
    ("shape", "outer"),
    [((4, 2, 1), (2, 1, 1)), ((2, 2, 2), (2, 1, 1)), ((1, 8, 1), (1, 2, 1)), ((1, 2, 4), (1, 2, 1))],
    ids=str,
)
def test_slices_lie_along_data_or_else_along_fsdp(shape, outer):
    devices = [PlayedDevice(i, i // 2, slice_index=i // 4) for i in range(8)]
    shape, outer = with_sequence(shape), with_sequence(outer)
    slices = np.vectorize(lambda device: device.slice_index)(across_slices(shape, 2, devices))
    inner = [size // times for size, times in zip(shape, outer, strict=True)]
    for index, block in enumerate(np.ndindex(*outer)):
        part = slices[tuple(slice(b * n, (b + 1) * n) for b, n in zip(block, inner, strict=True))]
        assert (part == index).all()


def test_tensor_does_not_cross_slices():
    devices = [PlayedDevice(i, i // 2, slice_index=i // 4) for i in range(8)]
    with pytest.raises(
        ConfigError, match=r"tensor=8 over 2 slices.*make mesh.data or mesh.fsdp divisible by 2"
    ):
        across_slices((1, 1, 1, 8), 2, devices)


def test_the_order_of_devices_names_process_and_device():
    assert order_of_devices(played_mesh((2, 1, 2), [0, 0, 1, 1])) == (
        "data x fsdp x sequence x tensor = [[[[0.0 0.1]]] [[[1.0 1.1]]]]"
    )


# Where a process stands


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, None),  # one task takes them all
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "3"}, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "1"}, [4, 5, 6, 7]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "2", "SLURM_LOCALID": "3"}, [3]),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0", "SLURM_LOCALID": "3"},
            None,
        ),  # bound
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "2,3"}, [2, 3]),
    ],
)
def test_a_task_of_slurm_takes_its_share_of_the_gpus(environment, gpus):
    assert gpus_of({"SLURM_PROCID": "0", **environment}) == gpus


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_slurm_says_where_a_process_stands_unless_it_is_to_be_alone(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_place(None, None, None) == Place("node03:61457", 2, 1, None)
    assert find_place(None, 1, None) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place(None, None, None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--num_processes and --process_id missing: .* all three"),
        (("host:1", 2, None), "--process_id missing"),
        (("host:1", 2, 2), "--process_id=2 must be from 0 to 1"),
        (("host", 2, 0), "--coordinator=host must be HOST:PORT of process 0"),
    ],
)
def test_incomplete_flags_are_an_error(flags, message):
    with pytest.raises(ConfigError, match=message):
        find_place(*flags)


def test_a_coordinator_that_does_not_listen_is_an_error_with_its_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"process 1 of 2 cannot reach process 0 at {address} in .*refused"):
        initialize(Place(address, 2, 1, None), timeout=0.1)


def test_without_flags_and_cluster_a_process_is_alone():
    assert find_place(None, None, None) is None


# Together

START = """
import os, signal, sys, time
import jax, numpy as np
from pathlib import Path
from jaxllm import errors
from jaxllm.parallel import processes
from jaxllm.parallel.global_arrays import gather, own_copy, own_mesh, place, to_host
from jaxllm.parallel.sharding import MeshConfig, batch_sharding, make_mesh, shardings
from jaxllm.training.watchdog import StopRequested, Watchdog, leave_together

folder, (coordinator, count, me) = Path(sys.argv[1]), (sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
processes.ANSWER = 2.0


def caught(work, *args, **options):
    try:
        return work(*args, **options)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


def decide(choice=None, error=None):
    assert me == 0, "only the first process decides"
    if error is not None:
        raise error
    return choice

"""

AGREE = """
with processes.joined(coordinator, count, me):
    assert processes.exchange("name", f"from {me}") == ["from 0", "from 1"]
    assert [processes.any_process("flag", flag) for flag in (False, me == 1)] == [False, True]
    assert processes.first_process_decides(lambda: decide("/a/path")) == "/a/path"
    caught(processes.first_process_decides, lambda: decide(error=errors.NoCheckpoint("none here")))
    caught(processes.first_process_decides, lambda: decide(error=KeyError("a bug")))
    with processes.first_alone("cache"):
        if me == 0:
            time.sleep(0.3)
            (folder / "cache").touch()
        assert (folder / "cache").exists()
    caught(processes.check_equal, "data", f"fingerprint {me}", errors.DataError)

    def leave():
        if me == 1:
            raise StopRequested
        return "done"

    caught(leave_together, leave)
    rows = gather({"x": np.arange(3 * me, dtype=np.float32)}, {"from": me})
    assert [x["x"].tolist() for x, _ in rows] == [[], [0.0, 1.0, 2.0]]
    assert [facts for _, facts in rows] == [{"from": 0}, {"from": 1}]

    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    for sizes in ((1, 4, 1), (2, 1, 2), (1, 1, 4)):
        mesh = make_mesh(MeshConfig(*sizes))
        assert (to_host(place(values, batch_sharding(mesh))) == values).all()
        params = {"embed": {"table": values}}
        params = jax.tree.map(place, params, shardings(params, mesh))
        for replicate in (True, False):
            copy = own_copy(params, mesh, replicate)["embed"]["table"]
            assert copy.is_fully_addressable and copy.sharding.mesh == own_mesh(mesh)
            assert (np.asarray(copy) == values).all()
    if me == 0:
        caught(processes.barrier, "a save", timeout=0.5)
    else:
        time.sleep(1.0)
    print("agreed")
"""

FAIL = """
with processes.joined(coordinator, count, me):
    if me == 1:
        raise errors.DataError("rows.jsonl:3: no prompt")
    jax.block_until_ready(processes.multihost_utils.process_allgather(np.zeros(1)))
"""

HANG = """
with processes.joined(coordinator, count, me):
    processes.barrier("start")
    if me == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with Watchdog(folder, 0.5) as watchdog:
        watchdog.beat()
        jax.block_until_ready(processes.multihost_utils.process_allgather(np.zeros(1)))
"""


def outcomes(tmp_path, program):
    """Exit code and output of each of two processes."""
    started = start_processes(["-c", START + program, str(tmp_path)], 2, devices=2, positional=True)
    found = []
    for process in started:
        output = process.communicate(timeout=60)[0]
        found.append((process.returncode, output))
        for other in started:  # one that is stopped for good
            if process.returncode == 71:
                other.send_signal(signal.SIGKILL)
    return found


def test_processes_agree_on_values_flags_failures_and_arrays(tmp_path):
    for index, (code, output) in enumerate(outcomes(tmp_path, AGREE)):
        assert code == 0, output
        lines = [
            ["NoCheckpoint: none here", "KeyError: 'a bug'"],
            ["NoCheckpoint: process 0: none here", "RunError: process 0: 'a bug'"],
        ][index]
        lines += ["DataError: data is not that of process 0 in process 1: ", "StopRequested", "agreed"]
        lines += [] if index else ["ProcessLost: a save: process 1 is not here after "]
        for line in lines:
            assert line in output


def test_an_error_in_one_process_ends_all_with_its_message_and_code(tmp_path):
    (code, output), (failed, other) = outcomes(tmp_path, FAIL)
    assert (code, failed) == (78, 78)
    assert "error: process 1: rows.jsonl:3: no prompt" in output
    assert "DataError" in other


def test_a_process_that_hangs_is_named_and_the_others_exit_with_71(tmp_path):
    (code, output), _ = outcomes(tmp_path, HANG)
    assert code == 71, output
    assert "error: process 1 is not answering; start the job again, and it resumes" in output
    assert (tmp_path / "logs" / "hang-0.txt").exists()
