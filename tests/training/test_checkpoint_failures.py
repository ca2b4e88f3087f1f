"""Full disks, kills, several processes: a failed save is an error, and the older checkpoints remain."""

import errno
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import make_state, save

from jaxllm.errors import CheckpointError
from jaxllm.training import checkpoint
from jaxllm.training.checkpoint import Checkpoints, read_arrays
from jaxllm.training.step_folder import damage, find_checkpoint


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_before_anything_is_written_or_deleted(small_disk):
    checkpoints = Checkpoints(small_disk, keep=1)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, {"x": jnp.zeros(1 << 20)}, {})
    message = str(caught.value)
    assert message.startswith("step 2 was not saved: the disk is full: 0.00419 GB needed, 0.000")
    assert message.endswith(f"GB free in {small_disk}")
    assert checkpoints.steps() == [1]
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


def test_a_disk_that_fills_up_while_orbax_writes_is_an_error_at_the_next_call(checkpoints, monkeypatch):
    wait = checkpoints._orbax.wait_until_finished

    def fill_up():
        wait()
        if threading.current_thread().name == "save":  # Orbax waits as well, before it starts a save
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 751317 bytes: No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fill_up)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="step 1 was not saved: the disk is full: "):
        checkpoints.save(2, make_state(2), {})
    assert not (checkpoints.folder / "1").exists()


def test_orbax_does_not_log_the_errors_that_it_raises():
    def is_logged(path):
        return logging.getLogger("absl").filter(
            logging.LogRecord("absl", logging.ERROR, path, 1, "", (), None)
        )

    assert not is_logged("site-packages/orbax/checkpoint/_src/futures/future.py")
    assert is_logged("site-packages/grain/python/data_loader.py")


def test_an_error_after_the_save_is_raised_and_the_step_is_kept(tmp_path):
    def closed(line):
        raise BrokenPipeError("Broken pipe")

    checkpoints = Checkpoints(tmp_path, keep=1, log=closed)
    with pytest.raises(
        CheckpointError, match="step 1 was saved, but logging or cleanup failed: BrokenPipeError: Broken pipe"
    ):
        save(checkpoints, 1)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT])
def test_a_failed_last_save_is_an_exception(checkpoints, monkeypatch, cause):
    def fail(path, content):
        raise OSError(cause, os.strerror(cause))

    monkeypatch.setattr(checkpoint, "write_file", fail)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="step 1 was not saved: the disk is full"):
        checkpoints.wait()
    assert not (checkpoints.folder / "1").exists()


def test_an_error_of_orbax_is_one_line(checkpoints):
    with pytest.raises(CheckpointError, match="step 1 was not saved: ValueError"):
        checkpoints.save(1, {"empty": jnp.zeros((0, 3))}, {})


# Kills

SAVE_FOREVER = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxllm.errors import CheckpointError
from jaxllm.training.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), keep=2, log=lambda line: print(line, flush=True))
state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "x": jax.ShapeDtypeStruct((1 << 17,), jnp.float32)}
last = checkpoints.restore(None, state)[1]["step"] if checkpoints.steps() else 0
for step in range(last + 1, last + 500):  # until killed
    checkpoints.save(step, {"step": jnp.int32(step), "x": jnp.full(1 << 17, 1.0 * step)}, {"step": step})
"""


def test_a_kill_at_any_moment_keeps_the_last_saved_step(tmp_path):
    last = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, tmp_path], stdout=subprocess.PIPE, text=True
        )
        lines = [process.stdout.readline()]  # the first save, then a random moment
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        reported = int(lines[-1].split()[-1])
        assert reported > last
        folder = find_checkpoint(tmp_path)
        last = json.loads((folder / "metadata.json").read_bytes())["step"]
        assert last in (reported, reported + 1)
        x = read_arrays(folder, jax.ShapeDtypeStruct((1 << 17,), jnp.float32), prefix="x")
        np.testing.assert_array_equal(x, float(last))


# Several processes

ONE_OF_TWO = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxllm.errors import CheckpointError
from jaxllm.files import is_url
from jaxllm.store import copy_of
from jaxllm.training.checkpoint import Checkpoints

jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
state = {"x": jax.make_array_from_callback((8,), rows, lambda index: jnp.arange(8.0)[index])}
url = is_url(sys.argv[1])
checkpoints = Checkpoints(copy_of(sys.argv[1], int(sys.argv[3])) if url else Path(sys.argv[1]), keep=1)
checkpoints.save(1, state, {})
checkpoints.save(1, state, {})  # by neither process again
restored, _ = checkpoints.restore(None, state)
assert (restored["x"].addressable_shards[0].data == state["x"].addressable_shards[0].data).all()
try:
    checkpoints.restore(9, state)
except CheckpointError as error:
    print("not found")
"""


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_two_processes_save_one_checkpoint_and_agree_on_errors(tmp_path, scheme):
    """On a shared disk; on a store, each with a disk of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, f"{scheme}{tmp_path}/run", str(port), str(index)],
            stdout=subprocess.PIPE,
            env={**os.environ, "JAXLLM_CACHE_DIR": f"{tmp_path}/cache-{index}"},
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [("saved step 1" in lines, "not found" in lines) for lines in outputs] == [
        (True, True),
        (False, True),
    ]
    folder = tmp_path / "run" / "1"
    assert damage(folder) is None
    x = read_arrays(folder, jax.ShapeDtypeStruct((8,), jnp.float32), prefix="x")
    np.testing.assert_array_equal(x, np.arange(8.0))
