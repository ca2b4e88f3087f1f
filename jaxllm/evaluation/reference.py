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
    signal; the same command then continues with the batch that was not scored.
    """
    pairs = sum(map(len, sources))
    read = functools.partial(_read, pairs=pairs)

    def build(partial: Path) -> None:
        if read(partial) is None:
            with naming(partial), partial.open("wb") as file:
                np.save(file, np.full((pairs, 2), np.nan, np.float32))
        log_probs = np.lib.format.open_memmap(partial, mode="r+")
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
            raise Stopped(
                f"by a signal, with the reference's log-probs of {done:,} of {pairs:,} pairs saved; "
                "resume with the same command"
            ) from None
        finally:
            log_probs.flush()

    path = cache_folder() / f"reference-{key}.npy"
    return np.array(read_or_build(path, read, build, "score pairs with the reference"))


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
    batches = evaluation_batches([rows], batch_size=batch_size)
    placed = device_batches(batches, sharding, start_step=first)
    bar = tqdm(placed, desc="reference log-probs", initial=first, total=len(batches), disable=None)
    for number, batch in enumerate(bar, first):
        check()
        place = log_probs[number * batch_size : (number + 1) * batch_size]
        place[:] = np.asarray(score(batch))[: len(place)]
