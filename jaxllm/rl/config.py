"""What PPO and GRPO are both configured by: rollouts, rewards, prompts, and evaluation while they train."""

from dataclasses import dataclass

from jaxllm.config import nearest_multiples
from jaxllm.data.prompts import PromptConfig
from jaxllm.errors import ConfigError
from jaxllm.rewards.scorer import RewardConfig
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.config import SampleConfig, TrainConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How many completions the policy generates, and how often it trains on each."""

    num_prompts: int  # in a rollout
    group_size: int  # completions of each
    epochs: int  # times every completion is trained on
    num_minibatches: int  # updates an epoch
    decode_batch_size: int  # completions decoded at a time
    mask_truncated: bool  # leave completions without a stop token out of the loss and of every statistic
    max_resamples: int  # times groups of equal rewards are replaced by other prompts' (DAPO)
    dtype: str | None  # the sampler computes in, such as "bfloat16"; None: model.compute_dtype
    replicate_params: bool  # whole weights on every device while decoding (but for the tensor axis)
    recompute_log_probs: bool  # old log-probs by the trainer; False: the sampler's, once the first agree
    importance_sampling: str | None  # "token" or "sequence": weight the loss by policy / sampler; None: not
    importance_sampling_cap: float  # largest such weight
    log_prob_difference_limit: float  # nats a token between sampler and trainer, above which the run warns
    sampling: SamplingConfig

    def __post_init__(self):
        for name in ("num_prompts", "group_size", "epochs", "num_minibatches", "decode_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)} must be at least 1")
        if self.rows % self.num_minibatches:
            sizes = " or ".join(map(str, nearest_multiples(self.rows, self.num_minibatches)))
            raise ConfigError(
                f"rollout.num_prompts x rollout.group_size = {self.rows} is not divisible by "
                f"rollout.num_minibatches={self.num_minibatches}: use {sizes}"
            )
        if self.sampling.greedy:
            raise ConfigError(
                f"rollout.sampling.temperature={self.sampling.temperature:g}: a greedy policy does not "
                f"explore; use 1.0"
            )
        for name, value in self.sampling.filters.items():
            raise ConfigError(
                f"rollout.sampling.{name}={value} is not supported: no importance weight corrects for tokens "
                f"that are never sampled; set rollout.sampling.{name}=none"
            )
        if self.max_resamples < 0:
            raise ConfigError(f"rollout.max_resamples={self.max_resamples} must not be negative")
        if self.max_resamples and self.group_size == 1:
            raise ConfigError(
                f"rollout.max_resamples={self.max_resamples} resamples groups of equal rewards, which all "
                f"groups of rollout.group_size=1 are: use 0, or a larger group"
            )
        if self.importance_sampling not in (None, "token", "sequence"):
            raise ConfigError(
                f"rollout.importance_sampling={self.importance_sampling!r}: choose token, sequence or none"
            )
        if self.importance_sampling and not self.recompute_log_probs:
            raise ConfigError(
                "rollout.importance_sampling compares the sampler's log-probs with recomputed ones: it needs "
                "rollout.recompute_log_probs=true (without, the loss's ratio itself is policy / sampler)"
            )
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"rollout.dtype={self.dtype!r}: choose float32, bfloat16 or none")

    @property
    def rows(self) -> int:
        """Completions of a rollout."""
        return self.num_prompts * self.group_size

    @property
    def steps(self) -> int:
        """Updates of an iteration."""
        return self.epochs * self.num_minibatches


@dataclass(frozen=True)
class EvaluationSampleConfig(SampleConfig):
    """Completions of `prompts` and of held-out ones: one each as `sampling` says, and several as in a
    rollout."""

    group_size: int  # completions as in a rollout of each held-out prompt, for pass@k; 0: none

    def __post_init__(self):
        if self.group_size < 0:
            raise ConfigError(f"sample.group_size={self.group_size} must not be negative")


@dataclass(frozen=True)
class RolloutTrainConfig(TrainConfig):
    """The config of PPO and GRPO but for their objectives."""

    data: PromptConfig
    rollout: RolloutConfig
    reward: RewardConfig
    sample: EvaluationSampleConfig

    def __post_init__(self):
        super().__post_init__()
        if self.model.lora.rank is not None and self.model.lora.dropout:
            raise ConfigError(
                f"model.lora.dropout={self.model.lora.dropout} would change the policy between sampling and "
                "the update: set it to 0"
            )
        if not self.reward.functions and self.reward.model is None:
            raise ConfigError("reward.functions and reward.model are both empty: name one")
        rollout = self.rollout
        names = ("steps", "log_every", "evaluate_every", "sample_every", "checkpoint_every")
        intervals = {f"training.{name}": getattr(self.training, name) for name in names}
        for name, value in (
            intervals | {"evaluation.suites_every": self.evaluation.suites_every or 0}
        ).items():
            if value % rollout.steps:  # it would happen in the middle of an iteration
                sizes = " or ".join(map(str, nearest_multiples(value, rollout.steps)))
                raise ConfigError(
                    f"{name}={value} must be a multiple of rollout.epochs x "
                    f"rollout.num_minibatches = {rollout.steps}: use {sizes}"
                )
        if self.data.batch_size != rollout.rows // rollout.num_minibatches:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be rollout.num_prompts x rollout.group_size / "
                f"rollout.num_minibatches = {rollout.rows // rollout.num_minibatches}"
            )
        if rollout.sampling.max_new_tokens >= self.data.sequence_length:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} leaves no room for a prompt before "
                f"rollout.sampling.max_new_tokens={rollout.sampling.max_new_tokens}: raise the first"
            )

    @property
    def unembedded(self) -> float:
        """Completions alone are scored: at most max_new_tokens of a row."""
        return self.rollout.sampling.max_new_tokens / self.data.sequence_length
