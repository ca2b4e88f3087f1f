"""What a run hands to its stage: first to load its data, then to evaluate and to sample."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.models import Params
from jaxllm.parallel.processes import is_first
from jaxllm.runs.checkpoints import Base
from jaxllm.runs.program import ConfigT, ModelT, Program
from jaxllm.runs.sampling_weights import in_compute_dtype
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import split_params


class InitialWeights(NamedTuple):
    """The weights at step 0 of a run."""

    parent: Path | None  # the step folder they are from; None: they are random
    hash: str
    params: Callable[..., Params]  # the weights, sharded as the run's; keep=True: the next call has the same
    base: Base | None = None  # with adapters: the checkpoint of the frozen weights


@dataclass(frozen=True)
class RunInputs(Generic[ConfigT, ModelT]):
    """What is known of a run before its data is read."""

    program: Program[ConfigT, ModelT]
    tokenizer: BaseTokenizer
    template: ChatTemplate  # of conversations; plain text in pretraining
    folder: RunFolder
    initial: InitialWeights

    def reference(self) -> Params:
        """The initial weights of what trains, in the compute dtype, and None for the rest: all that a frozen
        copy of the initial policy keeps, which has the rest of the policy (`merge_params`)."""
        fresh = not self.folder.resuming  # then the state begins as the same weights, which it takes over
        params = split_params(self.initial.params(keep=fresh), self.program.trainable)[0]
        frozen = in_compute_dtype(params, self.program.config.model)
        return jax.tree.map(lambda x, y: jnp.copy(x) if fresh and x is y else x, frozen, params)

    @property
    def bad_rows_folder(self) -> Path | None:
        """Where bad_rows.jsonl is written: by the first process, for all."""
        return self.folder.path if is_first() else None


@dataclass(frozen=True)
class RunContext(RunInputs[ConfigT, ModelT]):
    """A run that is ready to train."""

    data: Dataset
    source: BatchSource
    # To be called during long work; raise StopRequested after a signal. Of several processes, all call the
    # first equally often, in work that they do together; the second is for work that each does on its own.
    check: Callable[[], None]
    own_check: Callable[[], None]
