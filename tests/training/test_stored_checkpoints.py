"""Checkpoints on object stores: valid once the manifest is there, read in parts, deleted, renamed."""

import itertools
import os

import jax
import pytest
from saved_states import abstract, assert_same, make_state, save

from jaxllm.errors import CheckpointError, NoCheckpoint
from jaxllm.files import to_json
from jaxllm.store import Store, StoreError, copy_of, local_copy, update_copy, url_of
from jaxllm.training import step_folder
from jaxllm.training.checkpoint import Checkpoints, read_arrays
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint

numbers = itertools.count()


@pytest.fixture
def url(cache):
    return f"memory://checkpoints/{next(numbers)}"


@pytest.fixture
def checkpoints(url):
    checkpoints = Checkpoints(copy_of(url, 0) / "checkpoints", keep=10)
    yield checkpoints
    checkpoints.wait()


def stored(url):
    """Names on the store, without `checkpoints/`."""
    return {name.removeprefix("checkpoints/") for name in Store(url).list()}


def other_machine(url, keep=10):
    """The checkpoints as a process sees them whose cache is empty."""
    os.environ["JAXLLM_CACHE_DIR"] += "-other"
    update_copy(copy_of(url, 0))
    return Checkpoints(copy_of(url, 0) / "checkpoints", keep=keep)


def test_a_state_is_restored_by_another_machine_which_keeps_no_copy_of_its_arrays(url, checkpoints):
    save(checkpoints, 1, 2)
    assert not list(checkpoints.folder.rglob("state"))
    for machine in (lambda: checkpoints, lambda: other_machine(url)):
        each = machine()
        state, metadata = each.restore(None, abstract(make_state()))
        assert metadata == {"step": 2}
        assert_same(state, make_state(2))
        assert each.steps() == [1, 2]
        assert not list(each.folder.rglob("state"))


def test_the_manifest_is_uploaded_last_and_after_what_belongs_to_it_and_deleted_first(url, monkeypatch):
    events = []
    publish, delete = step_folder.publish, Store.delete
    monkeypatch.setattr(
        "jaxllm.training.checkpoint.publish", lambda path: (events.append(stored(url)), publish(path))
    )
    monkeypatch.setattr(
        Store, "delete", lambda self, names: events.append(list(names)) or delete(self, events[-1])
    )
    store, saved = Store(url), []
    checkpoints = Checkpoints(
        copy_of(url, 0) / "checkpoints",
        keep=1,
        log=lambda line: saved.append((line, "2/manifest.json" in stored(url))),
        before_commit=lambda: store.write("metrics.jsonl", b"1"),
    )
    save(checkpoints, 1, 2)
    first, second, manifest, rest = events
    assert "1/manifest.json" not in first
    assert {"metrics.jsonl", "1/state/params/embedding/.zarray", "1/metadata.json"} <= first
    assert "1/manifest.json" in second
    assert manifest == ["manifest.json"]
    assert "arrays.json" in rest
    assert saved == [("saved step 1", False), ("saved step 2", True)]
    assert all(not name.startswith("1/") for name in stored(url))


def test_who_wants_parameters_downloads_no_optimizer_and_nothing_twice(url, checkpoints, monkeypatch):
    save(checkpoints, 1)
    downloaded, download = [], Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, files: downloaded.extend(files) or download(self, files)
    )
    folder = find_checkpoint(url)
    assert url_of(folder) == f"{url}/checkpoints/1"
    assert any("params" in name for name in downloaded)
    assert not any("opt_state" in name for name in downloaded)
    params = jax.eval_shape(lambda: make_state().params)
    assert_same(read_arrays(folder, params, prefix="params"), make_state(1).params)
    downloaded.clear()
    for path in (url, f"{url}/checkpoints", f"{url}/checkpoints/1", folder):
        assert find_checkpoint(path) == folder
    assert not [name for name in downloaded if "state/" in name]
    copy = next((folder / "state/params/embedding").glob("[0-9]*"))
    copy.write_bytes(b"x" * copy.stat().st_size)  # a damaged copy is made good
    assert find_checkpoint(url) == folder
    assert_same(read_arrays(folder, params, prefix="params"), make_state(1).params)


def damage_size(store):
    store.write("checkpoints/2/arrays.json", b"{}")


def damage_content(store):
    name = next(name for name in store.list() if name.startswith("checkpoints/2/state/params/embedding/0"))
    store.write(name, bytes(len(store.read(name))))


def lose(store):
    store.delete(["checkpoints/2/state/_METADATA"])


def half_upload(store):
    store.delete(["checkpoints/2/manifest.json"])


@pytest.mark.parametrize("break_it", [damage_size, damage_content, lose, half_upload])
def test_a_damaged_or_unfinished_step_is_named_by_its_url_and_skipped(url, checkpoints, capsys, break_it):
    save(checkpoints, 1, 2)
    break_it(Store(url))
    assert find_checkpoint(url).name == "1"
    assert f"skipping a checkpoint: {url}/checkpoints/2 is " in capsys.readouterr().err
    resumed = other_machine(url, keep=1)
    assert resumed.restore(None, abstract(make_state()))[1] == {"step": 1}
    resumed.rewind(1)
    save(resumed, 2)
    assert resumed.steps() == [2]
    assert {name.partition("/")[0] for name in stored(url)} <= {"2", "2.aside-1"}
    with pytest.raises(NoCheckpoint, match=f"{url}/other does not exist"):
        find_checkpoint(f"{url}/other")


def test_later_steps_are_renamed_and_objects_of_a_killed_save_or_deletion_are_collected(url, checkpoints):
    save(checkpoints, 1, 2, 3)
    store = Store(url)
    store.write("checkpoints/0/state/d", b"left of a deletion")
    store.write("checkpoints/7/state/d", b"left of a save")
    resumed = other_machine(url)
    resumed.rewind(2)
    assert {name.partition("/")[0] for name in stored(url)} == {"0", "1", "2", "3.aside-1"}
    save(resumed, 3)
    assert {name.partition("/")[0] for name in stored(url)} == {"1", "2", "3", "3.aside-1"}
    assert resumed.restore(3, abstract(make_state()))[1] == {"step": 3}


def test_the_best_step_is_found_by_its_url(url, checkpoints):
    save(checkpoints, 1, 2)
    checkpoints.save(3, make_state(3), {"best": {"metric": "eval/loss", "value": 0.5, "step": 2}})
    checkpoints.wait()
    assert url_of(find_checkpoint(f"{url}/best")) == f"{url}/checkpoints/2"
    assert url_of(find_checkpoint(url)) == f"{url}/checkpoints/3"


def test_metadata_of_a_saved_step_is_replaced_and_the_checkpoint_keeps_its_hash(url, checkpoints):
    save(checkpoints, 1)
    digest = checkpoint_hash(find_checkpoint(url))
    checkpoints.save(1, make_state(1), {"step": 1, "metrics": {}})
    folder = find_checkpoint(url)
    assert (folder / "metadata.json").read_bytes() == to_json({"step": 1, "metrics": {}})
    assert checkpoint_hash(folder) == digest


def test_a_failed_upload_is_an_error_and_the_older_checkpoints_remain(url, checkpoints, monkeypatch):
    save(checkpoints, 1)

    def fail(self, files):
        raise StoreError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", fail)
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(CheckpointError, match=r"step 2 was not saved: StoreError: the network is down"):
            checkpoints.wait()
    assert find_checkpoint(url).name == "1"
    save(checkpoints, 2)
    assert find_checkpoint(url).name == "2"


def test_a_hugging_face_folder_is_downloaded_whole_and_once(url, monkeypatch):
    store = Store(url)
    for name, content in (("config.json", b'{"model_type": "llama"}'), ("model.safetensors", b"weights")):
        store.write(name, content)
    folder = find_checkpoint(url)
    assert folder == local_copy(url)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    digest = checkpoint_hash(folder)
    monkeypatch.setattr(Store, "download", lambda self, files: pytest.fail(str(files)) if files else None)
    assert find_checkpoint(url) == folder
    assert checkpoint_hash(folder) == digest
