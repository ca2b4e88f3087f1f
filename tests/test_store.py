"""Object stores: their objects, and the local copies that the rest of the code works on."""

import itertools

import fsspec
import pytest

from jaxllm.config import LOCAL_FLAGS, check_local
from jaxllm.errors import ConfigError
from jaxllm.files import is_url
from jaxllm.store import (
    Store,
    StoreError,
    copy_of,
    local_copy,
    local_path,
    publish,
    store_of,
    update_copy,
    url_of,
)

numbers = itertools.count()


@pytest.fixture(params=["memory", "file"])
def url(request, cache, tmp_path):
    """Of an empty folder on a store."""
    if request.param == "memory":
        return f"memory://bucket/{next(numbers)}"
    return f"file://{tmp_path}/bucket/run"


def test_objects_are_written_listed_copied_read_and_deleted(url, tmp_path):
    store = Store(url)
    assert store.list() == {}
    store.write("a", b"1")
    (tmp_path / "b").write_bytes(b"23")
    store.upload({"folder/b": tmp_path / "b"})
    store.copy({"folder/b": "other/b"})
    assert {name: each.size for name, each in store.list().items()} == {"a": 1, "folder/b": 2, "other/b": 2}
    assert Store(f"{url}/folder").list().keys() == {"b"}
    store.download({"other/b": tmp_path / "new" / "c"})
    assert (tmp_path / "new" / "c").read_bytes() == store.read("folder/b") == b"23"
    before = store.list()["a"].version
    assert store.list()["a"].version == before
    store.write("a", b"2")
    assert store.list()["a"].version != before
    store.delete(["a", "other/b", "never"])
    assert store.list().keys() == {"folder/b"}
    with pytest.raises(FileNotFoundError):
        store.read("a")


def test_only_one_creates_an_object(url):
    store = Store(url)
    assert [store.create("lock", content) for content in (b"1", b"2")] == [True, False]
    assert store.read("lock") == b"1"
    assert store.modified("lock") > 0


def test_a_failure_of_a_store_is_one_line_that_names_the_object(url, monkeypatch):
    store = Store(url)

    def fail(*_, **__):
        raise ValueError("no credentials\n  at line 7")

    monkeypatch.setattr(store.fs, "cat_file", fail)
    with pytest.raises(StoreError) as caught:
        store.read("a")
    assert str(caught.value) == f"{url}/a: ValueError: no credentials"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/run", r"pip install 'jaxllm\[gcs\]'"),
        ("s3://bucket/run", r"pip install 'jaxllm\[s3\]'"),
        ("nothing://bucket/run", "nothing:// is no known kind of store"),
    ],
)
def test_a_store_whose_package_is_missing_says_what_to_install(url, message, monkeypatch):
    def missing(url):
        raise ValueError("unknown") if "nothing" in url else ImportError("install it")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=message):
        Store(url)


@pytest.mark.parametrize("url", ["gs://bucket/runs/mine", "file:///shared/runs/mine", "s3://bucket/a b"])
def test_a_copy_knows_its_url(url, cache):
    for copy in (copy_of(url), copy_of(url, 0), copy_of(url, 12)):
        assert cache in copy.parents
        assert url_of(copy) == url
        assert url_of(copy / "checkpoints" / "30") == f"{url}/checkpoints/30"
    assert len({copy_of(url), copy_of(url, 0), copy_of(url, 12)}) == 3
    assert copy_of(f"{url}/") == copy_of(url) == local_path(url)
    with pytest.raises(ConfigError, match="must not contain"):
        copy_of("gs://bucket/../../etc")


def test_any_other_path_is_its_own_copy(cache, tmp_path):
    for path in (tmp_path / "run", cache / "compiled", cache / "stores"):
        assert url_of(path) == str(path)
        assert store_of(path) is None
        assert local_copy(path) == path
    (tmp_path / "file").touch()
    publish(tmp_path / "file")
    assert [is_url(each) for each in ("gs://b", "C:/x", "runs/a", "/a://b", "name=gs://b")] == [True] + 4 * [
        False
    ]


def test_a_copy_to_read_has_the_small_files_and_only_what_changed_is_downloaded_again(url, monkeypatch):
    store = Store(url)
    for name in (
        "config.json",
        "tb/events",
        "checkpoints/1/manifest.json",
        "checkpoints/1/state/a/0",
        "lock",
    ):
        store.write(name, b"1")
    copy = local_copy(url)
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert names == {"config.json", "tb/events", "checkpoints/1/manifest.json"}
    downloaded = []
    download = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, files: downloaded.extend(files) or download(self, files)
    )
    store.write("config.json", b"2")
    store.delete(["tb/events"])
    assert local_copy(url) == local_copy(copy) == copy
    assert downloaded == ["config.json"]
    assert (copy / "config.json").read_bytes() == b"2"
    assert not (copy / "tb").exists()


def test_a_run_folders_copy_is_made_equal_to_the_store_whatever_a_killed_process_left(url):
    store, copy = Store(url), copy_of(url, 0)
    store.write("metrics.jsonl", b"1")
    copy.mkdir(parents=True)
    assert update_copy(copy) == []
    (copy / "metrics.jsonl").write_bytes(b"2")
    for name in ("samples/7.txt", "checkpoints/2/state.orbax-checkpoint-tmp/a", "logs/hang.txt", ".x.tmp"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    assert update_copy(copy) == ["checkpoints/2/state.orbax-checkpoint-tmp/a", "samples/7.txt"]
    assert (copy / "metrics.jsonl").read_bytes() == b"1"
    assert sorted(path.name for path in copy.iterdir()) == [".x.tmp", "logs", "metrics.jsonl"]


@pytest.mark.parametrize("name", [*(f"--{flag}" for flag in sorted(LOCAL_FLAGS)), "tokenizer.path"])
def test_what_must_be_a_local_path_says_so(name):
    check_local("runs/a", name)
    check_local(None, name)
    with pytest.raises(ConfigError, match=f"{name}=s3://b/x must be a local path"):
        check_local("s3://b/x", name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs:/bucket/run", "begins with gs://$"),
        ("file:/tmp/run", "begins with file:///$"),
        ("file://tmp/run", "file://tmp/run must be an absolute path: file:///tmp/run"),
    ],
)
def test_a_mistyped_url_is_no_path(path, message):
    with pytest.raises(ConfigError, match=message):
        local_path(path)
