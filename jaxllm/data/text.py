"""Pretraining text: from what a config names to windows to train and to validate on, with a report."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from jaxllm.batches import TokenBatch
from jaxllm.data.rows import DataConfig, Dataset, write_bad_rows
from jaxllm.data.show import show_mask
from jaxllm.data.token_cache import TokenCache, cached_tokens
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.data.windows import Windows, pack_documents
from jaxllm.errors import DataError


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """Which text to read and how to cut it."""

    text_key: str  # the field or column of .jsonl, .parquet and datasets that holds the text
    cache_dir: str  # where tokenised text is kept between runs


def text_documents(config: TextConfig, *, seed: int) -> Iterator[str]:
    """The documents to learn from, one from each source in turn; rows without usable text are left out.

    Raises DataError, naming the first of them, where that leaves nothing.
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
        raise DataError(f"data.train={config.train} holds no usable text{why}")


def load_text(
    config: TextConfig, tokenizer: BaseTokenizer, *, seed: int, run_folder: Path | None = None
) -> Dataset:
    """Tokenise what no cache holds yet, hold out what to validate on, and pack both into windows.

    Rows that were skipped are written to `bad_rows.jsonl` in `run_folder`.
    """
    sources = [config.open(name, role, text_key=config.text_key, seed=seed) for name, role in config.roles]
    caches = [cached_tokens(source, tokenizer, config.cache_dir, config.bad_row_policy) for source in sources]
    if run_folder is not None:
        write_bad_rows([cache.bad_rows.read_text() for cache in caches], run_folder)
    fraction = config.held_out_fraction
    size = {"sequence_length": config.sequence_length, "pad_id": tokenizer.pad_id}
    count = len(config.train)
    train, held_out = zip(
        *(pack_documents(cache, held_out_fraction=fraction, **size) for cache in caches[:count]), strict=True
    )
    given = (pack_documents(cache, held_out_fraction=0.0, **size)[0] for cache in caches[count:])
    validation = tuple(windows for windows in (*held_out, *given) if len(windows))
    if fraction and not validation:
        raise DataError(
            f"data.validation_fraction={fraction} of the text is too little to validate on: raise it, name a "
            f"validation source, or set it to 0"
        )
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
            f"({counts.text_bytes / counts.tokens:.2f} bytes a token)"
        )
    for role, windows in (("train", train), ("validation", validation)):
        if windows:
            number = sum(map(len, windows))
            padded = sum(len(part) * part.padded_fraction for part in windows) / max(1, number)
            tokens = sum(part.num_tokens for part in windows)
            lines.append(f"{role}: {tokens:,} tokens in {number:,} windows, {padded:.2%} padding")
    example = _example(train)
    if example is not None:
        lines.append(f"example (what is in ⟦ ⟧ is read but not learnt): {show_targets(example, tokenizer)}")
    return "\n".join(lines)


def _example(sources: tuple[Windows, ...]) -> TokenBatch | None:
    """Some forty tokens of training text, around a masked one if one is near."""
    rows = [windows[i] for windows in sources for i in range(min(len(windows), 20))]
    if not rows:
        return None
    row = next((row for row in rows if not row.mask[row.segment_ids > 0].all()), rows[0])
    centre = int(np.argmin(row.mask))
    start = max(0, centre - 20)
    return TokenBatch(*(values[start : start + 40] for values in row))


def show_targets(row: TokenBatch, tokenizer: BaseTokenizer) -> str:
    """The targets of one row as `show_mask` writes them."""
    real = row.segment_ids > 0
    return show_mask(row.targets[real], row.mask[real], tokenizer)
