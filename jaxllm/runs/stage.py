"""What differs between the stages of training: the names that a module of `jaxllm/stages` must have.

A stage is a module. Nothing registers it: a config names it (`config.stage = "grpo"`), and `find_stage` of
`jaxllm.stages` imports it. Everything else that a run is made of is the same for all stages.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxllm.data.rows import Dataset
from jaxllm.models import Params
from jaxllm.runs.context import RunContext, RunInputs
from jaxllm.runs.panels import Panel
from jaxllm.runs.program import Program, Trainable
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Hook


class Headline(NamedTuple):
    """The metric that says, in one number, how a run of the stage came out."""

    metric: str
    highest: bool  # whether higher is better


class Stage(Trainable, Protocol):
    """A stage of training. `Config`, `build` and `batch_shapes` are those of `Trainable`."""

    @property
    def headline(self) -> Headline: ...

    @property
    def generates(self) -> bool:
        """Whether its checkpoints generate text; a reward model's do not."""
        ...

    @property
    def conversational(self) -> bool:
        """Whether it reads conversations, by a chat template, rather than plain text."""
        ...

    @property
    def policy_prefix(self) -> str:
        """Where in the parameters the model stands that generates or scores; "" where they are one model."""
        ...

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The curves that a report shows of its runs."""
        ...

    def tokenizer_text(self, config: Any) -> Iterable[str]:
        """Texts to train a tokenizer on, for a run that neither has one nor is initialized from another."""
        ...

    def initial_params(self, program: Program[Any, Any], parent: Path) -> Params:
        """The parameters of a run that is initialized from the step folder `parent`, sharded as the run's."""
        ...

    def load(self, inputs: RunInputs[Any, Any]) -> Dataset:
        """Rows to train and to validate on. ConfigError or DataError for what cannot be used."""
        ...

    def make_source(self, inputs: RunInputs[Any, Any], data: Dataset) -> BatchSource:
        """Where the batches come from. The run closes it."""
        ...

    def make_hooks(self, context: RunContext[Any, Any]) -> Sequence[Hook]:
        """Evaluation and samples, in the order in which they run."""
        ...
