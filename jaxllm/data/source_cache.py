"""The rows of a source as token ids in files: encoded once, by all cores, and continued after a kill.

A source's cache is the same to the byte whichever number of processes wrote it, and however often it was
interrupted.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxllm.caches import remove
from jaxllm.data.column_files import ColumnFiles, forget_progress
from jaxllm.data.rows import ENOUGH_ROWS, BadRowPolicy, SourceCounts
from jaxllm.data.sources import Row, Source
from jaxllm.data.worker_pool import map_in_order, num_processes

BAD_ROWS = "bad_rows.jsonl"
_RECORD_SECONDS = 5.0  # between two records of what is done: a kill loses at most so much
_PRINT_SECONDS = 30.0  # between two lines of progress where there is no terminal
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # no counts: they are bytes or rows


class Part(NamedTuple):
    """Consecutive rows of a source, encoded as N tokens in L sequences."""

    counts: SourceCounts
    bad_rows: str  # lines of bad_rows.jsonl
    tokens: np.ndarray  # [N], in the dtype of the cache
    lengths: np.ndarray  # int64 [L]
    columns: dict[str, np.ndarray | bytes]  # whatever else is stored of them
    done: int  # `Row.done` of the last


def write_source(
    folder: Path,
    source: Source,
    encode: Callable[[list[Row]], Part],
    columns: Sequence[str],
    policy: BadRowPolicy,
    batches: Callable[[Iterable[Row]], Iterator[list[Row]]],
) -> SourceCounts:
    """Encode the batches of a source into `folder`: tokens, offsets [L + 1] of the sequences, BAD_ROWS, and a
    file per column. Continues what a killed process recorded there.

    Raises DataError where the policy does not allow the bad rows; BAD_ROWS is then complete up to there.
    """
    with ColumnFiles(folder, ("tokens", "offsets", BAD_ROWS, *columns)) as files:
        counts = SourceCounts(**(files.state or {}))
        if files.state is None:
            files.append({"offsets": np.zeros(1, np.int64)})
        else:
            print(f"tokenize {source.name}: continued after {counts.rows:,} rows", flush=True)
        rows = source.rows()
        for _ in zip(range(counts.rows), rows):  # noqa: B905  # which are read again, but not encoded
            pass
        recorded = time.monotonic()
        with (
            closing(map_in_order(encode, batches(rows), num_processes())) as parts,
            closing(Progress(source)) as progress,
        ):
            for part in parts:
                offsets = counts.tokens + np.cumsum(part.lengths, dtype=np.int64)
                bad_rows = part.bad_rows.encode()
                files.append({"tokens": part.tokens, "offsets": offsets, BAD_ROWS: bad_rows, **part.columns})
                counts.add(part.counts)
                if policy.on_bad_row == "stop" or counts.rows >= ENOUGH_ROWS:
                    counts.check(source.name, policy)
                progress.show(part.done, counts)
                if time.monotonic() - recorded >= _RECORD_SECONDS:
                    files.record(asdict(counts))
                    recorded = time.monotonic()
            progress.end(counts)
        files.record(asdict(counts))
    return counts


def complete(folder: Path, meta: Mapping[str, Any]) -> None:
    """Make what `write_source` has written a cache, which `meta` describes."""
    (folder / "meta.json").write_text(json.dumps(meta))
    forget_progress(folder)


def drop_unusable(folder: Path, bad_rows: list[str]) -> None:
    """Delete what `write_source` left when it raised DataError, after its bad rows are appended."""
    if (folder / BAD_ROWS).exists():
        bad_rows.append((folder / BAD_ROWS).read_text())
    remove(folder)


def in_batches(rows: Iterable[Row], size: Callable[[Row], int], limit: int, most: int) -> Iterator[list[Row]]:
    """Lists of at most `most` consecutive rows, each of which reaches the limit with its last row."""
    batch: list[Row] = []
    total = 0
    for row in rows:
        batch.append(row)
        total += size(row)
        if total >= limit or len(batch) >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class Progress:
    """A bar with the time that is left on a terminal, a line every half minute elsewhere."""

    def __init__(self, source: Source):
        self.source = source
        self.started = self.printed = time.monotonic()
        self.first: int | None = None  # what was done when this process began
        total = source.size or None
        form = _BAR if total else None
        self.bar = tqdm(total=total, desc=f"tokenize {source.name}", bar_format=form, disable=None)
        self.on_terminal = not self.bar.disable

    def show(self, done: int, counts: SourceCounts) -> None:
        """After so much of `source.size`."""
        self.bar.update(done - self.bar.n)
        if self.first is None:
            self.first = done
        now = time.monotonic()
        if self.on_terminal or now - self.printed < _PRINT_SECONDS:
            return
        self.printed = now
        text = f"tokenize {self.source.name}: {counts.tokens:,} tokens"
        if self.source.size and done > self.first:
            left = int((now - self.started) * (self.source.size - done) / (done - self.first))
            text += f", {done / self.source.size:.0%}, {left // 60}:{left % 60:02d} left"
        print(text, flush=True)

    def end(self, counts: SourceCounts) -> None:
        """After the last row."""
        if not self.on_terminal:
            seconds = time.monotonic() - self.started
            print(f"tokenized {self.source.name}: {counts.tokens:,} tokens in {seconds:.0f} s", flush=True)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of a cache's token ids."""
    return np.dtype("uint16" if vocab_size <= 2**16 else "uint32")


def mapped(path: Path, dtype: str, size: int | None = None) -> np.ndarray:
    """The array of a file, memory-mapped. ValueError where it does not have `size` elements, or no whole
    number of them."""
    have, item = path.stat().st_size, np.dtype(dtype).itemsize
    if have != (have // item if size is None else size) * item:
        raise ValueError(f"{path} does not have the size it was written with")
    return np.memmap(path, dtype, mode="r") if have else np.empty(0, dtype)


def mapped_tokens(
    folder: Path, dtype: str, vocab_size: int, tokens: int, sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and offsets of a cache. ValueError where an id or an offset is out of range: JAX would clamp
    it, and train on other text."""
    ids = mapped(folder / "tokens", dtype, tokens)
    offsets = mapped(folder / "offsets", "int64", sequences + 1)
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise ValueError(f"{folder} has offsets out of range")
    with (folder / "tokens").open("rb") as file:  # read, not mapped, so that it occupies no memory
        while block := file.read(2**24):
            if (largest := int(np.frombuffer(block, dtype).max())) >= vocab_size:
                print(
                    f"{folder} has the id {largest}, but the tokenizer {vocab_size} tokens",
                    file=sys.stderr,
                )
                raise ValueError(f"{folder} has ids out of range")
    return ids, offsets
