"""The config of a training run, whatever its stage. Each module of jaxllm/stages adds sections of its own."""

from dataclasses import dataclass

from jaxllm.config import Text
from jaxllm.data.rows import DataConfig
from jaxllm.data.tokenizer import TokenizerConfig
from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import TRAINED
from jaxllm.parallel.sharding import MeshConfig
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.training.loop import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig, ParameterGroup
from jaxllm.training.parametrization import Factors, size_factors


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept."""

    keep: int  # this many of the newest
    best_metric: str | None  # such as "eval/loss": its best step is kept too, as WORKDIR/best
    best_is: str  # "lowest" or "highest"

    def __post_init__(self):
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep} must be at least 1")
        if self.best_is not in ("lowest", "highest"):
            raise ConfigError(f"checkpoint.best_is={self.best_is!r} must be 'lowest' or 'highest'")


@dataclass(frozen=True)
class EvaluationConfig:
    """How much held-out data is scored."""

    max_rows: int | None  # from the first of each source, in proportion to their rows; None: all
    num_sources: int | None  # of the first sources alone, where others are mixed in; None: of all
    suites: tuple[str, ...]  # files of questions: docs/how-to/evaluate.md
    suites_every: int | None  # steps between two measurements of the suites; None: training.evaluate_every
    max_new_tokens: int  # of a completion of a suite's prompt

    def __post_init__(self):
        for name in ("max_rows", "num_sources"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"evaluation.{name}={value} must be at least 1, or none for all")
        if (self.suites_every or 0) < 0:
            raise ConfigError(f"evaluation.suites_every={self.suites_every} must not be negative")
        if self.max_new_tokens < 1:
            raise ConfigError(f"evaluation.max_new_tokens={self.max_new_tokens} must be at least 1")


@dataclass(frozen=True)
class SampleConfig:
    """Texts generated while training."""

    prompts: tuple[Text, ...]  # plain text in pretraining ("" starts a document), user turns in later stages
    sampling: SamplingConfig


@dataclass(frozen=True)
class TrainConfig:
    """One run. See configs/pretrain_text.py for every field with its meaning."""

    stage: str
    seed: int
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    training: LoopConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    wandb_project: str | None
    trackio_project: str | None

    def __post_init__(self):
        for name, unset in (("patience", 0), ("target", None)):
            value = getattr(self.training, name)
            if value != unset and self.checkpoint.best_metric is None:
                raise ConfigError(
                    f"training.{name}={value} needs a metric to compare: set checkpoint.best_metric, such as "
                    "eval/loss"
                )

    @property
    def trainable(self) -> str:
        """Regular expression: the parameters that are trained. With adapters, these, new heads, and what
        optimizer.trainable names besides."""
        if self.model.lora.rank is None:
            return self.optimizer.trainable
        return "|".join(filter(None, (TRAINED, self.optimizer.trainable)))

    @property
    def unembedded(self) -> float:
        """The fraction of a row's tokens that the vocabulary head is applied to."""
        return 1.0

    @property
    def last_block(self) -> float:
        """The fraction of tokens for which the last block needs more than keys and values."""
        return 1.0

    @property
    def parameter_group(self) -> ParameterGroup | None:
        """Parameters that are trained otherwise than the rest, if any."""
        return None


def factors_of(optimizer: OptimizerConfig, model: ModelConfig) -> Factors:
    """What initial weights and learning rates are multiplied by for the size of the model."""
    width, layers = optimizer.base_width, optimizer.base_layers
    if width is None and layers is None:
        return Factors({}, {})
    if model.zero_centered_norm:  # its final norm cannot be scaled by a factor
        raise ConfigError(
            "optimizer.base_width and base_layers do not support model.zero_centered_norm: set them to none"
        )
    return size_factors(
        optimizer.name, model.width / (width or model.width), model.num_layers / (layers or model.num_layers)
    )
