"""What PPO and GRPO are both configured by: rollouts, rewards, prompts, and what is asked meanwhile."""

from dataclasses import dataclass

from experiments.rewards import RewardConfig
from experiments.train_config import SampleConfig, TrainConfig
from jaxllm.config import nearest_multiples
from jaxllm.data.prompts import PromptConfig
from jaxllm.errors import ConfigError
from jaxllm.rollout.sampling import SamplingConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy is asked, and how often it learns from its answers."""

    prompts: int  # in a rollout
    group_size: int  # answers to each
    epochs: int  # times every answer is learnt from
    minibatches: int  # updates an epoch
    max_rows: int  # answers decoded at a time
    mask_truncated: bool  # leave answers that did not end out of the loss
    refills: int  # times groups whose rewards are all equal are replaced by other prompts' (DAPO)
    dtype: str | None  # the sampler computes in, such as "bfloat16"; None: model.compute_dtype
    gather: bool  # copy the weights whole to every device before decoding (tensor-parallel parts excepted)
    rescore: bool  # learn from recomputed log-probs; without, from the sampler's once they agree
    importance: str | None  # "token" or "sequence": weigh the loss by policy / sampler; None: not
    importance_limit: float  # at most
    difference_limit: float  # nats a token between sampler and trainer, above which the run warns
    sampling: SamplingConfig

    def __post_init__(self):
        for name in ("prompts", "group_size", "epochs", "minibatches", "max_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)} must be at least 1")
        if self.rows % self.minibatches:
            sizes = " or ".join(map(str, nearest_multiples(self.rows, self.minibatches)))
            raise ConfigError(
                f"rollout.prompts x rollout.group_size = {self.rows} does not divide into "
                f"rollout.minibatches={self.minibatches}: make it {sizes}"
            )
        if self.sampling.temperature == 0:
            raise ConfigError("rollout.sampling.temperature=0: a greedy policy does not explore; use 1.0")
        if self.importance not in (None, "token", "sequence"):
            raise ConfigError(f"rollout.importance={self.importance!r}: choose token, sequence or none")
        if self.importance and not self.rescore:
            raise ConfigError(
                "rollout.importance compares the sampler's log-probs with recomputed ones: it needs "
                "rollout.rescore=true (without, the loss's ratio itself is policy / sampler)"
            )
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"rollout.dtype={self.dtype!r}: choose float32, bfloat16 or none")

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def steps(self) -> int:
        """Updates of an iteration."""
        return self.epochs * self.minibatches


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
                    f"training.{name}={value} must be a multiple of rollout.epochs x rollout.minibatches = "
                    f"{rollout.steps}: use {sizes}"
                )
        if self.data.batch_size != rollout.rows // rollout.minibatches:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be rollout.prompts x rollout.group_size / "
                f"rollout.minibatches = {rollout.rows // rollout.minibatches}"
            )
        if rollout.sampling.max_new_tokens >= self.data.sequence_length:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} leaves no room for a prompt before "
                f"rollout.sampling.max_new_tokens={rollout.sampling.max_new_tokens}: raise the first"
            )
