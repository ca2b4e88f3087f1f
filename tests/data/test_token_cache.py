"""Text is tokenized once, into a cache that is complete or does not exist."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.data import source_cache, token_cache
from jaxllm.data.rows import BadRowPolicy
from jaxllm.data.sources import Row, Source
from jaxllm.data.token_cache import cached_tokens
from jaxllm.errors import DataError
from jaxllm.files import CACHE_VARIABLE

pytestmark = pytest.mark.usefixtures("cache")

SKIP = BadRowPolicy("skip", 0.5)
STOP = BadRowPolicy("stop", 0.5)


def source_of(texts, content_hash="hash") -> Source:
    """Rows of `texts`; None is a bad row."""

    def rows():
        for i, text in enumerate(texts, 1):
            row = Row(f"a.jsonl:{i}", i, text or "")
            yield row if text else row.rejected("missing key", "no 'text'")

    return Source("a.jsonl", content_hash, len(texts), rows)


def unreadable(content_hash="hash") -> Source:
    def rows():
        raise AssertionError("the source was read")

    return Source("a.jsonl", content_hash, 1, rows)


@pytest.fixture
def tokens_of(tokenizer):
    def cached(source, policy=SKIP):
        return cached_tokens(source, tokenizer, policy)

    return cached


def columns(found):
    """All that a cache holds."""
    arrays = (found.tokens, found.offsets, found.text_hashes, found.text_keys)
    return [array.tolist() for array in arrays], found.counts, found.bad_rows.read_text()


def fake_tokenizer(**fields):
    plain = {"vocab_size": 9, "bos_id": 1, "eos_id": 2, "hash": "h"}
    return SimpleNamespace(**plain | {"encode_batch": lambda texts: [[5] for _ in texts]} | fields)


def test_each_document_is_one_bos_its_text_and_one_eos(tokens_of, tokenizer):
    texts = ["Ada left.", "<s> is text here</s>", "漢字"]
    cache = tokens_of(source_of(texts))
    for i, text in enumerate(texts):
        document = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        assert document == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert cache.offsets[-1] == len(cache.tokens) == cache.counts.tokens
    assert cache.counts.text_bytes == sum(len(text.encode()) for text in texts)


def test_half_a_surrogate_pair_is_no_error(tokens_of):
    assert tokens_of(source_of(["a\ud800b"])).counts.documents == 1


def test_batches_lose_no_document(tokens_of, monkeypatch):
    monkeypatch.setattr(source_cache, "num_processes", lambda: 1)
    texts = [f"document {i}" for i in range(25)]
    whole = tokens_of(source_of(texts, "one"))
    monkeypatch.setattr(token_cache, "_BATCH_ROWS", 4)
    by_rows = tokens_of(source_of(texts, "two"))
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 30)
    by_characters = tokens_of(source_of(texts, "three"))
    assert whole.tokens.tolist() == by_rows.tokens.tolist() == by_characters.tokens.tolist()
    assert whole.text_hashes.tolist() == by_rows.text_hashes.tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_are_stored_in_two_bytes_where_they_fit(vocab_size, dtype):
    last = vocab_size - 1
    fake = fake_tokenizer(vocab_size=vocab_size, encode_batch=lambda texts: [[last] for _ in texts])
    cache = cached_tokens(source_of(["a"]), fake, SKIP)
    assert cache.tokens.dtype == dtype
    assert cache.tokens.tolist() == [1, last, 2]


def test_a_second_run_does_not_read_the_source(tokens_of):
    first = tokens_of(source_of(["Ada left.", "Bo too."]))
    again = tokens_of(unreadable())
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.counts == first.counts
    assert isinstance(again.tokens, np.memmap)


def test_other_content_tokenizer_or_format_is_tokenized_again(tokens_of, tokenizer, monkeypatch):
    keys = {tokens_of(source_of(["a"])).key, tokens_of(source_of(["b"], "other")).key}
    other = fake_tokenizer(vocab_size=400, hash="other", encode_batch=tokenizer.encode_batch)
    keys.add(cached_tokens(source_of(["a"]), other, SKIP).key)
    monkeypatch.setattr(token_cache, "_FORMAT", 0)
    keys.add(tokens_of(source_of(["a"])).key)
    assert len(keys) == 4


@pytest.mark.parametrize("name", ["tokens", "offsets", "text_hashes", "meta.json"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "missing"])
def test_a_damaged_cache_is_rebuilt(tokens_of, name, damage):
    cache = tokens_of(source_of(["Ada left.", "Bo too."]))
    before = cache.tokens.tolist()
    path = cache.bad_rows.parent / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-2] if damage == "shorter" else content + b"}}")
    with pytest.raises(AssertionError, match="the source was read"):
        tokens_of(unreadable())
    assert tokens_of(source_of(["Ada left.", "Bo too."])).tokens.tolist() == before


def test_ids_out_of_range_are_tokenized_again(tokens_of, tokenizer, capsys):
    texts = ["Ada left.", "Bo too."]
    path = tokens_of(source_of(texts)).bad_rows.parent / "tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:6] + b"\xff\xff" + whole[8:])  # as from a disk that lost a block
    with pytest.raises(AssertionError, match="the source was read"):
        tokens_of(unreadable())
    assert f"has the id 65535, but the tokenizer {tokenizer.vocab_size} tokens" in capsys.readouterr().err
    assert tokens_of(source_of(texts)).tokens.tobytes() == whole


def test_a_source_that_is_not_allowed_leaves_nothing_behind(tokens_of, cache):
    with pytest.raises(DataError):
        tokens_of(source_of(["fine", None]), STOP)
    assert list(cache.iterdir()) == []


KILLED = """
import os, signal, sys
from jaxllm.data import source_cache, token_cache
from test_token_cache import SKIP, fake_tokenizer, source_of

token_cache._BATCH_ROWS, source_cache._RECORD_SECONDS = 2, 0
def encode_batch(texts):
    if "killed" in texts:
        os.kill(os.getpid(), signal.SIGKILL)
    return [[len(text)] for text in texts]

texts = ["one", None, "three", "four", "five", "killed", "seven"]
token_cache.cached_tokens(source_of(texts), fake_tokenizer(encode_batch=encode_batch), SKIP)
"""


def test_a_killed_run_is_continued_where_it_was(cache, monkeypatch, capsys):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    killed = subprocess.run([sys.executable, "-c", KILLED], timeout=60, check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".partial"]
    encoded = []

    def encode_batch(texts):
        encoded.extend(texts)
        return [[len(text)] for text in texts]

    texts = ["one", None, "three", "four", "five", "killed", "seven"]
    continued = cached_tokens(source_of(texts), fake_tokenizer(encode_batch=encode_batch), SKIP)
    assert encoded == ["five", "killed", "seven"]
    assert "tokenize a.jsonl: continued after 4 rows" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == [continued.key]
    found = columns(continued)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "other"))
    assert columns(cached_tokens(source_of(texts), fake_tokenizer(encode_batch=encode_batch), SKIP)) == found


def test_a_run_that_is_killed_at_the_end_encodes_nothing_again(tokens_of, cache, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "complete", fails)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(source_of(["one", None, "three"]))
    monkeypatch.setattr(token_cache, "tokenize", fails)
    found = tokens_of(source_of(["one", None, "three"]))
    assert found.counts.documents == 2
    assert not (found.bad_rows.parent / "progress.json").exists()


def test_a_damaged_part_of_a_killed_run_is_not_continued(tokens_of, cache, monkeypatch):
    whole = tokens_of(source_of(["one", "two"], "other")).tokens.tolist()
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "empty"))
    monkeypatch.setattr(source_cache, "_RECORD_SECONDS", 0)
    monkeypatch.setattr(token_cache, "_BATCH_ROWS", 1)

    def rows():
        yield Row("a:1", 1, "one")
        yield Row("a:2", 2, "two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens_of(Source("a.jsonl", "hash", 2, rows))
    (partial,) = (cache / "empty").iterdir()
    (partial / "tokens").write_bytes(b"")
    assert tokens_of(source_of(["one", "two"])).tokens.tolist() == whole


def test_tokens_do_not_depend_on_the_number_of_processes(tokens_of, cache, documents, monkeypatch):
    texts = [*documents[:40], None, *documents[40:80]]
    found = columns(tokens_of(source_of(texts)))
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "other"))
    monkeypatch.setattr(token_cache, "_BATCH_ROWS", 7)
    monkeypatch.setattr(source_cache, "num_processes", lambda: 2)
    assert columns(tokens_of(source_of(texts))) == found


def test_of_two_runs_at_once_the_second_waits_for_the_first(tokens_of, capsys):
    second = []

    def rows():
        yield Row("a:1", 1, "one")
        threads.submit(lambda: second.append(tokens_of(unreadable())))
        while "waiting for" not in (said := capsys.readouterr().out):
            time.sleep(0.01)
        printed.append(said)
        yield Row("a:2", 2, "two")

    printed = []
    with ThreadPoolExecutor(1) as threads:
        first = tokens_of(Source("a.jsonl", "hash", 2, rows))
    assert second[0].tokens.tolist() == first.tokens.tolist()
    assert re.match(
        r"waiting for process \d+ on .*, which has the lock to tokenize a.jsonl$", printed[0].strip()
    )


def test_the_first_bad_row_stops_the_run(tokens_of):
    with pytest.raises(DataError) as error:
        tokens_of(source_of(["fine", None, None]), STOP)
    assert str(error.value) == "a.jsonl:2: missing key (no 'text'); fix the row, or set data.on_bad_row=skip"


def test_skipped_rows_are_counted_and_written_to_a_file(tokens_of):
    cache = tokens_of(source_of(["fine", None, "fine too"]))
    assert (cache.counts.rows, cache.counts.documents, cache.counts.dropped) == (3, 2, {"missing key": 1})
    assert [json.loads(line) for line in cache.bad_rows.read_text().splitlines()] == [
        {"where": "a.jsonl:2", "reason": "missing key", "detail": "no 'text'"}
    ]
    assert str(cache.counts) == "3 rows read, 2 kept, 1 dropped (1 missing key)"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            BadRowPolicy("skip", 0.3),
            r"1 of 3 rows are bad, more than data.max_bad_fraction=0.3; .*; the first: a.jsonl:2",
        ),
        (STOP, r"a.jsonl:2: missing key"),
    ],
)
def test_a_stricter_policy_applies_to_a_cache_made_under_a_lenient_one(tokens_of, policy, message):
    tokens_of(source_of(["fine", None, "fine too"]))
    with pytest.raises(DataError, match=message):
        tokens_of(unreadable(), policy)


def test_a_fraction_of_bad_rows_up_to_the_limit_passes(tokens_of):
    assert tokens_of(source_of(["fine", None]), BadRowPolicy("skip", 0.5)).counts.documents == 1


def test_a_source_of_bad_rows_stops_the_run_early(tokens_of, monkeypatch):
    monkeypatch.setattr(token_cache, "_BATCH_ROWS", 1000)

    def rows():
        for i in range(2000):
            yield Row(f"a:{i}", i, "").rejected("empty text")
        raise AssertionError("did not stop although every row is bad")

    with pytest.raises(DataError, match="1000 of 1000 rows are bad"):
        tokens_of(Source("a", "hash", 3000, rows))


def test_a_source_without_any_text_is_an_error(tokens_of):
    with pytest.raises(DataError, match=r"a.jsonl has no usable text: 0 rows read"):
        tokens_of(source_of([]))


def test_a_cache_that_cannot_be_written_names_the_flag(tokens_of, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"/file.*: cannot tokenize a.jsonl \(.*\); .* with --cache_dir"):
        tokens_of(source_of(["a"]))


def test_a_home_folder_is_expanded(tokens_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "~/tokens")
    tokens_of(source_of(["a"]))
    assert os.listdir(tmp_path) == ["tokens"]


def test_without_a_terminal_progress_is_one_line(tokens_of, capsys):
    tokens_of(source_of(["Ada left."]))
    captured = capsys.readouterr()
    assert captured.out.startswith("tokenized a.jsonl: ")
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_without_a_terminal_a_long_wait_has_lines_with_the_time_left(tokens_of, capsys, monkeypatch):
    monkeypatch.setattr(source_cache, "_PRINT_SECONDS", 0)
    monkeypatch.setattr(token_cache, "_BATCH_ROWS", 1)
    tokens_of(source_of(["one", "two", "three"]))
    assert re.search(r"tokenize a.jsonl: \d+ tokens, 67%, 0:00 left\n", capsys.readouterr().out)


def test_on_a_terminal_progress_is_a_bar(tokens_of, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    tokens_of(source_of(["Ada left."]))
    captured = capsys.readouterr()
    assert "tokenize a.jsonl: 100%|" in captured.err
    assert captured.out == ""


def test_counts_are_plain_data(tokens_of):
    assert json.loads(json.dumps(dataclasses.asdict(tokens_of(source_of(["a"])).counts)))["documents"] == 1
