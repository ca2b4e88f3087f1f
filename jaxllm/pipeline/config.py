"""What a pipeline is made of. Every field is commented in configs/base/pipeline.py."""

from collections.abc import Container
from dataclasses import dataclass

from jaxllm.config import Text
from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig
from jaxllm.parallel.sharding import MeshConfig
from jaxllm.stages import dpo, grpo, ppo, pretrain, reward_model, sft
from jaxllm.stages.sft import Config as SFTConfig
from jaxllm.synthesize.config import SynthesizeConfig

# Each run in order, and the one that it is initialized from.
PARENTS = {
    "pretrain": None,
    "sft": "pretrain",
    "reward_model": "sft",
    "ppo": "sft",
    "dpo": "sft",
    "sft_reasoning": "sft",
    "grpo": "sft_reasoning",
}


@dataclass(frozen=True)
class SourcesConfig:
    """What each stage trains on."""

    text: tuple[str, ...]
    chats: tuple[str, ...]
    pairs: tuple[str, ...]
    solutions: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class GatesConfig:
    """What must be reached, and on which prompts it is measured."""

    must_pass: bool  # whether a failed gate fails the command
    prompts: tuple[str, ...]  # held-out rows with a prompt; with `reference` for the rubric
    max_rows: int
    max_new_tokens: int
    shown: tuple[Text, ...]  # prompts in the report, completed by every model
    text_share: float
    answer_rise: float
    reward_ceiling: float
    reward_share: float
    preference_errors: float
    kl_limit: float
    pass_rise: float
    errors: float

    def __post_init__(self):
        for name in ("prompts", "shown"):
            if not getattr(self, name):
                raise ConfigError(f"gates.{name} is empty: name at least one")
        if self.max_rows < 2:
            raise ConfigError(f"gates.max_rows={self.max_rows} must be at least 2, for a standard error")

    @property
    def rows_of_each_source(self) -> int:
        """How many rows of each of `prompts` are completed."""
        return -(-self.max_rows // len(self.prompts))


@dataclass(frozen=True)
class ExpectedSeconds:
    """How long each stage takes on the machine it was written for; only to estimate the time left."""

    pretrain: float
    sft: float
    reward_model: float
    ppo: float
    dpo: float
    sft_reasoning: float
    grpo: float
    synthesize: float
    gates: float


@dataclass(frozen=True)
class PipelineConfig:
    """A whole run of each stage."""

    seed: int
    model: ModelConfig
    mesh: MeshConfig
    data: SourcesConfig
    pretrain: pretrain.Config
    sft: sft.Config
    reward_model: reward_model.Config
    ppo: ppo.Config
    dpo: dpo.Config
    sft_reasoning: SFTConfig
    grpo: grpo.Config
    synthesize: SynthesizeConfig
    gates: GatesConfig
    expected_seconds: ExpectedSeconds

    def __post_init__(self):
        for name in PARENTS:
            for field in ("seed", "model", "mesh"):
                if getattr(getattr(self, name), field) != getattr(self, field):
                    raise ConfigError(
                        f"{name}.{field} differs from the pipeline's {field}: set {field} for all stages"
                    )


def pipeline_class(config: Container[str]) -> type[PipelineConfig]:
    """The dataclass of a pipeline's config file; ConfigError for that of a single stage."""
    if "gates" not in config:
        raise ConfigError("the config file is of one stage: run it with experiments/train.py")
    return PipelineConfig
