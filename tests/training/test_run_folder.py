"""A run folder resumes its own run; any other run is a one-line error before anything slow."""

import json
import os
import re
import socket
import subprocess

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config_versions import VERSION
from jaxllm.errors import CheckpointError, ConfigError, DataError
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.run_folder import lock_run, open_run, record_start

CONFIG = {"training": {"steps": 10, "log_every": 1}, "optimizer": {"learning_rate": 0.1}, "seed": 0}
MAY_DIFFER = ("training.steps", "logging")


def with_steps(steps):
    return CONFIG | {"training": {"steps": steps, "log_every": 1}}


def start(workdir, config=CONFIG, resume="auto", **fingerprints):
    run = open_run(str(workdir), config, resume=resume, may_differ=MAY_DIFFER)
    record_start(run, config, command=["train.py", "--workdir=my runs"], fingerprints=fingerprints)
    return run


def save(run, *steps):
    checkpoints = Checkpoints(run.checkpoints, keep=10)
    for step in steps:
        checkpoints.save(step, {"x": jnp.float32(step)}, {})
    checkpoints.wait()


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "x"


# Starting and resuming


def test_a_new_folder_is_a_fresh_run_and_records_how_it_was_started(workdir):
    run = open_run(str(workdir), CONFIG, resume="auto", may_differ=MAY_DIFFER)
    assert not run.resuming
    parent = {"path": "runs/pretrain/checkpoints/9", "hash": "abc"}
    record_start(
        run, CONFIG, command=["train.py", "--workdir=my runs"], fingerprints={"data": "d"}, parent=parent
    )
    assert json.loads((workdir / "config.json").read_text()) == {"version": VERSION, **CONFIG}
    record = json.loads((workdir / "run.json").read_text())
    assert record["id"] == run.id
    assert record["parent"] == parent
    assert record["fingerprints"] == {"data": "d"}
    (first,) = record["starts"]
    assert first["command"] == "train.py '--workdir=my runs'"
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"].keys() >= {"python", "jaxllm", "flax", "optax", "orbax-checkpoint"}
    assert first["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    save(run, 3)
    assert start(workdir, data="d").resuming
    assert json.loads((workdir / "run.json").read_text())["parent"] == parent


def test_the_git_revision_shows_whether_files_were_changed(workdir, tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"]
    (tmp_path / "file").touch()
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    revision = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr("jaxllm.training.run_folder.__file__", str(tmp_path / "module.py"))

    def recorded():
        start(workdir)
        return json.loads((workdir / "run.json").read_text())["starts"][-1]["git"]

    assert recorded() == revision
    (tmp_path / "file").write_text("changed")
    assert recorded() == f"{revision}-dirty"
    monkeypatch.setenv("PATH", "")
    assert recorded() is None


def test_auto_resumes_once_there_is_a_checkpoint(workdir):
    first = start(workdir)
    again = start(workdir)  # killed before its first checkpoint
    assert (again.id, again.resuming) == (first.id, False)
    save(again, 3)
    resumed = start(workdir)
    assert (resumed.id, resumed.resuming, resumed.step) == (first.id, True, None)
    starts = json.loads((workdir / "run.json").read_text())["starts"]
    assert [each["resuming"] for each in starts] == [False, False, True]


def test_a_renamed_or_unfinished_checkpoint_is_not_resumed_from(workdir):
    save(start(workdir), 3)
    (workdir / "checkpoints/3").rename(workdir / "checkpoints/3.aside-1")
    (workdir / "checkpoints/5").mkdir()
    assert not start(workdir).resuming


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_step_0(workdir):
    save(start(workdir), 3)
    (workdir / "checkpoints/3/arrays.json").unlink()
    assert start(workdir).resuming


def test_resume_accepts_a_step(workdir):
    save(start(workdir), 3, 20)
    assert start(workdir, resume="3").step == 3
    with pytest.raises(CheckpointError, match=r"--resume=4: .*/x holds only the steps 3, 20$"):
        start(workdir, resume="4")


def test_must_does_not_start_and_never_does_not_resume(workdir):
    with pytest.raises(CheckpointError, match=r"--resume=must: .*/x holds no checkpoint"):
        start(workdir, resume="must")
    save(start(workdir, resume="never"), 3)
    assert start(workdir, resume="must").resuming
    with pytest.raises(ConfigError, match=r"--resume=never: .*/x holds run .*; choose another --workdir"):
        start(workdir, resume="never")


def test_any_other_value_of_resume_is_an_error(workdir):
    with pytest.raises(ConfigError, match="--resume=yes must be auto, must, never or a step"):
        start(workdir, resume="yes")
    assert not workdir.exists()


# Other runs


def test_another_config_is_an_error_that_shows_the_differences(workdir):
    run = start(workdir)
    save(run, 3)
    before = (workdir / "run.json").read_bytes()
    other = with_steps(20) | {"optimizer": {"learning_rate": 0.2}, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        start(workdir, other)
    assert str(caught.value) == (
        f"{workdir} holds run {run.id} with another config: optimizer.learning_rate 0.1 -> 0.2; seed 0 -> 1. "
        "Choose another --workdir, or set these fields to the values in its config.json"
    )
    assert (workdir / "run.json").read_bytes() == before


def test_of_many_differences_the_first_are_shown(workdir):
    start(workdir)
    with pytest.raises(ConfigError, match=r"a null -> 1; .* and 2 more. Choose"):
        start(workdir, CONFIG | dict.fromkeys("abcdefg", 1))


def test_fields_and_sections_that_may_differ_are_updated(workdir):
    save(start(workdir), 3)
    longer = with_steps(20) | {"logging": {"every": 5}}
    assert start(workdir, longer).resuming
    assert json.loads((workdir / "config.json").read_text()) == {"version": VERSION, **longer}
    with pytest.raises(ConfigError, match="logging_2"):  # not a prefix: the whole name of a section
        start(workdir, longer | {"logging_2": 1})


def test_a_run_that_never_started_may_be_replaced(workdir):
    open_run(str(workdir), CONFIG, resume="auto", may_differ=())
    (workdir / "bad_rows.jsonl").touch()
    assert not start(workdir, CONFIG | {"seed": 1}).resuming


def test_the_files_of_a_start_replace_those_of_one_that_failed(workdir):
    workdir.mkdir()
    run = open_run(str(workdir), CONFIG, resume="auto", may_differ=())
    for name in ("template.jinja", "tokenizer.json", "tokenizer.model"):
        (workdir / name).write_text("of the start that failed")
    files = {"tokenizer.model": b"new"}
    record_start(run, CONFIG, command=["train.py"], fingerprints={}, files=files)
    assert {path.name: path.read_bytes() for path in workdir.glob("t*")} == files


def test_a_start_is_recorded_after_all_its_files_are_there(workdir, monkeypatch):
    def full(path, content):
        if path.name == "config.json":
            raise OSError("full")
        path.write_bytes(content)

    run = open_run(str(workdir), CONFIG, resume="auto", may_differ=())
    monkeypatch.setattr("jaxllm.training.run_folder.write_file", full)
    with pytest.raises(OSError, match="full"):
        record_start(run, CONFIG, command=["a"], fingerprints={}, files={"template.jinja": b""})
    monkeypatch.undo()
    assert not start(workdir, CONFIG | {"seed": 1}).resuming  # no run has started: any config will do
    assert not (workdir / "template.jinja").exists()


def test_another_machine_or_version_is_said(workdir, capsys):
    save(start(workdir), 3)
    record = json.loads((workdir / "run.json").read_text())
    record["starts"][-1]["devices"]["count"] = 4
    record["starts"][-1]["versions"]["jax"] = "0.1"
    (workdir / "run.json").write_text(json.dumps(record))
    start(workdir)
    assert re.search(r'note: devices.count 4 -> 8, versions.jax "0.1" -> .*bits', capsys.readouterr().out)
    start(workdir)
    assert capsys.readouterr().out == ""


# One process a folder


def test_a_folder_that_a_process_uses_is_refused_in_one_line_that_names_it(workdir):
    with lock_run(str(workdir)):
        start(workdir)
        before = sorted(workdir.rglob("*"))
        message = rf"/x is in use by process {os.getpid()} on .*; wait for it"
        with pytest.raises(ConfigError, match=message), lock_run(str(workdir)):
            pass
        assert sorted(workdir.rglob("*")) == before
    with lock_run(str(workdir)):
        assert start(workdir).id


def test_a_lock_that_a_killed_process_left_is_said(workdir, capsys):
    workdir.mkdir()
    left = {"host": socket.gethostname(), "pid": 10**7, "since": "2026-01-01"}
    (workdir / "lock").write_text(json.dumps(left))
    with lock_run(str(workdir)):
        pass
    assert "the lock of process 10000000 on" in capsys.readouterr().out
    assert not workdir.exists()  # nothing was written


def test_changed_data_is_an_error_with_both_fingerprints(workdir):
    save(start(workdir, data="d1", tokenizer="t1"), 3)
    with pytest.raises(DataError) as caught:
        start(workdir, data="d1", tokenizer="t2")
    assert str(caught.value) == (
        f"the tokenizer differs from that of the run in {workdir}: fingerprint t1 there, t2 here. "
        "Choose another --workdir, or restore the tokenizer"
    )
    assert start(workdir, data="d1", tokenizer="t1").resuming


def test_a_folder_of_other_files_is_an_error(workdir):
    workdir.mkdir()
    (workdir / "logs").mkdir()  # created by a launcher
    (workdir / ".DS_Store").touch()
    (workdir / ".run.json.tmp").touch()  # of a start that was killed at once
    (workdir / "thesis.tex").touch()
    with pytest.raises(
        ConfigError, match=r"x is not a run folder, it holds thesis.tex: choose another --workdir"
    ):
        start(workdir)
    (workdir / "thesis.tex").unlink()
    start(workdir)


def test_a_config_of_an_older_version_is_compared_by_todays_names(workdir):
    config = CONFIG | {"data": {"loss_on": "all"}}
    save(start(workdir, config), 3)
    older = CONFIG | {"data": {"learn": "all"}}  # version 1 wrote no version
    (workdir / "config.json").write_text(json.dumps(older))
    with pytest.raises(ConfigError, match=r'another config: data\.loss_on "all" -> "last"\. Choose'):
        start(workdir, CONFIG | {"data": {"loss_on": "last"}})
    assert start(workdir, config).resuming
    assert json.loads((workdir / "config.json").read_text()) == {"version": VERSION, **config}


def test_a_config_of_a_newer_version_is_an_error(workdir):
    save(start(workdir), 3)
    (workdir / "config.json").write_text(json.dumps({"version": VERSION + 1, **CONFIG}))
    with pytest.raises(ConfigError, match=rf"x/config.json cannot be read: .*version {VERSION + 1}"):
        start(workdir)


def test_a_record_that_cannot_be_read_is_named(workdir):
    start(workdir)
    (workdir / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x/run.json cannot be read: "):
        start(workdir)


def test_code_in_a_run_folder_is_not_executed(workdir, monkeypatch):
    save(start(workdir), 3)
    trap = "raise SystemExit('executed')"
    for name in ("config.py", "run.py", "json.py", "__init__.py", "sitecustomize.py"):
        (workdir / name).write_text(trap)
    monkeypatch.chdir(workdir)
    assert start(workdir).resuming


# Paths


def test_relative_paths_and_the_home_folder_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert start("runs/../a").path == tmp_path / "runs/../a"
    assert start("~/b").path == tmp_path / "home/b"


@pytest.mark.parametrize("workdir", ["", "gs://bucket/my run", "a/..", "..", "my run", "x;ls", "é"])
def test_a_workdir_that_is_not_a_plain_folder_is_an_error(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--workdir={workdir} must be a folder whose name"):
        start(workdir)


def test_a_workdir_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--workdir=.*/file/x: Not a directory"):
        start(tmp_path / "file/x")


def test_file_creates_folders_inside_the_run_only(workdir):
    run = start(workdir)
    path = run.file("samples", "step-10.txt")
    assert path == workdir / "samples/step-10.txt"
    assert path.parent.is_dir()
    for name in ("..", ".", "", "../x", "/etc/passwd", "a/b", "a\n", "a b"):
        with pytest.raises(ConfigError, match="is not a valid file name"):
            run.file("samples", name)
