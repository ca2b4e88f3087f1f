"""Pretraining text: from the sources of a config to windows to train and validate on, with a report."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from jaxllm.batches import TokenBatch
from jaxllm.data.rows import DataConfig, Dataset, nothing_held_out, write_bad_rows
from jaxllm.data.show import show_mask
from jaxllm.data.token_cache import TokenCache, cached_tokens
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.data.windows import Windows, pack_documents
from jaxllm.errors import DataError


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """Which text to read, and how."""

    text_key: str  # the key or column of .jsonl, .parquet and datasets that has the text
    cache_dir: str  # folder for tokenized text, shared by all runs


def text_documents(config: TextConfig, *, seed: int) -> Iterator[str]:
    """The training documents, one from each source in turn, without rows that have no usable text.

    Raises DataError, which names the first such row, where no document is left.
    """
    sources = [config.open(name, "train", text_key=config.text_key, seed=seed) for name in config.train]
    streams = [source.rows() for source in sources]
    first_bad, usable = None, False
    for row in itertools.chain.from_iterable(itertools.zip_longest(*streams)):
        if row is not None and row.value is not None:
            usable = True
            yield row.value
        elif row is not None:
            first_bad = first_bad or row
    if not usable:
        why = f"; the first row, {first_bad.where}: {first_bad.problem}" if first_bad else ""
        raise DataError(f"data.train={config.train} has no usable text{why}")


def load_text(
    config: TextConfig, tokenizer: BaseTokenizer, *, seed: int, run_folder: Path | None = None
) -> Dataset[Windows]:
    """Tokenize the sources that are not cached yet, hold out rows to validate on, and pack all into windows.

    Skipped rows are written to `bad_rows.jsonl` in `run_folder`. Raises DataError.
    """
    sources = [config.open(name, split, text_key=config.text_key, seed=seed) for name, split in config.splits]
    caches = [cached_tokens(source, tokenizer, config.cache_dir, config.bad_row_policy) for source in sources]
    if run_folder is not None:
        write_bad_rows([cache.bad_rows.read_text() for cache in caches], run_folder)
    fraction = config.held_out_fraction
    size = {"sequence_length": config.sequence_length, "pad_id": tokenizer.pad_id}
    count = len(config.train)
    train, held_out = zip(
        *(pack_documents(cache, held_out_fraction=fraction, **size) for cache in caches[:count]), strict=True
    )
    named = (pack_documents(cache, held_out_fraction=0.0, **size)[0] for cache in caches[count:])
    validation = tuple(windows for windows in (*held_out, *named) if len(windows))
    if fraction and not validation:
        raise nothing_held_out(fraction)
    fingerprint = repr(([cache.key for cache in caches], config.weights, fraction, size))
    return Dataset(
        train,
        config.weights,
        validation,
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        _report([source.name for source in sources], caches, train, validation, tokenizer),
    )


def _report(
    names: list[str],
    caches: list[TokenCache],
    train: tuple[Windows, ...],
    validation: tuple[Windows, ...],
    tokenizer: BaseTokenizer,
) -> str:
    lines = []
    for name, cache in zip(names, caches, strict=True):
        counts = cache.counts
        lines.append(
            f"{name}: {counts}; {counts.text_bytes:,} bytes, {counts.tokens:,} tokens "
            f"({counts.text_bytes / counts.tokens:.2f} bytes per token){counts.describe_unread()}"
        )
    for role, windows in (("train", train), ("validation", validation)):
        if windows:
            number = sum(map(len, windows))
            padded = sum(len(part) * part.padded_fraction for part in windows) / max(1, number)
            tokens = sum(part.num_tokens for part in windows)
            lines.append(f"{role}: {tokens:,} tokens in {number:,} windows, {padded:.2%} padding")
    example = _example(train)
    if example is not None:
        lines.append(f"example (tokens in ⟦ ⟧ are not in the loss): {show_targets(example, tokenizer)}")
    return "\n".join(lines)


def _example(sources: tuple[Windows, ...]) -> TokenBatch | None:
    """At most forty tokens of training text, around one that is not in the loss if there is one."""
    rows = [windows[i] for windows in sources for i in range(min(len(windows), 20))]
    if not rows:
        return None
    row = next((row for row in rows if not row.mask[row.segment_ids > 0].all()), rows[0])
    center = int(np.argmin(row.mask))
    start = max(0, center - 20)
    return TokenBatch(*(values[start : start + 40] for values in row))


def show_targets(row: TokenBatch, tokenizer: BaseTokenizer) -> str:
    """The targets of one row as `show_mask` prints them."""
    real = row.segment_ids > 0
    return show_mask(row.targets[real], row.mask[real], tokenizer)
