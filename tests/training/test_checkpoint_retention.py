"""When a checkpoint counts as saved, and which ones are kept."""

import os
import time

import pytest
from saved_states import make_state, save

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.training import checkpoint, step_folder
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.step_folder import damage, find_checkpoint


def test_a_step_is_reported_as_saved_once_the_manifest_exists(tmp_path, monkeypatch):
    reported = []

    def log(line):
        reported.append((line, damage(tmp_path / "5")))

    write = checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda *file: (time.sleep(0.1), write(*file)))
    checkpoints = Checkpoints(tmp_path, keep=1, log=log)
    checkpoints.save(5, make_state(5), {})
    assert reported == []
    assert checkpoints.steps() == []
    checkpoints.wait()
    assert reported == [("saved step 5", None)]


def test_the_newest_and_every_fourth_step_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    save(checkpoints, *range(1, 8))
    assert checkpoints.steps() == [4, 6, 7]
    assert sorted(os.listdir(tmp_path)) == ["4", "6", "7"]


def test_the_best_step_is_kept_however_old(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 5), (7, 5), (8, 5)):
        checkpoints.best_step = best
        save(checkpoints, step)
        if step == 5:
            assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.steps() == [5, 7, 8]  # a step that is no longer the best is deleted like any other


def test_the_old_best_step_is_kept_until_the_new_one_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, log=lambda _: setattr(checkpoints, "best_step", 3))
    for step in (1, 2):
        checkpoints.best_step = 1
        save(checkpoints, step)
    assert checkpoints.steps() == [1, 2]


def test_a_half_deleted_step_is_not_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(step_folder.shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed before it
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, 2)
    assert checkpoints.steps() == [2]


def test_a_half_deleted_step_is_deleted_with_the_next_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2)
    (tmp_path / "1" / "manifest.json").unlink()  # killed while it was deleted
    save(checkpoints, 3)
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_at_least_one_checkpoint_must_be_kept(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_that_was_just_saved_is_kept_even_if_a_later_one_exists(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 3, 2)
    assert checkpoints.steps() == [2, 3]


def test_nothing_is_deleted_before_the_newer_step_is_found_valid(tmp_path):
    def damage_it(line):
        if line == "saved step 2":
            os.truncate(tmp_path / "2/arrays.json", 3)

    checkpoints = Checkpoints(tmp_path, keep=1, log=damage_it)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match="older checkpoints are kept"):
        save(checkpoints, 2)
    assert find_checkpoint(tmp_path).name == "1"
