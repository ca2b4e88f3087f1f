"""A run folder on an object store: who holds it, and when its files are uploaded."""

import itertools
import json
import os
import socket
import time

import pytest

from jaxllm.errors import CheckpointError, ConfigError, Stopped
from jaxllm.store import Store, StoreError, copy_of
from jaxllm.training import workdir
from jaxllm.training.run_folder import lock_run
from jaxllm.training.workdir import stored_folder

numbers = itertools.count()


@pytest.fixture
def url(cache):
    return f"memory://workdirs/{next(numbers)}"


def test_changed_files_are_uploaded_when_asked_and_at_the_end_and_the_lock_is_removed(url):
    with lock_run(url) as upload:
        folder = copy_of(url, 0)
        for name in ("run.json", "logs/hang.txt", "checkpoints/1/arrays.json", ".x.tmp", "stage/run.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("1")
        upload()
        assert Store(url).list().keys() == {"run.json", "logs/hang.txt", "lock"}
        (folder / "run.json").write_text("22")
        (folder / "logs/hang.txt").unlink()
    assert {name: each.size for name, each in Store(url).list().items()} == {"run.json": 2}


@pytest.mark.parametrize("error", [Stopped("by a signal"), KeyError("a bug")])
def test_files_are_uploaded_after_an_error_and_the_lock_is_removed(url, error):
    def fail():
        with stored_folder(url):
            (copy_of(url, 0) / "metrics.jsonl").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert Store(url).list().keys() == {"metrics.jsonl"}


def test_the_error_that_ends_a_run_is_not_hidden_by_a_failing_upload(url, monkeypatch):
    def fail():
        with stored_folder(url):
            (copy_of(url, 0) / "metrics.jsonl").write_text("1")
            monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(StoreError("down")))
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        fail()


def test_a_failed_upload_is_a_warning_that_is_repeated_once_it_works(url, monkeypatch, capsys):
    monkeypatch.setattr(workdir, "BEAT", 0.01)
    monkeypatch.setattr(workdir, "UPLOAD_EVERY", 0.0)
    write, down = Store.write, [True]

    def fail(self, name, content):
        if down and name != "lock":
            raise StoreError("the network is down")
        write(self, name, content)

    monkeypatch.setattr(Store, "write", fail)
    with stored_folder(url):
        (copy_of(url, 0) / "metrics.jsonl").write_text("1")
        time.sleep(0.3)
        assert "metrics.jsonl" not in Store(url).list()
        down.clear()
        time.sleep(0.3)
        assert "metrics.jsonl" in Store(url).list()
    assert capsys.readouterr().err.count("not uploaded, will be tried again: the network is down") == 1


def test_a_second_process_is_refused_with_the_name_of_the_first(url):
    message = (
        rf"{url} is in use by process {os.getpid()} on {socket.gethostname()} since .*, seen \d+ s ago; "
        rf"if it has ended, remove {url}/lock; wait for it, or choose another --workdir"
    )
    with stored_folder(url):
        with pytest.raises(ConfigError, match=message), stored_folder(url):
            pass
        assert "lock" in Store(url).list()
    with stored_folder(url):
        pass


def hold(url, **changes):
    holder = {"host": "elsewhere", "pid": 1, "since": "yesterday", "id": "x"} | changes
    Store(url).write("lock", json.dumps(holder).encode())


def test_the_lock_of_a_process_of_this_host_that_ended_is_taken_over_at_once(url, capsys):
    hold(url, host=socket.gethostname(), pid=2**22 + 1)
    with stored_folder(url):
        assert json.loads(Store(url).read("lock"))["pid"] == os.getpid()
    assert "since yesterday was left behind: that process has ended" in capsys.readouterr().out


def test_the_lock_of_another_host_is_taken_over_after_silence(url, monkeypatch, capsys):
    hold(url)
    with (
        pytest.raises(ConfigError, match="process 1 on elsewhere since yesterday, seen 0 s ago"),
        stored_folder(url),
    ):
        pass
    time.sleep(0.05)
    monkeypatch.setattr(workdir, "SILENCE", 0.01)
    with stored_folder(url):
        pass
    assert "the lock of process 1 on elsewhere" in capsys.readouterr().out


def test_a_holder_renews_its_lock_and_uploads_no_more_once_another_has_it(url, monkeypatch):
    monkeypatch.setattr(workdir, "BEAT", 0.01)
    message = "has been taken over by another process"
    hold_it = stored_folder(url)
    upload = hold_it.__enter__()
    before = Store(url).modified("lock")
    time.sleep(0.2)
    assert Store(url).modified("lock") > before
    hold(url)
    time.sleep(0.2)
    with pytest.raises(CheckpointError, match=message):
        upload()
    with pytest.raises(CheckpointError, match=message):
        hold_it.__exit__(None, None, None)
    assert json.loads(Store(url).read("lock"))["host"] == "elsewhere"  # which is not removed


def test_another_process_of_the_run_has_a_copy_of_its_own_and_uploads_its_logs(url):
    with stored_folder(url), stored_folder(url, process=1) as upload:
        folder = copy_of(url, 1)
        (folder / "logs").mkdir()
        for name in ("logs/process-1.txt", "run.json"):
            (folder / name).write_text("1")
        upload()
        assert Store(url).list().keys() == {"lock", "logs/process-1.txt"}


@pytest.mark.parametrize("error", [StoreError("no credentials"), FileNotFoundError("no such bucket")])
def test_a_store_that_cannot_be_used_is_an_error_of_the_flag(url, monkeypatch, error):
    monkeypatch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ConfigError, match=f"--workdir={url}: no "), stored_folder(url):
        pass
