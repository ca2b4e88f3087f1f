"""Files are written as a whole or not at all, and locked by one process at a time."""

import os
import subprocess
import sys

import pytest

from jaxllm.files import locked, write_file


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
