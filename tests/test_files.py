"""Files are written as a whole or not at all, and locked by one process at a time."""

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxllm.config import run_script
from jaxllm.files import is_running, locked, write_file, write_text


def test_a_partly_written_file_does_not_replace_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_file(file, b"old")

    def stop(descriptor):
        raise OSError("stopped here")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="stopped here"):
        write_file(file, b"new")
    assert file.read_bytes() == b"old"
    monkeypatch.undo()
    write_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_keeps_its_mode(tmp_path):
    file = tmp_path / "file"
    write_file(file, b"old")
    file.chmod(0o640)
    write_file(file, b"new")
    assert file.stat().st_mode & 0o777 == 0o640


def test_another_process_cannot_lock_a_locked_file(tmp_path):
    script = "import sys, pathlib, jaxllm.files; jaxllm.files.locked(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, tmp_path / "lock"]
    with locked(tmp_path / "lock"):
        other = subprocess.run(command, capture_output=True, text=True)
        assert "BlockingIOError" in other.stderr
    assert subprocess.run(command).returncode == 0


# Locks


def holder(path, **changes):
    """A lock file as another process would have left it."""
    found = {"host": socket.gethostname(), "pid": 10**7, "since": "2026-01-01T00:00:00+00:00"} | changes
    path.write_text(json.dumps(found))


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    with locked(tmp_path / "lock"):
        found = json.loads((tmp_path / "lock").read_text())
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on \S+ since 20"):
            locked(tmp_path / "lock")
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    script = (
        "import os, sys, pathlib, jaxllm.files; jaxllm.files.locked(pathlib.Path(sys.argv[1])); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "lock"]).returncode == 9
    with locked(tmp_path / "lock") as lock:
        assert lock.left_by.startswith("process ")
        with pytest.raises(BlockingIOError):
            locked(tmp_path / "lock")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("pid", "held"), [(10**7, False), (os.getpid(), True)], ids=["ended", "runs"])
def test_without_flock_a_process_of_this_host_is_looked_up(tmp_path, monkeypatch, pid, held):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    holder(tmp_path / "lock", pid=pid)
    with pytest.raises(BlockingIOError) if held else contextlib.nullcontext():
        locked(tmp_path / "lock").close()


@pytest.mark.parametrize(("silent", "held"), [(60, True), (600, False)])
def test_a_process_of_another_host_holds_its_lock_while_it_shows_signs_of_life(tmp_path, silent, held):
    path = tmp_path / "lock"
    holder(path, host="node-7", pid=12)
    os.utime(path, (time.time() - silent,) * 2)
    if held:
        with pytest.raises(
            BlockingIOError, match=r"process 12 on node-7 .*; if it has ended, remove .*/lock$"
        ):
            locked(path)
    else:
        with locked(path) as lock:
            assert lock.left_by.startswith("process 12 on node-7 since 2026")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_an_unreadable_lock_that_no_process_holds_is_replaced(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with locked(tmp_path / "lock") as lock:
        assert lock.left_by is None


def test_a_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxllm.files.BEAT", 0.01)
    with locked(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        while not (tmp_path / "lock").stat().st_mtime:
            time.sleep(0.01)


# Full disks


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys):
    (tmp_path / "file").symlink_to("/dev/full")
    code = run_script(lambda *_: write_text(tmp_path / "file", "text"), None, lambda flags: None, ["script"])
    assert code == 1
    message = f"error: {tmp_path}/file: No space left on device; free some and run the same command again"
    assert capsys.readouterr().err.startswith(message)


def test_a_file_that_did_not_fit_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match=r"File too large: '.*/file'"):
            write_file(tmp_path / "file", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_that_nobody_has_waited_for_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert is_running(process.pid)
    process.kill()
    deadline = time.monotonic() + 10
    while is_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(process.pid)
    process.wait()
