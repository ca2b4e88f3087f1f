"""What a training run is made of: the dataclass that a config file and the command line fill in."""

from dataclasses import dataclass

from jaxllm.data.text import TextConfig
from jaxllm.data.tokenizer import TokenizerConfig
from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.sharding import MeshConfig
from jaxllm.training.loop import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    z_loss: float  # weight of logsumexp(logits)^2


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    keep: int  # the newest so many

    def __post_init__(self):
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep} must be at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """How much held-out text is scored."""

    max_windows: int | None  # from its start; None: all


@dataclass(frozen=True)
class SampleConfig:
    """Texts written while training."""

    prompts: tuple[str, ...]  # what to continue; "" starts a document
    sampling: SamplingConfig


@dataclass(frozen=True)
class TrainConfig:
    """One run. See configs/pretrain_text.py for every field with its meaning."""

    stage: str
    seed: int
    model: ModelConfig
    objective: ObjectiveConfig
    tokenizer: TokenizerConfig
    data: TextConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    training: LoopConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    sample: SampleConfig
    wandb_project: str | None


# What may differ between a run and its resumption: how long, how often, what is logged and kept.
MAY_DIFFER = (
    "training.steps",
    "optimizer.warmup_steps",  # follows training.steps
    "training.log_every",
    "training.evaluate_every",
    "training.sample_every",
    "training.checkpoint_every",
    "training.max_bad_steps",
    "training.hang_timeout",
    "checkpoint.keep",
    "evaluation.max_windows",
    "sample",
    "wandb_project",
    "data.cache_dir",
    "mesh",
)
