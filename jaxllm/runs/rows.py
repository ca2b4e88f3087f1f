"""The batch source of every stage that trains on rows of files."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.data.loader import device_batches, read_ahead, training_batches
from jaxllm.data.rows import Dataset
from jaxllm.runs.context import RunInputs
from jaxllm.runs.program import Program
from jaxllm.runs.step_by_length import has_padding, split_batch
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.state import TrainState


class RowSource(BatchSource):
    """Rows of files, in an order that the seed determines."""

    def __init__(self, program: Program[Any, Any], data: Dataset):
        self.program, self.data = program, data
        self.rows = training_batches(
            data.train,
            weights=data.weights,
            batch_size=program.config.data.batch_size,
            seed=program.config.seed,
            # Which rows a device gets may depend on the lengths of all.
            own=None if has_padding(program) else program.own_rows,
        )

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[Any]:
        program, start = self.program, int(state.step)
        self.params = state.params
        if has_padding(program):
            split = read_ahead(self.rows, functools.partial(split_batch, program), start)
            return ([self.data.complete(self.params, batch) for batch in batches] for batches in split)
        placed = device_batches(
            self.rows,
            program.batch_sharding,
            start_step=start,
            batch_size=program.config.data.batch_size,
        )
        return (self.data.complete(self.params, batch) for batch in placed)

    def after_step(self, state: TrainState) -> None:
        self.params = state.params


def row_source(inputs: RunInputs[Any, Any], data: Dataset) -> BatchSource:
    """`make_source` of every such stage."""
    return RowSource(inputs.program, data)
