"""Batches from rows: which of them step N trains on is a pure function of the seed and N.

Grain shuffles, mixes, shards by process and reads ahead. It is imported when a batch is asked for, since
machines that only use the losses or the models need not have it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from jaxllm.errors import ConfigError, DataError


class Rows(Protocol):
    """Rows of a batch, any of which can be made from its number alone: windows of text, chats, pairs."""

    sequence_length: int

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...

    def blank(self) -> Any:
        """A row that counts for nothing, to fill a batch with."""


_READ_THREADS, _READ_AHEAD = 2, 4  # batches; making one takes a hundredth of a training step


def training_batches(
    sources: Sequence[Rows],
    *,
    weights: Sequence[float] = (),
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
    """An endless grain dataset whose element N is this process's rows, [B / processes, T], of step N.

    Without `weights` all rows are seen once an epoch, in an order of its own; with them each source
    fills its share of every stretch of rows and runs through its own epochs. The rows of a step do
    not depend on the number of processes.
    """
    rows = sum(map(len, sources))
    if rows < batch_size:
        raise DataError(
            f"the data makes {rows} rows of data.sequence_length={sources[0].sequence_length}, fewer than "
            f"data.batch_size={batch_size}: lower data.batch_size, or give more data"
        )
    return _sharded(shuffled_rows(sources, weights, seed), batch_size, process_index, process_count)


def shuffled_rows(sources: Sequence[Any], weights: Sequence[float], seed: int) -> Any:
    """An endless grain dataset of rows, one by one, drawn as `training_batches` says."""
    grain = _import_grain()
    datasets = [grain.MapDataset.source(source) for source in sources]
    if weights:
        shuffled = [dataset.seed(seed + i).shuffle().repeat() for i, dataset in enumerate(datasets)]
        return grain.MapDataset.mix(shuffled, weights)
    return grain.MapDataset.concatenate(datasets).seed(seed).shuffle().repeat()


def evaluation_batches(
    sources: Sequence[Rows], *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Any:
    """A grain dataset of every row once, in order; the last batch is filled up with masked rows."""
    grain = _import_grain()
    known = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])
    count, blank = len(known), sources[0].blank()
    padded = -(-count // batch_size) * batch_size
    rows = grain.MapDataset.range(padded).map(lambda i: known[i] if i < count else blank)
    return _sharded(rows, batch_size, process_index, process_count)


def device_batches(dataset: Any, sharding: Any, *, start_step: int = 0) -> Iterator[Any]:
    """The batches from `start_step` on as global arrays laid out by `sharding`.

    Threads read a few batches ahead, and one batch is on the device before it is asked for.
    """
    import jax

    grain = _import_grain()

    def placed(batch: Any) -> Any:
        return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)

    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
    batches = map(placed, dataset[start_step:].to_iter_dataset(options))
    ahead = next(batches, None)
    for batch in batches:
        yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead


def _sharded(rows: Any, batch_size: int, process_index: int, process_count: int) -> Any:
    if batch_size % process_count:
        below = batch_size // process_count * process_count
        nearest = " or ".join(str(size) for size in (below, below + process_count) if size)
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide over {process_count} processes; use {nearest}"
        )
    return rows[process_index::process_count].batch(batch_size // process_count)


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ConfigError("reading training data needs grain: pip install grain") from error
    return grain
