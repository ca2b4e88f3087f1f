"""Every kind of source gives its documents; every unusable row has its place and the reason."""

import gzip
import json
import os
import sys
from types import SimpleNamespace

import pytest

from jaxllm.data import content_hash, readers
from jaxllm.data.sources import Row, Source, open_source
from jaxllm.errors import DataError, RunError


def opened(name, **options) -> Source:
    defaults = {"split": "train", "text_key": "text", "synthetic_rows": 3, "seed": 0}
    return open_source(str(name), **(defaults | options))


def texts(name, **options) -> list[str | None]:
    return [row.value for row in opened(name, **options).rows()]


def bad_rows(name, **options) -> list[str]:
    return [
        f"{row.where}: {row.problem} {row.detail}".strip()
        for row in opened(name, **options).rows()
        if row.value is None
    ]


def write(path, content: bytes):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zst":
        import pyarrow

        half = len(content) // 2  # two frames, as parallel compressors write
        content = b"".join(pyarrow.compress(x, "zstd").to_pybytes() for x in (content[:half], content[half:]))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def json_lines(*values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def save_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def quiet_datasets():
    import datasets

    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
    assert texts(write(tmp_path / name, "First\r\n\n  línea \x00\n".encode())) == [
        "First\r\n\n  línea \x00\n"
    ]


BOM = "\ufeff"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", f"{BOM}hi", ["hi"]),
        ("a.txt.gz", f"{BOM}one\r\n{BOM}two\n three{BOM}\n", [f"one\r\ntwo\n three{BOM}\n"]),
        ("a.jsonl", BOM + '{"text": "hi"}', ["hi"]),
        ("a.jsonl", f'{{"text": "one"}}\n{BOM}{{"text": "two"}}\r\n{BOM}\n', ["one", "two"]),
        ("a.jsonl", '{"text": "\\ufeffone\\n\\ufefftwo"}', ["one\ntwo"]),
        ("a.jsonl", '{"\\ufefftext": "hi"}', ["hi"]),
    ],
)
def test_a_byte_order_mark_at_the_start_of_a_line_is_no_text(tmp_path, name, content, expected):
    path = write(tmp_path / name, content.encode())
    assert texts(path) == expected
    assert [row["text"].replace(BOM, "") for row in texts(path, text_key=None)] == [
        text.replace(BOM, "") for text in expected
    ]


def test_a_byte_order_mark_in_a_table_is_no_text(tmp_path, quiet_datasets):
    columns = {"text": [f"{BOM}one", f"two\n{BOM}three"]}
    assert texts(save_parquet(tmp_path / "a.parquet", columns)) == ["one", "two\nthree"]
    path = save_parquet(tmp_path / "b.parquet", {f"{BOM}prompt": ["one"]})
    assert texts(path, text_key=None) == [{"prompt": "one"}]


def test_a_file_of_a_byte_order_mark_alone_is_empty(tmp_path):
    path = write(tmp_path / "a.txt", BOM.encode())
    assert bad_rows(path) == [f"{path}:1: empty text"]


def test_columns_besides_the_text_are_named(tmp_path):
    path = write(
        tmp_path / "a.jsonl", json_lines({"id": 0, "text": "one", "tags": [], "url": None, "by": "Bo"})
    )
    assert [row.unread for row in opened(path).rows()] == [("id", "by")]
    assert [row.unread for row in opened(path, text_key=None).rows()] == [()]
    path = save_parquet(tmp_path / "a.parquet", {"id": [1, 2], "text": ["one", "two"]})
    assert [row.unread for row in opened(path).rows()] == [("id",)] * 2


def test_a_large_text_file_is_cut_at_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK", 10)
    path = write(tmp_path / "a.txt", b"one\ntwo\nthree four\nfive\n")
    assert [(row.where, row.value) for row in opened(path).rows()] == [
        (f"{path}:1", "one\ntwo\nthree four\n"),
        (f"{path}:4", "five\n"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz"])
def test_json_lines_give_the_text_of_each_object(tmp_path, name):
    path = write(tmp_path / name, json_lines({"id": 1, "text": "one\u2028line"}, {"text": "two"}) + b"\n  \n")
    assert texts(path) == ["one\u2028line", "two"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1, 7, 2**24])
def test_a_json_array_gives_its_elements_with_their_lines(tmp_path, monkeypatch, name, indent, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    values = [{"text": 'a "quoted] line\\n'}, {"text": "zwei ü"}, {"txt": 3}, [1], {"text": "five"}]
    content = "\n " + json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    path = write(tmp_path / name, content.encode())
    rows = list(opened(path).rows())
    assert [row.value for row in rows] == ['a "quoted] line\\n', "zwei ü", None, None, "five"]
    assert [row.where for row in rows] == [
        f"{path}:{line}" for line in ((3, 6, 9, 12, 15) if indent else (2, 2, 2, 2, 2))
    ]
    assert texts(write(tmp_path / name, b" [ ]\n")) == [None]  # an empty file


@pytest.mark.parametrize(
    ("content", "reason", "kept"),
    [
        (b'[{"text": "one"}, {"text": "two"', "invalid JSON", 1),
        (b'[{"text": "one"}, {"text": "two"}', "invalid JSON", 1),
        (b'[{"text": "one"} {"text": "two"}]', "invalid JSON Expecting ',' delimiter", 1),
        (b'[{"text": "one"}, {"text": "caf\xe9"}, {"text": "three"}]', "invalid UTF-8 byte 0xe9", 2),
        (b'[{"text": "one"}, nonsense]', "invalid JSON Expecting value", 1),
    ],
)
def test_a_damaged_json_array_is_reported(tmp_path, content, reason, kept):
    path = write(tmp_path / "a.json", content)
    (bad,) = bad_rows(path)
    assert bad.startswith(f"{path}:1: {reason}")
    assert len([text for text in texts(path) if text]) == kept


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_give_their_rows(tmp_path, form):
    import pyarrow

    table = pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]})
    path = tmp_path / "a.arrow"
    make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    rows = list(opened(path).rows())
    assert [row.value for row in rows] == ["one", None, "three"]
    assert [row.where for row in rows] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert rows[0].unread == ("id",)
    assert texts(path, text_key=None)[0] == {"id": 1, "text": "one"}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"a.arrow: the arrow file is damaged"):
        texts(path)


def test_parquet_gives_the_text_of_its_column(tmp_path):
    path = save_parquet(tmp_path / "a.parquet", {"body": ["one", "two"], "other": [1, 2]})
    assert texts(path, text_key="body") == ["one", "two"]


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.txt"):
        write(tmp_path / name, json_lines({"text": name}) if "jsonl" in name else name.encode())
    assert texts(tmp_path / "*") == ["a.jsonl", "b.txt", "c.txt"]
    assert texts(tmp_path / "[bc].txt") == ["b.txt", "c.txt"]


def test_a_folder_saved_by_datasets(tmp_path, quiet_datasets):
    data = quiet_datasets.Dataset.from_dict({"text": ["one", None, "two"]})
    data.save_to_disk(tmp_path / "plain")
    quiet_datasets.DatasetDict(train=data, validation=data.select([2])).save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "plain") == ["one", None, "two"]
    assert bad_rows(tmp_path / "plain") == [f"{tmp_path}/plain:2: wrong type 'text' is null, not a string"]
    assert texts(tmp_path / "splits", split="validation") == ["two"]
    with pytest.raises(DataError, match=r"no split 'test'; it has train, validation"):
        opened(tmp_path / "splits", split="test")
    with pytest.raises(DataError, match=r"no column 'txt'; did you mean 'text'\?; set text_key"):
        opened(tmp_path / "plain", text_key="txt")


@pytest.fixture
def hub(tmp_path, monkeypatch, quiet_datasets):
    """Downloads nothing: a folder in the place of a repository."""
    for split in ("train", "test"):
        write(
            tmp_path / "name" / f"{split}.jsonl",
            json_lines(*({"text": f"{split} {i}", "id": i} for i in range(5))),
        )
    monkeypatch.setattr(quiet_datasets.config, "HF_DATASETS_CACHE", tmp_path / "downloads")
    return f"{tmp_path}/name"


def test_of_a_dataset_of_the_hub_only_the_split_that_is_read_is_downloaded(hub, tmp_path):
    assert texts(f"hf:{hub}") == [f"train {i}" for i in range(5)]
    assert [path.name for path in (tmp_path / "downloads").rglob("*.arrow")] == ["name-train.arrow"]
    assert texts(f"hf:{hub}:default:train[1:3]") == ["train 1", "train 2"]
    assert texts(f"hf:{hub}:default:test[:1]") == ["test 0"]
    with pytest.raises(DataError, match=r"^hf:.*name has no split 'validation'; it has train, test$"):
        opened(f"hf:{hub}", split="validation")


def test_other_rows_of_a_split_are_another_source(hub):
    hashes = {opened(f"hf:{hub}:default:train{part}").content_hash for part in ("", "[:2]", "[1:3]", "[2:4]")}
    assert len(hashes) == 4


def test_a_stream_of_the_hub_keeps_nothing_on_disk(hub, tmp_path):
    source = opened(f"hf-stream:{hub}:default:train[:3]")
    assert [(row.value, row.where, row.done, row.unread) for row in source.rows()] == [
        (f"train {i}", f"{source.name}:{i + 1}", i + 1, ("id",)) for i in range(3)
    ]
    assert source.size == 3
    assert texts(f"hf-stream:{hub}", text_key=None)[4] == {"text": "train 4", "id": 4}
    assert not list((tmp_path / "downloads").rglob("*.arrow"))
    names = ("hf-stream:{}", "hf-stream:{}::train[:3]", "hf-stream:{}::test")
    assert len({opened(name.format(hub)).content_hash for name in names}) == 3
    with pytest.raises(DataError, match=r"only the first rows can be read, such as train\[:10000\]"):
        opened(f"hf-stream:{hub}::train[2:3]")
    with pytest.raises(DataError, match=r"no column 'txt'; did you mean 'text'"):
        opened(f"hf-stream:{hub}", text_key="txt")


def test_a_stream_that_breaks_off_says_so_and_keeps_what_is_tokenized(hub, monkeypatch, quiet_datasets):
    def rows(_):
        yield {"text": "one", "id": 1}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(quiet_datasets.IterableDataset, "__iter__", rows)
    with pytest.raises(RunError, match=r"download stopped after 1 rows \(ConnectionError: reset") as error:
        texts(f"hf-stream:{hub}")
    assert not isinstance(error.value, DataError)


def test_the_error_of_an_unreachable_hub_is_one_line(monkeypatch, quiet_datasets):
    def load_dataset_builder(name, subset):
        raise ConnectionError("no route\nand a page of detail")

    monkeypatch.setattr(quiet_datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(DataError) as error:
        opened("hf:org/name")
    assert str(error.value) == "hf:org/name: cannot be loaded from the hub (ConnectionError: no route)"


def test_without_a_text_key_rows_are_whole_records(tmp_path, quiet_datasets):
    records = [{"messages": [{"role": "user", "content": "Hi"}], "id": 1}, {"messages": [], "id": 2}]
    write(tmp_path / "a.jsonl", json_lines(*records))
    save_parquet(tmp_path / "a.parquet", {name: [each[name] for each in records] for name in records[0]})
    quiet_datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        assert texts(tmp_path / name, text_key=None) == records
    assert texts(write(tmp_path / "b.txt", b"Hi\n"), text_key=None) == [{"text": "Hi\n"}]


def test_records_need_no_key_but_must_be_objects_and_texts_not_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines({}, {"text": 3}, ["Hi"]))
    assert texts(path, text_key=None) == [{}, {"text": 3}, None]
    assert bad_rows(path, text_key=None) == [f"{path}:3: wrong type the row is a list, not an object"]
    path = write(tmp_path / "a.txt", b" \n")
    assert bad_rows(path, text_key=None) == [f"{path}:1: empty text"]


def test_a_source_of_records_has_another_hash_than_one_of_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines({"text": "one"}))
    assert opened(path).content_hash != opened(path, text_key=None).content_hash
    assert opened("synthetic").content_hash != opened("synthetic", text_key=None).content_hash


def test_a_rejected_row_is_a_fault_by_default(tmp_path):
    (row,) = opened(write(tmp_path / "a.jsonl", b"{")).rows()
    assert row.fault
    kept = Row("a.jsonl:3", 7, "value")
    rejected = kept.rejected("too long", "9 tokens", fault=False)
    assert str(rejected) == "a.jsonl:3: too long (9 tokens)"
    assert (rejected.value, rejected.done, rejected.fault) == (None, 7, False)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("documents", {"text"}), ("chats", {"messages"}), ("preferences", {"chosen", "rejected"})],
)
def test_each_kind_of_synthetic_record_has_its_keys(kind, keys):
    rows = list(opened(f"synthetic:{kind}", text_key=None).rows())
    assert [row.where for row in rows] == [f"synthetic:{kind}:{i}" for i in (1, 2, 3)]
    assert all(keys <= row.value.keys() for row in rows)
    assert texts("synthetic") == texts("synthetic:documents")


def test_an_unknown_kind_of_synthetic_rows_suggests_the_nearest():
    with pytest.raises(DataError, match=r"'synthetic:chat' does not exist; did you mean 'chats'\?"):
        opened("synthetic:chat")
    with pytest.raises(DataError, match=r"available: 'documents', 'chats', .*'problems'"):
        opened("synthetic:xyz")


def test_synthetic_records_without_a_text_are_bad_rows_with_their_keys():
    assert bad_rows("synthetic:chats")[0].startswith("synthetic:chats:1: missing key no 'text'; available: ")


def test_synthetic_rows_and_their_content_hash(monkeypatch, tmp_path):
    def documents(split, *, count, seed):
        return (f"{split} {seed} {i}" for i in range(count))

    code = write(tmp_path / "__init__.py", b"def documents(): ...")
    fake = SimpleNamespace(documents=documents, __file__=str(code))
    monkeypatch.setitem(sys.modules, "jaxllm.toy_world", fake)
    monkeypatch.setattr("jaxllm.toy_world", fake, raising=False)
    assert texts("synthetic", seed=7) == ["train 7 0", "train 7 1", "train 7 2"]
    assert texts("synthetic", split="validation", synthetic_rows=1) == ["validation 0 0"]
    before = opened("synthetic").content_hash
    assert before == opened("synthetic").content_hash != opened("synthetic", seed=1).content_hash
    write(code, b'def documents(): """A comment that changes no row."""')
    assert opened("synthetic").content_hash == before
    write(tmp_path / "words.txt", b"a new word")
    after = opened("synthetic").content_hash
    assert after != before
    fake.documents = lambda split, *, count, seed: (f"{split} {seed}: {i}" for i in range(count))
    assert opened("synthetic").content_hash not in (before, after)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', "invalid UTF-8 byte 0xe9"),
        (b'{"text": "cut o', "invalid JSON Unterminated string starting at: column 10"),
        (b'{"txt": "a"}', "missing key no 'text'; did you mean 'txt'?"),
        (b'{"title": "a", "body": "b"}', "missing key no 'text'; available: 'title', 'body'"),
        (b'{"text": 3}', "wrong type 'text' is a number, not a string"),
        (b'{"text": null}', "wrong type 'text' is null, not a string"),
        (b'{"text": ["a"]}', "wrong type 'text' is a list, not a string"),
        (b'["text"]', "wrong type the row is a list, not an object"),
        (b'{"text": " \\n"}', "empty text"),
    ],
)
def test_a_bad_line_is_reported_with_the_reason_and_the_others_are_read(tmp_path, line, reason):
    path = write(
        tmp_path / "a.jsonl", json_lines({"text": "one"}) + line + b"\n" + json_lines({"text": "two"})
    )
    assert bad_rows(path) == [f"{path}:2: {reason}"]
    assert texts(path) == ["one", None, "two"]


def test_json_beyond_the_limits_of_the_parser_is_a_bad_line(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n" + b"9" * 5000)
    assert [row.problem for row in opened(path).rows()] == ["invalid JSON"] * 2


def test_a_text_file_that_is_not_utf8_is_reported_with_the_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\nthé\n".encode("latin-1"))
    assert bad_rows(path) == [f"{path}:3: invalid UTF-8 byte 0xe9"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz"])
def test_an_empty_file_is_a_bad_row(tmp_path, name):
    path = write(tmp_path / name, b"")
    assert bad_rows(path) == [f"{path}:1: empty file"]


def test_parquet_rows_can_be_bad_too(tmp_path):
    import pyarrow

    invalid = pyarrow.array([b"caf\xe9", b"fine"]).cast(pyarrow.binary()).view(pyarrow.string())
    path = save_parquet(tmp_path / "a.parquet", {"text": invalid})
    assert bad_rows(path) == [f"{path}:1: invalid UTF-8 byte 0xe9"]
    path = save_parquet(tmp_path / "b.parquet", {"text": ["", None, "fine"]})
    assert bad_rows(path) == [f"{path}:1: empty text", f"{path}:2: wrong type 'text' is null, not a string"]


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_the_error_of_a_truncated_gzip_file_is_one_line(tmp_path, keep):
    whole = gzip.compress(json_lines(*({"text": f"document {i * 7919}"} for i in range(1000))))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=rf"{path}: the gzip file is truncated or damaged") as error:
        texts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"plain text", None])
def test_the_error_of_a_damaged_zstd_file_is_one_line(tmp_path, content):
    path = write(
        tmp_path / "a.jsonl.zst", json_lines(*({"text": f"document {i * 7919}"} for i in range(1000)))
    )
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(DataError, match=rf"{path}: the zstd file is truncated or damaged") as error:
        texts(path)
    assert "\n" not in str(error.value)


def test_the_error_of_a_file_that_is_not_gzip_or_parquet_is_one_line(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"a.txt.gz: the gzip file is truncated or damaged"):
        texts(tmp_path / "a.txt.gz")
    (tmp_path / "a.parquet").write_bytes(b"plain text" * 10)
    with pytest.raises(DataError, match=r"a.parquet: the parquet file is damaged"):
        texts(tmp_path / "a.parquet")


def test_a_name_that_does_not_exist_suggests_the_nearest(tmp_path):
    write(tmp_path / "shakespeare.txt", b"text")
    write(tmp_path / "novel.tx", b"cannot be read, as its name ends")
    with pytest.raises(DataError, match=r"does not exist; available: 'shakespeare.txt'$"):
        opened(tmp_path / "novel.txt")
    (tmp_path / "novel.tx").unlink()
    with pytest.raises(DataError, match=r"does not exist; did you mean 'shakespeare.txt'\?"):
        opened(tmp_path / "shakespear.txt")
    with pytest.raises(DataError, match=r"no file matches '.*/\*.jsonl'"):
        opened(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match=r"not a dataset saved by save_to_disk; .* such as '.*/\*.txt'"):
        opened(tmp_path)
    write(tmp_path / "table.csv", b"text")
    with pytest.raises(
        DataError,
        match=r"table.csv: only .txt, .jsonl, .json files \(also .gz and .zst\)",
    ):
        opened(tmp_path / "*")


def test_the_error_of_a_damaged_saved_dataset_is_one_line(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"the saved dataset cannot be read") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_the_content_hash_depends_on_the_content_not_the_name(tmp_path):
    first = opened(write(tmp_path / "a.jsonl", json_lines({"text": "one"})))
    moved = opened(write(tmp_path / "b.jsonl", json_lines({"text": "one"})))
    changed = opened(write(tmp_path / "c.jsonl", json_lines({"text": "onE"})))
    other_kind = opened(write(tmp_path / "a.txt", json_lines({"text": "one"})))
    other_key = opened(tmp_path / "a.jsonl", text_key="body")
    assert first.content_hash == moved.content_hash
    assert len({s.content_hash for s in (first, changed, other_kind, other_key)}) == 4


@pytest.fixture
def remembering(tmp_path, monkeypatch):
    """Hashes are remembered for files of any size, in a folder of the test; how often one was computed."""
    computed = []
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "_SMALL", 0)
    monkeypatch.setattr(content_hash, "_SAMPLE", 4)
    compute = content_hash._hash
    monkeypatch.setattr(content_hash, "_hash", lambda *given: computed.append(0) or compute(*given))
    return computed


def test_a_source_is_hashed_once(tmp_path, remembering, monkeypatch):
    path = write(tmp_path / "a.txt", b"one " * 1000)
    os.utime(path, (1, 1))
    found = opened(path).content_hash
    assert opened(path).content_hash == found
    assert len(remembering) == 1
    monkeypatch.setattr(content_hash, "_SMALL", 2**20)
    assert opened(path).content_hash == found  # the same as without the memory


@pytest.mark.parametrize("change", ["size", "time", "sample", "name"])
def test_a_changed_source_is_hashed_again(tmp_path, remembering, change):
    path = write(tmp_path / "a.txt", b"one " * 1000)
    os.utime(path, (1, 1))
    first = opened(path).content_hash
    if change == "name":
        path = path.rename(tmp_path / "b.txt")
    else:
        path.write_bytes({"size": b"one " * 999, "sample": b"oNe " * 1000}.get(change, b"one " * 1000))
        os.utime(path, (2, 2) if change == "time" else (1, 1))
    assert (opened(path).content_hash == first) == (change in ("time", "name"))
    assert len(remembering) == 2


def test_a_source_that_was_just_written_is_not_remembered(tmp_path, remembering):
    path = write(tmp_path / "a.txt", b"one " * 1000)
    for _ in range(2):
        opened(path)
    assert len(remembering) == 2


def test_the_hashes_of_sources_are_those_of_earlier_versions(tmp_path):
    """They are in the fingerprints of runs, which could not be resumed otherwise."""
    path = write(tmp_path / "a.jsonl", json_lines({"text": "one"}))
    assert opened(path).content_hash == "a2031189d7ae8adf3de33f66d2eb2140"
    assert opened(path, text_key=None).content_hash == "89d5bbaad54e28678c71c797b6ceb2a3"


def test_progress_reaches_the_size_of_the_source(tmp_path, quiet_datasets):
    write(tmp_path / "a.jsonl", json_lines({"text": "one"}, {"text": "two"}))
    write(tmp_path / "b.txt.gz", b"text")
    save_parquet(tmp_path / "c.parquet", {"text": ["one"] * 5})
    quiet_datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    for name in ("*.*", "saved"):
        source = opened(tmp_path / name)
        done = [row.done for row in source.rows()]
        assert done == sorted(done)
        assert done[-1] == source.size


def test_rows_can_be_read_repeatedly(tmp_path):
    source = opened(write(tmp_path / "a.jsonl", json_lines({"text": "one"})))
    assert list(source.rows()) == list(source.rows())
    assert isinstance(next(iter(source.rows())), Row)
