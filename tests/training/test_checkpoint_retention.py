"""When a checkpoint counts as saved, and which ones are kept."""

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
