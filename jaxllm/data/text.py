"""Pretraining text: from the sources of a config to windows to train and validate on, with a report."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from jaxllm.batches import TokenBatch
from jaxllm.data.held_out import read_keys
from jaxllm.data.rows import DataConfig, Dataset, nothing_held_out, nothing_to_train_on, write_bad_rows
from jaxllm.data.show import show_mask
from jaxllm.data.token_cache import TokenCache, cached_tokens
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.data.windows import Windows, cut_documents, fraction_of_tokens, keep_apart, pack_documents
from jaxllm.errors import ConfigError, DataError


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """Which text to read, and how."""

    text_key: str  # the key or column of .jsonl, .parquet and datasets that has the text
    # Tokens to hold out of the train sources, in place of `validation_fraction`; None: the fraction.
    validation_tokens: int | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.validation_tokens is not None and self.validation_tokens < 2:
            raise ConfigError(
                f"data.validation_tokens={self.validation_tokens} must be at least 2, or none to hold out "
                "data.validation_fraction"
            )
        if self.validation_tokens is not None and self.validation:
            raise ConfigError(
                "data.validation_tokens holds out a part of data.train, but data.validation names sources: "
                "set one of them"
            )


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
        why = f"; the first row, {first_bad}; data.text_key names the column" if first_bad else ""
        raise DataError(f"data.train={config.train} has no usable text{why}")


def load_text(
    config: TextConfig, tokenizer: BaseTokenizer, *, seed: int, run_folder: Path | None = None
) -> Dataset[Windows]:
    """Tokenize the sources that are not cached yet, hold out rows to validate on, and pack all into windows.

    Skipped rows are written to `bad_rows.jsonl` in `run_folder`. Raises DataError.
    """
    sources = [config.open(name, split, text_key=config.text_key, seed=seed) for name, split in config.splits]
    bad_rows: list[str] = []
    try:
        caches = [cached_tokens(source, tokenizer, config.bad_row_policy, bad_rows) for source in sources]
    finally:  # also where they stop the run
        if run_folder is not None:
            write_bad_rows(bad_rows, run_folder)
    fraction, count = config.held_out_fraction, len(config.train)
    if config.validation_tokens is not None:
        fraction = fraction_of_tokens(caches, config.validation_tokens)
    cuts = [cut_documents(cache, fraction if i < count else 1.0) for i, cache in enumerate(caches)]
    named = read_keys(config.held_out or (), synthetic_rows=config.synthetic_rows, seed=seed)
    kept = keep_apart(caches, cuts, named)
    lost = [np.flatnonzero(cut.trained > now.trained).tolist() for cut, now in zip(cuts, kept, strict=True)]
    for source, documents, cut in zip(sources[:count], lost[:count], kept[:count], strict=True):
        if documents and not cut.trained.any():
            raise nothing_to_train_on(source.name, len(documents))
    size = {"sequence_length": config.sequence_length, "pad_id": tokenizer.pad_id}
    windows = [pack_documents(cache, cut, **size) for cache, cut in zip(caches, kept, strict=True)]
    train = tuple(trained for trained, _ in windows[:count])
    validation = tuple(held_out for _, held_out in windows if len(held_out))
    if fraction and not validation:
        raise nothing_held_out(fraction)
    identity = ([cache.key for cache in caches], config.weights, fraction, size, *filter(any, [lost]))
    names = [source.name for source in sources]
    notes = [
        f"{name}: {number:,} {what}"
        for name, documents, cut, now in zip(names, lost, cuts, kept, strict=True)
        for number, what in (
            (len(documents), "documents are not trained on, their text is held out"),
            ((cut.held_out > now.held_out).sum(), "held-out documents are repeated and evaluated once"),
        )
        if number
    ]
    return Dataset(
        train,
        config.weights,
        validation,
        xxhash.xxh3_128_hexdigest(repr(identity).encode()),
        _report(names, caches, notes, train, validation, tokenizer),
    )


def _report(
    names: list[str],
    caches: list[TokenCache],
    notes: list[str],
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
    lines += notes
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
