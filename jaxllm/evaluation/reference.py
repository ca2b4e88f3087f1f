"""The log-probs of pairs under a frozen reference: computed once, kept between runs, and stopped by a signal
without losing what is done."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.batches import PairBatch
from jaxllm.caches import read_or_build
from jaxllm.data.loader import device_batches, evaluation_batches
from jaxllm.data.preferences import PairRows
from jaxllm.errors import Stopped
from jaxllm.files import cache_folder, naming
from jaxllm.parallel.global_arrays import own_rows, to_host
from jaxllm.parallel.processes import any_process, is_first
from jaxllm.training.watchdog import StopRequested, Watchdog

Score = Callable[[PairBatch], jax.Array]  # log-probs [B, 2] of a batch


def reference_log_probs(
    key: str,
    sources: Sequence[PairRows],
    make_score: Callable[[], Score],
    *,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    run_folder: Path,
) -> np.ndarray:
    """float32 [pairs, 2] of all sources, from the cache of this `key` if it has them.

    `make_score` is called where something is left to score: it loads the reference. Raises Stopped after a
    signal; the same command then continues with the batch that was not scored. Several processes score
    together, and continue nothing.
    """
    pairs = sum(map(len, sources))
    read = functools.partial(_read, pairs=pairs)

    def fill(log_probs: np.ndarray) -> None:
        left = int(np.isnan(log_probs).any(axis=1).sum())
        print(f"scoring {left:,} of {pairs:,} pairs with the reference, once ...", flush=True)
        score = make_score()
        try:
            with Watchdog(run_folder, hang_timeout=0) as watchdog:
                first = 0
                for rows in sources:
                    part = log_probs[first : first + len(rows)]
                    _fill(part, rows, score, batch_size, sharding, watchdog.check)
                    first += len(rows)
                watchdog.check()  # the signal may have come with the last batch
        except StopRequested:
            done = pairs - int(np.isnan(log_probs).any(axis=1).sum())
            saved = f"of {done:,} of {pairs:,} pairs saved" if jax.process_count() == 1 else "not saved"
            raise Stopped(
                f"by a signal, with the reference's log-probs {saved}; resume with the same command"
            ) from None

    def build(partial: Path) -> None:
        if read(partial) is None:
            with naming(partial), partial.open("wb") as file:
                np.save(file, np.full((pairs, 2), np.nan, np.float32))
        log_probs = np.lib.format.open_memmap(partial, mode="r+")
        try:
            fill(log_probs)
        finally:
            log_probs.flush()

    path, what = cache_folder() / f"reference-{key}.npy", "score pairs with the reference"
    if jax.process_count() == 1:
        return np.array(read_or_build(path, read, build, what))
    found = read(path)
    if any_process("reference log-probs", found is None):
        found = np.full((pairs, 2), np.nan, np.float32)
        fill(found)
        if is_first():
            read_or_build(path, read, functools.partial(_save, found), what)
    assert found is not None
    return np.array(found)


def _save(log_probs: np.ndarray, file: Path) -> None:
    with naming(file), file.open("wb") as opened:
        np.save(opened, log_probs)


def _read(file: Path, pairs: int) -> np.ndarray | None:
    """The array of a file; None where there is none of this size."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (pairs, 2) and found.dtype == np.float32 else None


def _fill(
    log_probs: np.ndarray,
    rows: PairRows,
    score: Score,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    check: Callable[[], None],
) -> None:
    """Score the rows from the first batch on that has NaN in `log_probs` [pairs, 2]."""
    missing = np.flatnonzero(np.isnan(log_probs).any(axis=1))
    if not missing.size:
        return
    first = int(missing[0]) // batch_size
    batches = evaluation_batches([rows], batch_size=batch_size, own=own_rows(sharding, batch_size))
    placed = device_batches(batches, sharding, start_step=first, batch_size=batch_size)
    hidden = None if is_first() else True
    bar = tqdm(placed, desc="reference log-probs", initial=first, total=len(batches), disable=hidden)
    for number, batch in enumerate(bar, first):
        check()
        place = log_probs[number * batch_size : (number + 1) * batch_size]
        place[:] = to_host(score(batch))[: len(place)]
