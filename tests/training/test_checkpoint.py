"""A checkpoint is whole or it does not count, and what is read back is what was saved, on any mesh."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.training import checkpoint
from jaxllm.training.checkpoint import (
    Checkpoints,
    checkpoint_hash,
    damage,
    find_checkpoint,
    read_arrays,
)


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any


def make_state(step=1, width=4):
    """Every kind of leaf a run has: optax states, a typed key, bfloat16, scalars."""
    params = {
        "layers": {"query": jnp.arange(8.0 * width).reshape(8, width) + step},
        "embedding": jnp.full((8, 2), step, jnp.bfloat16),
    }
    return State(jnp.int32(step), params, optax.adamw(1e-3).init(params), jax.random.key(step))


def shardings(state, shape):
    """Rows of every matrix over both axes of a mesh, the rest replicated."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: rows if leaf.ndim == 2 else replicated, state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(found, expected):
    def same(a, b):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, strict=True)

    jax.tree.map(same, found, expected)


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=10)
    yield checkpoints
    checkpoints.wait()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()


# ---- what is saved comes back


def test_state_metadata_and_files_come_back_as_they_were(checkpoints):
    state = make_state(7)
    checkpoints.save(7, state, {"loss": 0.5}, {"tokenizer.model": b"\x00\xff"})
    restored, metadata = checkpoints.restore(None, abstract(make_state(0)))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    assert metadata == {"loss": 0.5}
    assert (checkpoints.folder / "7/tokenizer.model").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("saved_on", [(8, 1), (1, 1)])
@pytest.mark.parametrize("restored_on", [(8, 1), (2, 4), (1, 1)])
def test_restore_on_another_mesh(checkpoints, saved_on, restored_on):
    state = make_state(3)
    checkpoints.save(3, jax.device_put(state, shardings(state, saved_on)), {})
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, restored_on)
    )
    restored, _ = checkpoints.restore(3, target)
    assert_same(restored, state)
    assert restored.params["layers"]["query"].sharding == target.params["layers"]["query"].sharding


def test_the_state_may_be_donated_as_soon_as_save_returns(checkpoints):
    state = make_state(1, width=1 << 16)
    expected = jax.tree.map(jnp.copy, state)
    checkpoints.save(1, state, {})
    params = jax.jit(lambda params: jax.tree.map(lambda x: x * 0 - 1, params), donate_argnums=0)(state.params)
    jax.block_until_ready(params)
    restored, _ = checkpoints.restore(1, abstract(expected))
    assert_same(restored, expected)


def test_weights_can_be_read_without_the_rest(checkpoints):
    state = make_state(3)
    checkpoints.save(3, jax.device_put(state, shardings(state, (8, 1))), {})
    checkpoints.wait()
    folder = find_checkpoint(checkpoints.folder)
    assert_same(read_arrays(folder, abstract(state.params), prefix="params"), state.params)
    assert_same(read_arrays(folder, state.key, prefix="key"), state.key)


def test_an_array_asked_for_without_a_sharding_comes_to_the_first_device(checkpoints):
    state = make_state(3)
    checkpoints.save(3, jax.device_put(state, shardings(state, (8, 1))), {})
    restored, _ = checkpoints.restore(3, jax.eval_shape(lambda: state))
    assert_same(restored, state)
    assert restored.params["embedding"].devices() == {jax.devices()[0]}


def test_saving_a_step_again_leaves_it_alone(checkpoints):
    save(checkpoints, 3)
    checkpoints.save(3, make_state(99), {})
    assert_same(checkpoints.restore(3, abstract(make_state()))[0], make_state(3))


# ---- what does not fit


STATE = make_state(1)
EMBEDDING = STATE.params["embedding"]


def with_params(**params):
    """STATE with parameters set, or left out where None."""
    params = {name: leaf for name, leaf in (STATE.params | params).items() if leaf is not None}
    return abstract(STATE._replace(params=params))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (with_params(embeding=EMBEDDING), "embeding is not in it, did you mean 'params/embedding'?"),
        (with_params(embedding=None), "embedding is in it, not here"),
        (with_params(embedding=EMBEDDING[:4]), "embedding is bfloat16[8,2] in it, bfloat16[4,2] here"),
        (with_params(embedding=jnp.zeros((8, 2))), "embedding is bfloat16[8,2] in it, float32[8,2] here"),
        (
            abstract(STATE._replace(key=jax.random.key(1, impl="rbg"))),
            "key is key<fry>[] in it, key<rbg>[] here",
        ),
    ],
)
def test_an_array_that_does_not_fit_is_named_with_both_shapes(checkpoints, target, message):
    save(checkpoints, 1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(1, target)
    assert str(caught.value).startswith(f"{checkpoints.folder}/1 does not fit: ")
    assert str(caught.value).endswith(message)


# A language model has a vocabulary head, and a reward model made of it has a scalar one instead.
OPTIONAL = ("head", "scalar_head")


def trunk(**heads):
    blocks = {
        "head": {"kernel": jnp.arange(4.0)},
        "up": jnp.arange(6.0).reshape(2, 3),
    }  # a head of another path
    return {"blocks": blocks, "embed": jnp.ones((4, 2))} | heads


def read_params(checkpoints, saved, wanted, prefix="params"):
    checkpoints.save(1, {"params": saved, "step": jnp.int32(1)} if prefix else saved, {})
    checkpoints.wait()
    return read_arrays(checkpoints.folder / "1", jax.eval_shape(lambda: wanted), prefix, OPTIONAL)


@pytest.mark.parametrize("prefix", ["params", ""])
def test_optional_arrays_may_be_missing_on_either_side(checkpoints, prefix):
    language_model = trunk(head={"kernel": jnp.zeros((2, 4))})
    reward_model = trunk(scalar_head={"kernel": jnp.zeros((2, 1))})
    found = read_params(checkpoints, language_model, reward_model, prefix)
    assert found.pop("scalar_head") == {"kernel": None}
    assert_same(found, trunk())


def test_optional_arrays_on_both_sides_are_read(checkpoints):
    reward_model = trunk(scalar_head={"kernel": jnp.full((2, 1), 3.0)})
    assert_same(read_params(checkpoints, reward_model, reward_model), reward_model)


def test_optional_arrays_on_both_sides_must_fit(checkpoints):
    saved, wanted = (trunk(scalar_head={"kernel": jnp.zeros((2, n))}) for n in (1, 3))
    with pytest.raises(
        CheckpointError, match=r"scalar_head/kernel is float32\[2,1\] in it, float32\[2,3\] here"
    ):
        read_params(checkpoints, saved, wanted)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("blocks", "params/blocks/head/kernel is not in it"), ("embed", "params/embed is not in it")],
)
def test_all_that_is_not_optional_must_be_there(checkpoints, missing, message):
    language_model = trunk(head={"kernel": jnp.zeros((2, 4))})
    del language_model[missing]
    with pytest.raises(CheckpointError, match=message):
        read_params(checkpoints, language_model, trunk(scalar_head={"kernel": jnp.zeros((2, 1))}))


def test_an_array_that_is_asked_for_by_no_name_is_an_error_unless_it_is_optional(checkpoints):
    saved = trunk() | {"extra": jnp.zeros(2)}
    with pytest.raises(CheckpointError, match="params/extra is in it, not here"):
        read_params(checkpoints, saved, trunk())


def test_of_many_arrays_that_do_not_fit_the_first_are_named(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"query is .*; and 3 more$"):
        checkpoints.restore(1, abstract(make_state(width=5)._replace(opt_state=())))


# ---- what is damaged


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_noticed_and_the_step_before_is_used(checkpoints, capsys):
    save(checkpoints, 1, 2)
    choose = random.Random(0)
    files = [path for path in (checkpoints.folder / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        bit = choose.randrange(path.stat().st_size * 8)
        flip_bit(path, bit)
        assert find_checkpoint(checkpoints.folder).name == "1", f"bit {bit} of {path}"
        assert f"{checkpoints.folder}/2 is damaged: " in capsys.readouterr().err
        flip_bit(path, bit)
    assert find_checkpoint(checkpoints.folder).name == "2"


def test_every_flipped_bit_of_the_manifest_is_noticed(checkpoints):
    save(checkpoints, 1)
    manifest = checkpoints.folder / "1/manifest.json"
    for bit in random.Random(0).sample(range(manifest.stat().st_size * 8), 100):
        flip_bit(manifest, bit)
        assert damage(manifest.parent) is not None, f"bit {bit}"
        flip_bit(manifest, bit)


def truncate_manifest(folder):
    os.truncate(folder / "manifest.json", 40)


def remove_file(folder):
    (folder / "arrays.json").unlink()


def add_file(folder):
    (folder / "more.txt").touch()


def cut_file(folder):
    os.truncate(folder / "arrays.json", 3)


@pytest.mark.parametrize("break_folder", [truncate_manifest, remove_file, add_file, cut_file])
def test_a_damaged_step_is_named_skipped_and_never_deleted(checkpoints, capsys, break_folder):
    save(checkpoints, 1, 2)
    break_folder(checkpoints.folder / "2")
    assert checkpoints.steps() == [1]
    state, metadata = checkpoints.restore(None, abstract(make_state()))
    assert metadata == {"step": 1}
    assert_same(state, make_state(1))
    assert f"skipping a checkpoint: {checkpoints.folder}/2 is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="2 is damaged"):
        checkpoints.restore(2, abstract(make_state()))
    assert (checkpoints.folder / "2").is_dir()


@pytest.mark.parametrize("leftover", ["2", "2/state.orbax-checkpoint-tmp/d", "2/state/d"])
def test_leftovers_of_a_killed_save_do_not_count_and_are_replaced(checkpoints, leftover):
    save(checkpoints, 1)
    (checkpoints.folder / leftover).mkdir(parents=True)
    (checkpoints.folder / "99").mkdir()
    assert checkpoints.steps() == [1]
    assert find_checkpoint(checkpoints.folder).name == "1"
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(2, abstract(make_state()))[0], make_state(2))


def test_a_damaged_step_that_is_saved_again_is_set_aside(checkpoints):
    save(checkpoints, 1)
    flip_bit(checkpoints.folder / "1/arrays.json", 0)
    save(checkpoints, 1)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "1.aside-1"]
    assert damage(checkpoints.folder / "1") is None


def test_rewind_takes_later_steps_out_of_the_way(checkpoints):
    save(checkpoints, 1, 2, 3)
    flip_bit(checkpoints.folder / "2/arrays.json", 0)
    (checkpoints.folder / "99").mkdir()
    checkpoints.rewind(1)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "2.aside-1", "3.aside-1"]
    save(checkpoints, 3)
    checkpoints.rewind(2)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "2.aside-1", "3.aside-1", "3.aside-2"]


def test_find_checkpoint_takes_a_run_its_checkpoints_or_a_step(checkpoints, monkeypatch):
    save(checkpoints, 1, 20, 3)
    run = checkpoints.folder.parent
    for path in (run, checkpoints.folder, checkpoints.folder / "20"):
        assert find_checkpoint(path) == checkpoints.folder / "20"
    assert find_checkpoint(checkpoints.folder / "3").name == "3"
    monkeypatch.setenv("HOME", str(run))
    assert find_checkpoint("~") == checkpoints.folder / "20"
    with pytest.raises(CheckpointError, match="other does not exist"):
        find_checkpoint(run / "other")


def test_find_checkpoint_knows_the_best_of_a_run(checkpoints):
    save(checkpoints, 1, 2)
    run = checkpoints.folder.parent
    checkpoints.save(3, make_state(3), {"best": {"metric": "eval/loss", "value": 0.5, "step": 2}})
    checkpoints.wait()
    assert find_checkpoint(run / "best") == checkpoints.folder / "2"
    assert find_checkpoint(run) == checkpoints.folder / "3"
    cut_file(checkpoints.folder / "2")
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged"):
        find_checkpoint(run / "best")


def test_a_run_without_a_best_says_so(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"kept no best step; set checkpoint\.best_metric for that"):
        find_checkpoint(checkpoints.folder.parent / "best")
    checkpoints.save(2, make_state(2), {"best": {"metric": "eval/loss", "value": 0.5, "step": 0}})
    checkpoints.wait()
    with pytest.raises(
        CheckpointError, match="by eval/loss the best are the weights that its run began with"
    ):
        find_checkpoint(checkpoints.folder.parent / "best")


def test_the_hash_of_a_checkpoint_is_that_of_its_content(checkpoints):
    save(checkpoints, 1, 2)
    shutil.copytree(checkpoints.folder / "1", checkpoints.folder / "3")
    one, two, copy = (checkpoint_hash(checkpoints.folder / name) for name in "123")
    assert one == copy != two


def test_a_file_written_half_does_not_take_the_place_of_the_old(tmp_path, monkeypatch):
    file = tmp_path / "file"
    checkpoint.write_file(file, b"old")

    def stop(descriptor):
        raise OSError("stopped here")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="stopped here"):
        checkpoint.write_file(file, b"new")
    assert file.read_bytes() == b"old"
    monkeypatch.undo()
    checkpoint.write_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


# ---- when it is saved, and what is kept


def test_saved_is_said_once_the_manifest_is_there(tmp_path, monkeypatch):
    said = []

    def log(line):
        said.append((line, damage(tmp_path / "5")))

    write = checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda *file: (time.sleep(0.1), write(*file)))
    checkpoints = Checkpoints(tmp_path, keep=1, log=log)
    checkpoints.save(5, make_state(5), {})
    assert said == []
    assert checkpoints.steps() == []
    checkpoints.wait()
    assert said == [("saved step 5", None)]


def test_retention_keeps_the_newest_and_every_so_many(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    save(checkpoints, *range(1, 8))
    assert checkpoints.steps() == [4, 6, 7]
    assert sorted(os.listdir(tmp_path)) == ["4", "6", "7"]


def test_the_best_step_is_kept_beside_the_newest_however_old(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 5), (7, 5), (8, 5)):
        checkpoints.best_step = best
        save(checkpoints, step)
        if step == 5:
            assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.steps() == [5, 7, 8]  # one that is no longer the best is old like any other


def test_a_new_best_that_is_not_saved_yet_costs_the_old_one_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, log=lambda _: setattr(checkpoints, "best_step", 3))
    for step in (1, 2):
        checkpoints.best_step = 1
        save(checkpoints, step)
    assert checkpoints.steps() == [1, 2]


def test_a_step_that_was_deleted_only_half_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # killed before it
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, 2)
    assert checkpoints.steps() == [2]


def test_at_least_one_checkpoint_is_kept(tmp_path):
    with pytest.raises(ConfigError, match="keep=0 checkpoints: must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_that_was_just_saved_is_kept_though_a_later_one_is_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 3, 2)
    assert checkpoints.steps() == [2, 3]


def test_nothing_is_deleted_before_the_newer_step_is_read_back_whole(tmp_path):
    def rot(line):
        if line == "saved step 2":
            flip_bit(tmp_path / "2/arrays.json", 0)

    checkpoints = Checkpoints(tmp_path, keep=1, log=rot)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match="older steps are kept"):
        save(checkpoints, 2)
    assert find_checkpoint(tmp_path).name == "1"


# ---- when it cannot be saved


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_before_anything_is_written_and_costs_no_older_step(small_disk):
    checkpoints = Checkpoints(small_disk, keep=1)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, {"x": jnp.zeros(1 << 20)}, {})
    message = str(caught.value)
    assert message.startswith("step 2 was not saved: the disk is full, 0.00419 GB needed and 0.000")
    assert message.endswith(f"GB free in {small_disk}")
    assert checkpoints.steps() == [1]
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


def test_a_disk_that_fills_up_while_orbax_writes_is_told_at_the_next_call(checkpoints, monkeypatch):
    wait = checkpoints._orbax.wait_until_finished

    def fill_up():
        wait()
        if threading.current_thread().name == "save":  # Orbax waits too, before it starts a save
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 751317 bytes: No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fill_up)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="step 1 was not saved: the disk is full, "):
        checkpoints.save(2, make_state(2), {})
    assert not (checkpoints.folder / "1").exists()


def test_orbax_does_not_log_what_it_raises():
    def is_logged(path):
        return logging.getLogger("absl").filter(
            logging.LogRecord("absl", logging.ERROR, path, 1, "", (), None)
        )

    assert not is_logged("site-packages/orbax/checkpoint/_src/futures/future.py")
    assert is_logged("site-packages/grain/python/data_loader.py")


def test_what_goes_wrong_after_the_save_is_told_and_the_step_stays(tmp_path):
    def closed(line):
        raise BrokenPipeError("Broken pipe")

    checkpoints = Checkpoints(tmp_path, keep=1, log=closed)
    with pytest.raises(CheckpointError, match="step 1 was saved, but then: BrokenPipeError: Broken pipe"):
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


def test_what_orbax_refuses_is_one_error(checkpoints):
    with pytest.raises(CheckpointError, match="step 1 was not saved: ValueError"):
        checkpoints.save(1, {"empty": jnp.zeros((0, 3))}, {})


# ---- killed at any moment

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


def test_a_kill_at_any_moment_leaves_the_last_saved_step(tmp_path):
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
        said = int(lines[-1].split()[-1])
        assert said > last
        folder = find_checkpoint(tmp_path)
        last = json.loads((folder / "metadata.json").read_bytes())["step"]
        assert last in (said, said + 1)
        x = read_arrays(folder, jax.ShapeDtypeStruct((1 << 17,), jnp.float32), prefix="x")
        np.testing.assert_array_equal(x, float(last))


# ---- several processes

ONE_OF_TWO = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxllm.errors import CheckpointError
from jaxllm.training.checkpoint import Checkpoints

jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
state = {"x": jax.make_array_from_callback((8,), rows, lambda index: jnp.arange(8.0)[index])}
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
checkpoints.save(1, state, {})
checkpoints.save(1, state, {})  # in neither process again
restored, _ = checkpoints.restore(None, state)
assert (restored["x"].addressable_shards[0].data == state["x"].addressable_shards[0].data).all()
try:
    checkpoints.restore(9, state)
except CheckpointError as error:
    print("refused")
"""


def test_two_processes_save_one_checkpoint_and_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, tmp_path, str(port), str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [("saved step 1" in lines, "refused" in lines) for lines in outputs] == [
        (True, True),
        (False, True),
    ]
    x = read_arrays(find_checkpoint(tmp_path), jax.ShapeDtypeStruct((8,), jnp.float32), prefix="x")
    np.testing.assert_array_equal(x, np.arange(8.0))
