"""A cache is built once, by one process; what killed builds leave is deleted when nobody continues it."""

import os
import time

import pytest

from jaxllm.caches import KEPT_SECONDS, read_or_build
from jaxllm.errors import DataError
from jaxllm.files import locked

HASH = "0123456789abcdef" * 2


def read(path):
    return path.read_text() if path.is_file() else None


def build(path):
    path.write_text("built")


def age(path, seconds):
    for each in (*path.glob("*"), path):
        os.utime(each, (time.time() - seconds,) * 2)


@pytest.mark.parametrize(
    "name",
    [
        f"{HASH}.partial",
        f"reference-{HASH}.npy.partial",
        f"{HASH}.123.0a1b2c3d",
        f"reference-{HASH}.run-1.npy",
    ],
)
@pytest.mark.parametrize("is_folder", [True, False])
def test_half_built_caches_that_are_old_are_deleted(tmp_path, name, is_folder):
    for folder, seconds in (("old", KEPT_SECONDS + 60), ("young", KEPT_SECONDS - 60)):
        path = tmp_path / folder / name
        path.parent.mkdir()
        if is_folder:
            path.mkdir()
            (path / "tokens").write_text("half")
        else:
            path.write_text("half")
        age(path, seconds)
        assert read_or_build(tmp_path / folder / "new", read, build, "make it") == "built"
        assert path.exists() == (folder == "young")
        assert sorted(each.name for each in path.parent.iterdir()) == sorted(
            {"new", *([name] if folder == "young" else [])}
        )


def test_complete_caches_and_those_that_are_being_built_are_kept(tmp_path):
    kept = [tmp_path / name for name in (HASH, f"reference-{HASH}.npy", f"{HASH}0.partial", "compiled")]
    for path in kept:
        path.write_text("x")
        age(path, 10 * KEPT_SECONDS)
    with locked(tmp_path / f"{HASH}0.lock"):
        read_or_build(tmp_path / "new", read, build, "make it")
    assert all(path.exists() for path in kept)


def test_a_complete_cache_is_read_without_a_lock(tmp_path):
    (tmp_path / "a").write_text("whole")
    with locked(tmp_path / "a.lock"):
        assert read_or_build(tmp_path / "a", read, None, "make it") == "whole"


def test_a_cache_that_cannot_be_read_back_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"new: what was just written cannot be read back; check the disk"):
        read_or_build(tmp_path / "new", lambda path: None, build, "make it")
