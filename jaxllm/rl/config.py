"""What PPO and GRPO are both configured by: rollouts, rewards, prompts, and what is asked meanwhile."""

from dataclasses import dataclass

from jaxllm.rewards.scorer import RewardConfig
from jaxllm.runs.config import SampleConfig, TrainConfig
from jaxllm.config import nearest_multiples
from jaxllm.data.prompts import PromptConfig
from jaxllm.errors import ConfigError
from jaxllm.rollout.sampling import SamplingConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy is asked, and how often it learns from its answers."""

    num_prompts: int  # in a rollout
    group_size: int  # answers to each
    epochs: int  # times every answer is learnt from
    num_minibatches: int  # updates an epoch
    decode_batch_size: int  # completions decoded at a time
    mask_truncated: bool  # leave answers that did not end out of the loss
    max_resamples: int  # times groups whose rewards are all equal are replaced by other prompts' (DAPO)
    dtype: str | None  # the sampler computes in, such as "bfloat16"; None: model.compute_dtype
    replicate_params: bool  # copy the weights whole to every device before decoding (tensor-parallel parts excepted)
    recompute_log_probs: bool  # learn from recomputed log-probs; without, from the sampler's once they agree
    importance_sampling: str | None  # "token" or "sequence": weigh the loss by policy / sampler; None: not
    importance_sampling_cap: float  # at most
    log_prob_difference_limit: float  # nats a token between sampler and trainer, above which the run warns
    sampling: SamplingConfig

    def __post_init__(self):
        for name in ("num_prompts", "group_size", "epochs", "num_minibatches", "decode_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)} must be at least 1")
        if self.rows % self.num_minibatches:
            sizes = " or ".join(map(str, nearest_multiples(self.rows, self.num_minibatches)))
            raise ConfigError(
                f"rollout.num_prompts x rollout.group_size = {self.rows} does not divide into "
                f"rollout.num_minibatches={self.num_minibatches}: make it {sizes}"
            )
        if self.sampling.temperature == 0:
            raise ConfigError("rollout.sampling.temperature=0: a greedy policy does not explore; use 1.0")
        if self.importance_sampling not in (None, "token", "sequence"):
            raise ConfigError(f"rollout.importance_sampling={self.importance_sampling!r}: choose token, sequence or none")
        if self.importance_sampling and not self.recompute_log_probs:
            raise ConfigError(
                "rollout.importance_sampling compares the sampler's log-probs with recomputed ones: it needs "
                "rollout.recompute_log_probs=true (without, the loss's ratio itself is policy / sampler)"
            )
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"rollout.dtype={self.dtype!r}: choose float32, bfloat16 or none")

    @property
    def rows(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def steps(self) -> int:
        """Updates of an iteration."""
        return self.epochs * self.num_minibatches


@dataclass(frozen=True)
class AskConfig(SampleConfig):
    """Answers to `prompts` and to held-out ones: one each as `sampling` says, and several as in a rollout."""

    group_size: int  # answers as in a rollout to each held-out prompt, for pass@k; 0: none

    def __post_init__(self):
        if self.group_size < 0:
            raise ConfigError(f"sample.group_size={self.group_size} must not be negative")


@dataclass(frozen=True)
class RolloutTrainConfig(TrainConfig):
    """What PPO and GRPO are both configured by."""

    data: PromptConfig
    rollout: RolloutConfig
    reward: RewardConfig
    sample: AskConfig

    def __post_init__(self):
        super().__post_init__()
        if not self.reward.functions and self.reward.model is None:
            raise ConfigError("reward.functions and reward.model are both empty: name one")
        rollout = self.rollout
        for name in ("steps", "log_every", "evaluate_every", "sample_every", "checkpoint_every"):
            value = getattr(self.training, name)
            if value % rollout.steps:  # it would happen in the middle of an iteration
                sizes = " or ".join(map(str, nearest_multiples(value, rollout.steps)))
                raise ConfigError(
                    f"training.{name}={value} must be a multiple of rollout.epochs x rollout.num_minibatches = "
                    f"{rollout.steps}: use {sizes}"
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
