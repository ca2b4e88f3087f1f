"""Where a run's batches come from, and what whoever makes them has to say."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxllm.training.state import TrainState


class BatchSource:
    """Batches, step by step. Rows of files know nothing of the run; rollouts need its parameters."""

    fingerprints: Mapping[str, str] = {}  # of what must not change within a run, besides data and tokenizer

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[Any]:
        """An endless stream, from the batch of step state.step + 1 on. `check` may raise, to end the making
        of one that takes long."""
        raise NotImplementedError

    def observe(self, state: TrainState) -> None:
        """Told the state after every step."""

    def complete(self, step: int, row: dict[str, float]) -> dict[str, float]:
        """The row of a step, with what is known on the host about its batch. Called once for every step, in
        order; may raise where the row shows that something is wrong."""
        return row

    def may_stop(self, step: int) -> bool:
        """Whether the stream can go on from a checkpoint of this step."""
        return True

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint must hold, besides the state, for that."""
        return {}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take back what `metadata` gave."""

    def close(self) -> None:
        """Let go of processes and files."""
