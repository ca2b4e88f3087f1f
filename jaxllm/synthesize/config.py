"""What a synthesis is made of. Every field is commented in configs/synthesize.py."""

import re
from dataclasses import dataclass

from jaxllm.config import Text, check_choice
from jaxllm.errors import ConfigError
from jaxllm.rollout.sampling import SamplingConfig

SOURCES = ("magpie", "self_instruct", "evolve", "file")
JUDGES = ("reward_model", "rubric", "none")


def is_server(model: str | None) -> bool:
    """Whether a model is an OpenAI-compatible server rather than a checkpoint."""
    return model is not None and re.match(r"https?://", model) is not None


def check_range(field: str, value: tuple[int, ...]) -> None:
    """ConfigError for what is not a lowest and a highest number."""
    if len(value) != 2 or not 0 <= value[0] <= value[1]:
        raise ConfigError(f"{field}={value} must be a lowest and a highest number, such as 1,1000")


@dataclass(frozen=True)
class InstructionsConfig:
    """Where instructions come from."""

    source: str
    model: str | None
    seeds: tuple[str, ...]
    rename: tuple[str, ...]
    examples: int
    length: tuple[int, ...]
    sampling: SamplingConfig

    def __post_init__(self):
        check_choice("instructions.source", self.source, SOURCES)
        check_range("instructions.length", self.length)
        if self.examples < 1:
            raise ConfigError(f"instructions.examples={self.examples} must be at least 1")
        if self.source == "magpie" and self.seeds:
            raise ConfigError(
                "instructions.seeds has no effect with instructions.source=magpie: set it to none, or the "
                "source to self_instruct, evolve or file"
            )
        if self.source != "magpie" and not self.seeds:
            raise ConfigError(f"instructions.source={self.source} needs instructions.seeds: name a file")


@dataclass(frozen=True)
class AnswersConfig:
    """Which model answers them, and how often."""

    model: str | None
    per_instruction: int
    sampling: SamplingConfig

    def __post_init__(self):
        if self.per_instruction < 1:
            raise ConfigError(f"answers.per_instruction={self.per_instruction} must be at least 1")


@dataclass(frozen=True)
class JudgeConfig:
    """What scores the answers."""

    kind: str
    model: str | None
    normalize: bool
    rubric: str
    sampling: SamplingConfig

    def __post_init__(self):
        check_choice("judge.kind", self.kind, JUDGES)
        if self.kind == "reward_model" and is_server(self.model):
            raise ConfigError("judge.kind=reward_model needs a run folder in judge.model, not a server")
        if self.kind == "none" and self.model is not None:
            raise ConfigError(
                "judge.model has no effect with judge.kind=none: set kind to reward_model or rubric"
            )


@dataclass(frozen=True)
class FiltersConfig:
    """Which of the rows are kept. They read what was written, so that they can change afterwards."""

    must_end: bool
    answer_length: tuple[int, ...]
    refusals: tuple[Text, ...]
    copies: bool
    min_score: float | None
    min_margin: float
    near_duplicates: float | None
    evaluation_sets: tuple[str, ...]
    overlap_words: int

    def __post_init__(self):
        check_range("filters.answer_length", self.answer_length)
        if self.near_duplicates is not None and not 0 < self.near_duplicates < 1:
            raise ConfigError(
                f"filters.near_duplicates={self.near_duplicates} must be between 0 and 1, or none for exact "
                "duplicates alone"
            )
        if self.overlap_words < 1:
            raise ConfigError(f"filters.overlap_words={self.overlap_words} must be at least 1")
        if self.min_margin < 0:
            raise ConfigError(f"filters.min_margin={self.min_margin} must not be negative")


@dataclass(frozen=True)
class SynthesizeConfig:
    """A data set to write."""

    seed: int
    rows: int
    block_rows: int
    decode_batch_size: int
    dtype: str | None
    server_requests: int
    instructions: InstructionsConfig
    answers: AnswersConfig
    judge: JudgeConfig
    filters: FiltersConfig

    def __post_init__(self):
        if self.rows < 0:
            raise ConfigError(f"rows={self.rows} must not be negative")
        for name in ("block_rows", "decode_batch_size", "server_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r}: choose float32, bfloat16, or none for the model's own")
        for name, off in (("min_score", None), ("min_margin", 0)):
            if getattr(self.filters, name) != off and self.judge.kind == "none":
                raise ConfigError(f"filters.{name} needs scores: set judge.kind, or filters.{name}={off}")

    def check_models(self) -> None:
        """ConfigError where a model is missing: a pipeline sets them after it has read its config."""
        if self.rows < 1:
            raise ConfigError("rows=0 writes nothing: set rows to at least 1")
        if self.answers.model is None:
            raise ConfigError(
                "answers.model is missing: name a run folder, a Hugging Face folder or a server"
            )
        if self.judge.kind == "reward_model" and self.judge.model is None:
            raise ConfigError(
                "judge.model is missing: name a reward model's run folder, or set judge.kind=rubric or none"
            )
        if self.instructions.source == "magpie" and is_server(self.instructions_model):
            raise ConfigError(
                "instructions.source=magpie needs a checkpoint in instructions.model: a server does not show "
                "its chat template; or set instructions.source=self_instruct"
            )

    @property
    def instructions_model(self) -> str | None:
        """The model that writes the instructions: by default, that which answers them."""
        return self.instructions.model or self.answers.model

    @property
    def judge_model(self) -> str | None:
        """The model that judges: by default, the one that answers."""
        return self.judge.model or self.answers.model
