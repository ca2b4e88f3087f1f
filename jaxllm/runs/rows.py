"""The batch source of every stage that trains on rows of files."""

from collections.abc import Callable, Iterator
from typing import Any

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
            own=program.own_rows,
        )

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[Any]:
        program = self.program
        placed = device_batches(
            self.rows,
            program.batch_sharding,
            start_step=int(state.step),
            batch_size=program.config.data.batch_size,
        )
        self.params = state.params
        return (self.data.complete(self.params, batch) for batch in placed)

    def after_step(self, state: TrainState) -> None:
        self.params = state.params


def row_source(inputs: RunInputs[Any, Any], data: Dataset) -> BatchSource:
    """`make_source` of every such stage."""
    return RowSource(inputs.program, data)
