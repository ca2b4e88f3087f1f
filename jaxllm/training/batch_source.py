"""Where the batches of a run come from, and what their source adds to its metrics and checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxllm.losses import Weighted
from jaxllm.training.metrics import Metrics
from jaxllm.training.state import TrainState
from jaxllm.training.step import Batch


class BatchSource:
    """Batches, step by step. Rows of files do not depend on the run; rollouts need its parameters.

    Only `batches` must be written; the other methods do nothing unless a source needs them.
    """

    fingerprints: Mapping[str, str] = {}  # hashes of what must not change within a run, beside its data

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[Batch]:
        """An endless stream of batches, starting with that of step state.step + 1.

        `check` is called while a batch takes long to make; it may raise to leave early.
        """
        raise NotImplementedError

    def after_step(self, state: TrainState) -> None:
        """Receives the state after every step."""

    def merge(self, step: int, metrics: dict[str, Weighted]) -> dict[str, Weighted]:
        """The sums of a step, of some of which the source makes sums over several steps.

        Called once for every step, in order, before `finish_row`.
        """
        return metrics

    def finish_row(self, step: int, row: Metrics) -> Metrics:
        """The metrics of a step, with those that the host knows about its batch.

        Called once for every step, in order. May raise where the metrics show that something is wrong.
        """
        return row

    def can_stop_after(self, step: int) -> bool:
        """Whether the stream can be resumed from a checkpoint of this step."""
        return True

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint must hold, besides the state, to resume the stream."""
        return {}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Set what `metadata` returned when the checkpoint was saved."""

    def close(self) -> None:
        """End processes and close files."""
