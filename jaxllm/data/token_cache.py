"""Text tokenized once: a source's documents as memory-mapped ids, each one BOS, its text, EOS.

A cache is a folder in `files.cache_folder()` whose name is a hash of the source's content and the tokenizer.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from jaxllm.caches import read_or_build
from jaxllm.data.held_out import text_key
from jaxllm.data.rows import BadRowPolicy, SourceCounts, bad_row_line
from jaxllm.data.source_cache import (
    BAD_ROWS,
    Part,
    complete,
    drop_unusable,
    id_dtype,
    in_batches,
    mapped,
    mapped_tokens,
    write_source,
)
from jaxllm.data.sources import Row, Source
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import DataError
from jaxllm.files import cache_folder

_FORMAT = 2  # raise it when the files change: caches of another format are not read
_BATCH_CHARACTERS, _BATCH_ROWS = 4_000_000, 10_000  # tokenized at a time


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
    source: Source, tokenizer: BaseTokenizer, policy: BadRowPolicy, bad_rows: list[str] | None = None
) -> TokenCache:
    """The tokens of `source`, from the cache if it has them, else tokenized now. Raises DataError.

    The lines of bad_rows.jsonl are appended to `bad_rows`, also where the policy does not allow the rows.
    """
    bad_rows = [] if bad_rows is None else bad_rows
    key = xxhash.xxh3_128_hexdigest(f"{_FORMAT} {source.content_hash} {tokenizer.hash}".encode())

    def build(folder: Path) -> None:
        dtype = id_dtype(tokenizer.vocab_size)
        encode = functools.partial(tokenize, tokenizer=tokenizer, dtype=dtype, policy=policy)
        try:
            counts = write_source(folder, source, encode, ("text_hashes", "text_keys"), policy, _batches)
        except DataError:
            drop_unusable(folder, bad_rows)
            raise
        meta = {"source": source.name, "dtype": dtype.name, "counts": asdict(counts)}
        complete(folder, meta)

    read = functools.partial(_read, vocab_size=tokenizer.vocab_size)
    cache = read_or_build(cache_folder() / key, read, build, f"tokenize {source.name}")
    bad_rows.append(cache.bad_rows.read_text())
    cache.counts.check(source.name, policy)  # the cache may come from a run with a more lenient policy
    if not cache.counts.documents:
        raise DataError(f"{source.name} has no usable text: {cache.counts}")
    return cache


def _read(folder: Path, vocab_size: int) -> TokenCache | None:
    """The cache in `folder`; None where there is none, or a file is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = SourceCounts(**meta["counts"])
        size = counts.documents
        tokens, offsets = mapped_tokens(folder, meta["dtype"], vocab_size, counts.tokens, size)
        hashes, keys = (mapped(folder / name, "uint64", size) for name in ("text_hashes", "text_keys"))
        return TokenCache(tokens, offsets, hashes, keys, counts, folder.name, folder / BAD_ROWS)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokenize(rows: list[Row], *, tokenizer: BaseTokenizer, dtype: np.dtype, policy: BadRowPolicy) -> Part:
    """The documents of a batch of rows, up to the first bad one if that stops the run."""
    counts, bad, texts = SourceCounts(), [], []
    for row in rows:
        counts.rows += 1
        if row.value is None:
            counts.drop(row)
            bad.append(bad_row_line(row))
            if counts.faults and policy.on_bad_row == "stop":
                break
        else:
            counts.leave_unread(row.unread)
            texts.append(row.value)
    encoded = tokenizer.encode_batch(texts)
    documents = [np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype) for ids in encoded]
    contents = [text.encode("utf-8", "replace") for text in texts]
    lengths = np.array([len(ids) for ids in documents], np.int64)
    counts.documents, counts.text_bytes = len(texts), sum(map(len, contents))
    counts.tokens = int(lengths.sum())
    hashes = np.array([xxhash.xxh3_64_intdigest(content) for content in contents], np.uint64)
    keys = np.array([text_key(text) for text in texts], np.uint64)
    tokens = np.concatenate([np.empty(0, dtype), *documents])
    return Part(
        counts, "".join(bad), tokens, lengths, {"text_hashes": hashes, "text_keys": keys}, rows[-1].done
    )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Lists of consecutive rows, of a few million characters each."""
    return in_batches(rows, lambda row: len(row.value or ""), _BATCH_CHARACTERS, _BATCH_ROWS)
