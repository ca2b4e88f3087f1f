"""Text tokenized once: a source's documents as memory-mapped ids, each one BOS, its text, EOS.

A cache is a folder whose name is a hash of the source's content and the tokenizer. It is written under
another name and then renamed, so that neither a killed run nor two runs at once leave an incomplete one.
"""

import json
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from jaxllm.data.held_out import text_key
from jaxllm.data.rows import ENOUGH_ROWS, BadRowPolicy, SourceCounts, bad_row_line
from jaxllm.data.sources import Row, Source
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import DataError

_FORMAT = 2  # raise it when the files change: caches of another format are not read
_BATCH_CHARACTERS, _BATCH_ROWS = 4_000_000, 10_000  # tokenized at a time
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # no counts: they are bytes or rows


@dataclass(frozen=True)
class TokenCache:
    """The N tokens of D documents, one after the other."""

    tokens: np.ndarray  # uint16 or uint32 [N], memory-mapped
    offsets: np.ndarray  # int64 [D + 1], the start of each document, and N
    text_hashes: np.ndarray  # uint64 [D], of each document's text
    text_keys: np.ndarray  # uint64 [D], of its normalized text: held_out.text_key
    counts: SourceCounts
    key: str  # hash of the content and the tokenizer
    bad_rows: Path  # a file of one JSON object per bad row


def cached_tokens(
    source: Source,
    tokenizer: BaseTokenizer,
    cache_dir: str,
    policy: BadRowPolicy,
    bad_rows: list[str] | None = None,
) -> TokenCache:
    """The tokens of `source`, from the cache if it has them, else tokenized now. Raises DataError.

    The lines of bad_rows.jsonl are appended to `bad_rows`, also where the policy does not allow the rows.
    """
    bad_rows = [] if bad_rows is None else bad_rows
    key = xxhash.xxh3_128_hexdigest(f"{_FORMAT} {source.content_hash} {tokenizer.hash}".encode())
    folder = Path(cache_dir).expanduser() / key
    cache = _read(folder)
    if cache is None:
        try:
            _write(folder, source, tokenizer, policy, bad_rows)
        except OSError as error:
            raise DataError(
                f"data.cache_dir={cache_dir}: cannot write tokens ({error.strerror or error})"
            ) from error
        cache = _read(folder)
    if cache is None:
        raise DataError(f"{folder}: the tokens just written cannot be read back; check the disk")
    bad_rows.append(cache.bad_rows.read_text())
    cache.counts.check(source.name, policy)  # the cache may come from a run with a more lenient policy
    if not cache.counts.documents:
        raise DataError(f"{source.name} has no usable text: {cache.counts}")
    return cache


def _read(folder: Path) -> TokenCache | None:
    """The cache in `folder`; None where there is none or a file is missing or of the wrong size."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = SourceCounts(**meta["counts"])
        return TokenCache(
            _mapped(folder / "tokens", meta["dtype"], counts.tokens),
            _mapped(folder / "offsets", "int64", counts.documents + 1),
            _mapped(folder / "text_hashes", "uint64", counts.documents),
            _mapped(folder / "text_keys", "uint64", counts.documents),
            counts,
            key=folder.name,
            bad_rows=folder / "bad_rows.jsonl",
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: Path, dtype: str, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} does not have the size it was written with")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _write(
    folder: Path, source: Source, tokenizer: BaseTokenizer, policy: BadRowPolicy, bad_rows: list[str]
) -> None:
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
        counts = _tokenize(unfinished, source, tokenizer, policy, dtype)
        meta = {"source": source.name, "dtype": dtype.name, "counts": asdict(counts)}
        (unfinished / "meta.json").write_text(json.dumps(meta))
        if _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # an older, damaged one
        try:
            unfinished.rename(folder)
        except OSError:  # another run has written it meanwhile
            if _read(folder) is None:
                raise
    except DataError:
        bad_rows.append((unfinished / "bad_rows.jsonl").read_text())
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenize(
    folder: Path, source: Source, tokenizer: BaseTokenizer, policy: BadRowPolicy, dtype: np.dtype
) -> SourceCounts:
    """Write tokens, offsets, hashes and bad rows into `folder`, a batch of documents at a time."""
    counts = SourceCounts()
    offsets, text_hashes, text_keys = array("q", [0]), array("Q"), array("Q")
    started = time.monotonic()
    with (
        (folder / "tokens").open("wb") as token_file,
        (folder / "bad_rows.jsonl").open("w") as bad_row_file,
        tqdm(total=source.size, desc=f"tokenize {source.name}", bar_format=_BAR, disable=None) as bar,
    ):
        on_terminal = not bar.disable
        for rows in _batches(source.rows()):
            for row in rows:
                if row.value is None:
                    counts.drop(row)
                    bad_row_file.write(bad_row_line(row))
                else:
                    counts.leave_unread(row.unread)
            counts.rows += len(rows)
            if policy.on_bad_row == "stop" or counts.rows >= ENOUGH_ROWS:
                counts.check(source.name, policy)
            texts = [row.value for row in rows if row.value is not None]
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                content = text.encode("utf-8", "replace")
                token_file.write(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype).tobytes())
                offsets.append(offsets[-1] + len(ids) + 2)
                text_hashes.append(xxhash.xxh3_64_intdigest(content))
                text_keys.append(text_key(text))
                counts.text_bytes += len(content)
            bar.update(rows[-1].done - bar.n)
    counts.documents, counts.tokens = len(text_hashes), offsets[-1]
    (folder / "offsets").write_bytes(offsets.tobytes())
    (folder / "text_hashes").write_bytes(text_hashes.tobytes())
    (folder / "text_keys").write_bytes(text_keys.tobytes())
    if not on_terminal:
        seconds = time.monotonic() - started
        print(f"tokenized {source.name}: {counts.tokens:,} tokens in {seconds:.0f} s", flush=True)
    return counts


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Lists of consecutive rows, of a few million characters each."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.value or "")
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
