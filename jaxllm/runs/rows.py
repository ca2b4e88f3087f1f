"""The batch source of every stage that trains on rows of files."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxllm.data.loader import device_batches, training_batches
from jaxllm.data.rows import Dataset
from jaxllm.runs.context import RunInputs
from jaxllm.runs.program import Program
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
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[Any]:
        placed = device_batches(self.rows, self.program.batch_sharding, start_step=int(state.step))
        self.params = state.params
        return (self.data.complete(self.params, batch) for batch in placed)

    def after_step(self, state: TrainState) -> None:
        self.params = state.params


def row_source(inputs: RunInputs[Any, Any], data: Dataset) -> BatchSource:
    """`make_source` of every such stage."""
    return RowSource(inputs.program, data)
