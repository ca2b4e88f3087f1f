"""A damaged or unfinished checkpoint is noticed, skipped and replaced; the newest valid one is found."""

import os
import random
import shutil

import pytest
from saved_states import abstract, assert_same, flip_bit, make_state, save

from jaxllm.errors import CheckpointError
from jaxllm.training import checkpoint, step_folder
from jaxllm.training.step_folder import checkpoint_hash, damage, find_checkpoint


def test_a_flipped_bit_in_any_file_is_noticed_and_the_previous_step_is_used(checkpoints, capsys):
    save(checkpoints, 1, 2)
    choose = random.Random(0)
    files = [path for path in (checkpoints.folder / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        bit = choose.randrange(path.stat().st_size * 8)
        flip_bit(path, bit)
        assert find_checkpoint(checkpoints.folder, whole=True).name == "1", f"bit {bit} of {path}"
        assert f"{checkpoints.folder}/2 is damaged: " in capsys.readouterr().err
        flip_bit(path, bit)
    assert find_checkpoint(checkpoints.folder, whole=True).name == "2"


def test_who_reads_parameters_alone_checks_all_sizes_and_hashes_no_optimizer_state(checkpoints, monkeypatch):
    save(checkpoints, 1)
    folder, hashed = checkpoints.folder / "1", set()
    whole = step_folder.hash_files
    monkeypatch.setattr(step_folder, "hash_files", lambda files: hashed.update(files) or whole(files))
    assert find_checkpoint(folder) == folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in names - hashed if not name.startswith(("state/opt_state/", "state/key/"))} == {
        "manifest.json",
        "state/step/.zarray",
        "state/step/0",
    }
    for name, noticed in (("state/opt_state/0/count/0", False), ("state/params/layers/query/0.0", True)):
        flip_bit(folder / name, 9)
        assert (damage(folder, whole=False) is not None) == noticed, name
        flip_bit(folder / name, 9)
    os.truncate(folder / "state/opt_state/0/count/0", 3)
    with pytest.raises(CheckpointError, match="count/0 has 3 bytes, not 13"):
        find_checkpoint(folder)


def test_what_was_just_saved_is_read_once_and_every_file_and_folder_is_flushed(checkpoints, monkeypatch):
    flushed, opened, reads = [], step_folder.os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), opened(fd))
    )
    whole = checkpoint.hash_files
    monkeypatch.setattr(step_folder, "hash_files", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr(
        checkpoint,
        "hash_files",
        lambda files, flush: (reads.extend(files.values()), whole(files, flush=flush))[1],
    )
    checkpoints._keep = 1
    save(checkpoints, 1, 2)
    folder = checkpoints.folder / "2"
    paths = {path for path in folder.rglob("*") if path.name != "manifest.json"}
    assert {str(path) for path in {folder, folder.parent, *paths}} <= set(flushed)
    files = [path for path in paths if path.is_file()]
    assert sorted(path for path in reads if folder in path.parents) == sorted(files)


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


def truncate_file(folder):
    os.truncate(folder / "arrays.json", 3)


@pytest.mark.parametrize("break_folder", [truncate_manifest, remove_file, truncate_file])
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


@pytest.mark.parametrize("name", [".DS_Store", "state/.DS_Store", "._arrays.json", ".metadata.json.tmp"])
def test_a_foreign_file_comes_and_goes_without_damage(checkpoints, name):
    save(checkpoints, 1)
    (checkpoints.folder / "1" / name).touch()
    assert damage(checkpoints.folder / "1") is None
    file = checkpoints.folder / "2" / name
    list_files = checkpoint.own_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "own_files", lambda folder: (file.touch(), list_files(folder))[1])
        save(checkpoints, 2)
    file.unlink()
    assert damage(checkpoints.folder / "2") is None


def test_a_file_among_the_steps_is_no_step(checkpoints):
    save(checkpoints, 1)
    (checkpoints.folder / "2").touch()
    assert find_checkpoint(checkpoints.folder).name == "1"


def test_a_step_that_is_saved_again_has_the_new_metadata_and_is_valid_at_every_moment(
    checkpoints, monkeypatch
):
    save(checkpoints, 1)
    folder, found = checkpoints.folder / "1", []
    write = step_folder.write_file

    def watched(path, content):
        write(path, content)
        found.append((path.name, damage(folder)))

    digest = checkpoint_hash(folder)
    monkeypatch.setattr(step_folder, "write_file", watched)
    for _ in range(2):
        checkpoints.save(1, make_state(1), {"step": 1, "metrics": {"eval/loss": 0.5}})
    files = ["manifest.json", "metadata.json", "manifest.json"]
    assert found == [(name, None) for name in files]  # once
    assert checkpoints.restore(1, abstract(make_state()))[1]["metrics"] == {"eval/loss": 0.5}
    assert checkpoint_hash(folder) == digest  # it is still the parent of the runs initialized from it
    flip_bit(folder / "metadata.json", 0)
    assert damage(folder) is not None


@pytest.mark.parametrize("leftover", ["2", "2/state.orbax-checkpoint-tmp/d", "2/state/d"])
def test_leftovers_of_a_killed_save_are_ignored_and_replaced(checkpoints, leftover):
    save(checkpoints, 1)
    (checkpoints.folder / leftover).mkdir(parents=True)
    (checkpoints.folder / "99").mkdir()
    assert checkpoints.steps() == [1]
    assert find_checkpoint(checkpoints.folder).name == "1"
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(2, abstract(make_state()))[0], make_state(2))


def test_a_damaged_step_that_is_saved_again_is_renamed(checkpoints):
    save(checkpoints, 1)
    truncate_file(checkpoints.folder / "1")
    save(checkpoints, 1)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "1.aside-1"]
    assert damage(checkpoints.folder / "1") is None


def test_rewind_renames_later_steps(checkpoints):
    save(checkpoints, 1, 2, 3)
    flip_bit(checkpoints.folder / "2/arrays.json", 0)
    (checkpoints.folder / "99").mkdir()
    checkpoints.rewind(1)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "2.aside-1", "3.aside-1"]
    save(checkpoints, 3)
    checkpoints.rewind(2)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "2.aside-1", "3.aside-1", "3.aside-2"]


# Finding a checkpoint


def test_find_checkpoint_accepts_a_run_its_checkpoints_or_a_step(checkpoints, monkeypatch):
    save(checkpoints, 1, 20, 3)
    run = checkpoints.folder.parent
    for path in (run, checkpoints.folder, checkpoints.folder / "20"):
        assert find_checkpoint(path) == checkpoints.folder / "20"
    assert find_checkpoint(checkpoints.folder / "3").name == "3"
    monkeypatch.setenv("HOME", str(run))
    assert find_checkpoint("~") == checkpoints.folder / "20"
    with pytest.raises(CheckpointError, match="other does not exist"):
        find_checkpoint(run / "other")


def test_find_checkpoint_finds_the_best_step_of_a_run(checkpoints):
    save(checkpoints, 1, 2)
    run = checkpoints.folder.parent
    checkpoints.save(3, make_state(3), {"best": {"metric": "eval/loss", "value": 0.5, "step": 2}})
    checkpoints.wait()
    assert find_checkpoint(run / "best") == checkpoints.folder / "2"
    assert find_checkpoint(run) == checkpoints.folder / "3"
    truncate_file(checkpoints.folder / "2")
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged"):
        find_checkpoint(run / "best")


def test_a_run_without_a_best_step_is_an_error_that_says_why(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(
        CheckpointError, match=r"recorded no best step: set checkpoint\.best_metric, or pass a step"
    ):
        find_checkpoint(checkpoints.folder.parent / "best")
    checkpoints.save(2, make_state(2), {"best": {"metric": "eval/loss", "value": 0.5, "step": 0}})
    checkpoints.wait()
    with pytest.raises(
        CheckpointError, match="no step of its run has a better eval/loss than the initial weights"
    ):
        find_checkpoint(checkpoints.folder.parent / "best")


def test_the_hash_of_a_checkpoint_depends_on_its_content_only(checkpoints):
    save(checkpoints, 1, 2)
    shutil.copytree(checkpoints.folder / "1", checkpoints.folder / "3")
    one, two, copy = (checkpoint_hash(checkpoints.folder / name) for name in "123")
    assert one == copy != two
