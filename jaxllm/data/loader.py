"""Batches from rows: which rows step N trains on is a pure function of the seed and N.

Grain shuffles, mixes, shards by process and reads ahead. It is imported when a batch is first needed, since
machines that only use the losses or the models need not have it.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from jaxllm.data.rows import BatchRows, Rows
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import grain
    import jax

T = TypeVar("T")
S = TypeVar("S")

_ENDLESS = 2**53  # rows; grain computes lengths in float64, in which batches of one of 2**63 rows overflow
_READ_THREADS, _READ_AHEAD = 2, 4  # batches; building one takes a hundredth of a training step


def training_batches(
    sources: Sequence[BatchRows[T]],
    *,
    weights: Sequence[float] = (),
    batch_size: int,
    seed: int,
    own: Sequence[int] | np.ndarray | None = None,
) -> "grain.MapDataset[T]":
    """An endless grain dataset whose element N is the rows of step N, [B, T]; or of these the `own` ones of a
    process, which reads no other.

    Without `weights` every row is seen once per epoch, reshuffled each epoch. With them each source has its
    share of any run of consecutive rows and goes through its own epochs. The rows of a step and their order
    do not depend on the number of processes.
    """
    rows = sum(map(len, sources))
    if rows < batch_size:
        raise DataError(
            f"the data has {rows} rows of data.sequence_length={sources[0].sequence_length}, fewer than "
            f"data.batch_size={batch_size}; lower data.batch_size or add data"
        )
    endless = shuffled_rows(sources, weights, seed)[:_ENDLESS]
    return _batched(endless, batch_size, own)


def shuffled_rows(sources: Sequence[Rows[T]], weights: Sequence[float], seed: int) -> "grain.MapDataset[T]":
    """An endless grain dataset of single rows, in the order of `training_batches`."""
    grain = _import_grain()
    datasets = [grain.MapDataset.source(source) for source in sources]
    if weights:
        shuffled = [dataset.seed(seed + i).shuffle().repeat() for i, dataset in enumerate(datasets)]
        return grain.MapDataset.mix(shuffled, weights)
    return grain.MapDataset.concatenate(datasets).seed(seed).shuffle().repeat()


def shares(lengths: Sequence[int], limit: int | None) -> list[int]:
    """How many of the first rows of each source to take, where at most about `limit` rows are wanted: in
    proportion to their lengths, but at least one of each.

    >>> shares([600, 600], 496)
    [248, 248]
    """
    total = sum(lengths)
    if limit is None or limit >= total:
        return list(lengths)
    return [min(length, max(1, limit * length // total)) for length in lengths]


def evaluation_batches(
    sources: Sequence[BatchRows[T]],
    *,
    batch_size: int,
    max_rows: int | None = None,
    own: Sequence[int] | np.ndarray | None = None,
) -> "grain.MapDataset[T]":
    """A grain dataset of every row once, in order; blank rows fill up the last batch. With `max_rows` it has
    the first rows of every source, in proportion. `own`: as in `training_batches`."""
    grain = _import_grain()
    counts = shares([len(source) for source in sources], max_rows)
    known = grain.MapDataset.concatenate(
        [grain.MapDataset.source(source)[:count] for source, count in zip(sources, counts, strict=True)]
    )
    count, blank = len(known), sources[0].blank()
    padded = -(-count // batch_size) * batch_size
    rows = grain.MapDataset.range(padded).map(lambda i: known[i] if i < count else blank)
    return _batched(rows, batch_size, own)


def device_batches(
    dataset: "grain.MapDataset[T]",
    sharding: "jax.sharding.Sharding",
    *,
    start_step: int = 0,
    batch_size: int | None = None,
) -> Iterator[T]:
    """The batches from `start_step` on as global arrays with this sharding. Given `batch_size`, `dataset` has
    of each batch the process's own rows, by `own_rows`.
    """
    from jaxllm.parallel.global_arrays import own_rows, place_rows

    rows = None if batch_size is None else own_rows(sharding, batch_size)

    def placed(batch: T) -> T:
        return place_rows(batch, sharding, rows, batch_size)

    return read_ahead(dataset, placed, start_step)


def read_ahead(dataset: "grain.MapDataset[T]", place: "Callable[[T], S]", start_step: int) -> "Iterator[S]":
    """What `place` makes of each batch from `start_step` on. Threads read a few batches ahead, and one is
    placed on the devices before it is requested."""
    grain = _import_grain()
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
    batches = map(place, dataset[start_step:].to_iter_dataset(options))
    for ahead in batches:  # at most once: the inner loop uses up the rest
        for batch in batches:
            yield ahead
            ahead = batch
        yield ahead


def _batched(rows: Any, batch_size: int, own: Sequence[int] | np.ndarray | None) -> Any:
    if own is None or len(own) == batch_size:
        return rows.batch(batch_size)

    def batch(step: int) -> Any:
        parts = [rows[step * batch_size + row] for row in own]
        return type(parts[0])(*map(np.stack, zip(*parts, strict=True)))  # a NamedTuple of jaxllm.batches

    return _import_grain().MapDataset.range(len(rows) // batch_size).map(batch)


def _import_grain() -> ModuleType:
    try:
        import grain
    except ImportError as error:
        raise ConfigError("reading training data needs grain: pip install grain") from error
    return grain
