"""Sources behind URLs are the files that they name: downloaded once, and again when they change."""

import gzip
import json
import sys

import fsspec
import pytest

from jaxllm.data.sources import check_source, open_source
from jaxllm.errors import ConfigError, DataError

ROWS = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two"))


@pytest.fixture
def bucket(cache):
    """A folder of files in a store: (name, content) -> URL."""
    store = fsspec.filesystem("memory")
    yield lambda name, content: store.pipe(f"/bucket/{name}", content) or f"memory://bucket/{name}"
    store.rm("/bucket", recursive=True)


def opened(name, text_key="text"):
    return open_source(str(name), split="train", text_key=text_key, synthetic_rows=1, seed=0)


def texts(name):
    return [row.value for row in opened(name).rows()]


def downloads(cache):
    return sorted(path.name.partition("-")[2] for path in (cache / "downloads").iterdir())


def test_a_file_of_a_store_has_the_rows_and_the_hash_of_a_file_here(bucket, tmp_path):
    url = bucket("rows.jsonl.gz", gzip.compress(ROWS, mtime=0))
    (tmp_path / "here.jsonl.gz").write_bytes(gzip.compress(ROWS, mtime=0))
    assert texts(url) == texts(f"file://{tmp_path}/here.jsonl.gz") == ["one", "two"]
    assert opened(url).content_hash == opened(tmp_path / "here.jsonl.gz").content_hash
    assert [row.value for row in opened(url, None).rows()] == [{"text": "one"}, {"text": "two"}]


def test_a_glob_reads_its_files_in_order_of_name(bucket, tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        bucket(name, json.dumps({"text": name}).encode())
        (tmp_path / name).write_text(json.dumps({"text": name}))
    for url in ("memory://bucket/*.jsonl", f"file://{tmp_path}/*.jsonl"):
        assert texts(url) == ["a.jsonl", "b.jsonl"]


def test_a_file_is_downloaded_once_and_again_when_it_has_changed(bucket, cache, monkeypatch):
    url = bucket("rows.jsonl", ROWS)
    assert texts(url) == ["one", "two"]
    memory = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "get_file", lambda *_, **__: pytest.fail("downloaded again"))
        assert texts(url) == ["one", "two"]
    assert downloads(cache).count("rows.jsonl") == 1
    bucket("rows.jsonl", ROWS.replace(b"two", b"ten"))
    assert texts(url) == ["one", "ten"]


def test_a_file_on_this_machine_is_not_copied(cache, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    assert texts(f"file://{tmp_path}/rows.jsonl") == ["one", "two"]
    assert not (cache / "downloads").exists()


def test_rows_and_errors_name_the_url(bucket):
    url = bucket("rows.jsonl", b'{"text": "one"}\nno json\n')
    assert [row.where for row in opened(url).rows()] == [f"{url}:1", f"{url}:2"]
    damaged = bucket("rows.jsonl.gz", gzip.compress(ROWS)[:-9])
    with pytest.raises(DataError, match=f"^{damaged}: the gzip file is truncated"):
        texts(damaged)


def test_a_download_that_breaks_off_is_one_line_and_leaves_no_cache(bucket, cache, monkeypatch):
    url = bucket("rows.jsonl", ROWS)

    def cut_off(store, path, place, **_):
        with open(place, "wb") as file:
            file.write(ROWS[:5])

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "get_file", cut_off)
        with pytest.raises(DataError, match=f"^{url}: 5 of {len(ROWS)} bytes arrived"):
            opened(url)
    assert texts(url) == ["one", "two"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/gone.jsonl", "'memory://bucket/gone.jsonl' does not exist"),
        ("memory://bucket/*.jsonl", "no file matches"),
        ("memory://bucket/table.csv", "memory://bucket/table.csv: only .txt, .jsonl, .json files"),
        ("s3://bucket/rows.jsonl", r"s3://bucket/rows.jsonl needs a package: pip install 'jaxllm\[s3\]'"),
        ("gs://bucket/*.jsonl", r"gs://bucket/\*.jsonl needs a package: pip install 'jaxllm\[gcs\]'"),
        ("sb3://bucket/rows.jsonl", "sb3:// is no known kind of store; did you mean 's3'"),
    ],
)
@pytest.mark.parametrize("use", [check_source, opened])
def test_what_cannot_be_reached_is_one_line(bucket, monkeypatch, use, url, message):
    for module in ("s3fs", "gcsfs"):  # wherever they are installed
        monkeypatch.setitem(sys.modules, module, None)
    bucket("table.csv", b"a,b")
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        use(url)
    assert "\n" not in str(caught.value)
