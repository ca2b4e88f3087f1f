"""Proximal policy optimisation: a policy, a critic that foresees its rewards, a reference it stays near."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.rl import hooks as rollout_hooks
from jaxllm.rl import rollouts
from jaxllm.runs import weights
from jaxllm.runs.program import Program
from jaxllm.rewards.scorer import InBatches, critic_scale
from jaxllm.rl.config import RolloutTrainConfig
from jaxllm.rl.rollouts import Rollout, Rollouts, kl_metrics
from jaxllm.batches import RolloutBatch
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError
from jaxllm.losses import (
    adaptive_kl_coefficient,
    generalized_advantage_estimation,
    token_rewards,
    whiten,
)
from jaxllm.models import Model, ScalarModel, build_model, build_scalar_model
from jaxllm.objectives.ppo import loss_fn
from jaxllm.training.checkpoint import find_checkpoint, read_arrays
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.state import TrainState

load = rollouts.load_run_prompts
make_hooks = rollout_hooks.make_hooks
tokenizer_text = rollouts.tokenizer_text


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss, of the rewards of tokens and of the advantages."""

    clip: float  # how far the ratio may go from 1
    value_clip: float | None  # how far a value may move in one rollout, in units of reward; None: no limit
    value_coefficient: float
    entropy_coefficient: float
    discount: float
    gae_lambda: float  # of GAE: 0 trusts the critic, 1 the rewards
    whiten_advantages: bool  # advantages, over the rollout
    kl_coefficient: float  # reward that a nat away from the weights it begins with costs
    kl_target: float | None  # nats an answer, for which the coefficient is adapted; None: it is fixed
    kl_horizon: float  # answers in which the coefficient may change by the factor e
    critic_warmup: int  # rollouts at the start from which only the critic learns

    def __post_init__(self):
        if self.kl_target is not None and self.kl_target <= 0:
            raise ConfigError(
                f"objective.kl_target={self.kl_target} must be above 0, or none for a fixed one"
            )
        if self.kl_coefficient < 0 or self.kl_horizon <= 0:
            raise ConfigError("objective.kl_coefficient must be 0 or more, objective.kl_horizon above 0")


@dataclass(frozen=True)
class Config(RolloutTrainConfig):
    """A PPO run."""

    objective: ObjectiveConfig

    def __post_init__(self):
        super().__post_init__()
        if self.objective.critic_warmup:
            for name, value in (
                ("objective.entropy_coefficient", self.objective.entropy_coefficient),
                ("optimizer.weight_decay", self.optimizer.weight_decay),
            ):
                if value:
                    raise ConfigError(
                        f"{name}={value} would move the policy while only the critic learns: set it to 0, or "
                        f"objective.critic_warmup=0"
                    )


class ActorCritic(NamedTuple):
    """Two models in one tree of parameters, {"policy", "critic"}."""

    init: Callable[[jax.Array], Any]
    policy: Model
    critic: ScalarModel


def build(config: Config) -> tuple[ActorCritic, Callable[..., Any]]:
    """The two models and the loss."""
    policy, critic, knobs = build_model(config.model), build_scalar_model(config.model), config.objective

    def init(key: jax.Array) -> Any:
        policy_key, critic_key = jax.random.split(key)
        return {"policy": policy.init(policy_key), "critic": critic.init(critic_key)}

    return ActorCritic(init, policy, critic), functools.partial(
        loss_fn,
        model=policy,
        critic=critic,
        temperature=config.rollout.sampling.temperature,
        clip=knobs.clip,
        value_clip=knobs.value_clip,
        value_coefficient=knobs.value_coefficient,
        entropy_coefficient=knobs.entropy_coefficient,
    )


def batch_shapes(config: Config) -> RolloutBatch:
    """Shape and dtype of every field of a batch."""
    batch = rollouts.batch_shapes(config)
    return batch._replace(values=batch.old_log_probs, returns=batch.old_log_probs)


def initial_params(program: Program, parent: Any) -> Any:
    """The policy is the checkpoint's; the critic is the reward model, in the units that answers are paid in,
    or the policy with a head of zeros where there is none."""
    wanted, reward = program.placed_state.params, program.config.reward
    policy = weights.read_policy(parent, wanted["policy"])
    if reward.model is None:
        critic = program.fresh_state().params["critic"]
        critic |= {name: jax.tree.map(jnp.copy, policy[name]) for name in critic.keys() & policy.keys()}
    else:
        folder = find_checkpoint(reward.model)
        weights.check_shape(program.config, folder, f"reward.model={reward.model}, the critic's beginning,")
        critic = read_arrays(folder, wanted["critic"], prefix="params")
        scale = critic_scale(reward, folder)
        critic["scalar_head"] = jax.tree.map(lambda x: (x * scale).astype(x.dtype), critic["scalar_head"])
    return {"policy": policy, "critic": critic}


@functools.partial(jax.jit, static_argnames=("discount", "gae_lambda", "whitened"))
def targets(
    scores: jax.Array,
    kl: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    kl_coefficient: jax.Array,
    *,
    discount: float,
    gae_lambda: float,
    whitened: bool,
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns [N, T]."""
    rewards = token_rewards(scores, kl, mask, kl_coefficient=kl_coefficient)
    advantages, returns = generalized_advantage_estimation(
        rewards, values, mask, discount=discount, lambda_=gae_lambda
    )
    return whiten(advantages, mask) if whitened else advantages, returns


class ActorCriticRollouts(Rollouts):
    """A token is worth what came of it beyond what the critic foresaw."""

    def __init__(self, program: Program, *args: Any):
        super().__init__(program, program.model.policy, *args)
        self.values = InBatches(program.model.critic.apply, program.rows_at_a_time, program.mesh)
        self.kl_coefficient = program.config.objective.kl_coefficient

    def policy(self, params: Any) -> Any:
        return params["policy"]

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"kl_coefficient": self.kl_coefficient}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        super().restore(metadata)
        self.kl_coefficient = metadata.get("kl_coefficient", self.kl_coefficient)

    def complete(self, step: int, row: dict[str, float]) -> dict[str, float]:
        """With the share of the returns' variance that the critic explains, from sums over all tokens."""

        def variance(name: str) -> float:
            return row.pop(f"value/{name}_squared") - row.pop(f"value/{name}") ** 2

        spread, left = variance("return"), variance("error")
        row["value/explained_variance"] = 1 - left / spread if spread > 0 else float("nan")
        return super().complete(step, row)

    def worth(self, state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, dict[str, float]]:
        knobs = self.program.config.objective
        old_log_probs, row = self.old_log_probs(state.params["policy"], rollout)
        values = self.values(state.params["critic"], rollout.tokens)
        _, kl = self.kl(old_log_probs, rollout)
        advantages, returns = jax.device_get(
            targets(
                rollout.rewards,
                kl,
                values,
                rollout.mask,
                self.kl_coefficient,
                discount=knobs.discount,
                gae_lambda=knobs.gae_lambda,
                whitened=knobs.whiten_advantages,
            )
        )
        row |= kl_metrics(kl, rollout.mask) | {"kl/coefficient": self.kl_coefficient}
        if int(state.step) < knobs.critic_warmup * self.config.steps:
            advantages = np.zeros_like(advantages)  # no gradient for the policy, not even Adam's moments
        elif knobs.kl_target is not None:
            self.kl_coefficient = float(
                adaptive_kl_coefficient(
                    self.kl_coefficient,
                    row["kl/reference"],
                    target=knobs.kl_target,
                    horizon=knobs.kl_horizon,
                    num_samples=self.config.rows,
                )
            )
        batch = RolloutBatch(
            tokens=rollout.tokens,
            mask=rollout.mask,
            old_log_probs=old_log_probs,
            advantages=advantages,
            importance_weights=self.importance_weights(old_log_probs, rollout),
            values=values,
            returns=returns,
        )
        return batch, row


def make_source(program: Program, data: Dataset, tokenizer: BaseTokenizer, start: weights.InitialWeights) -> BatchSource:
    """Rollouts, and what their answers are worth."""
    if program.config.reward.model is not None and start.parent is None:
        raise ConfigError("--init_from=RUN is missing: PPO begins with a model that answers, such as SFT's")
    judge = rollouts.make_judge(program, tokenizer, data)
    return ActorCriticRollouts(program, data, tokenizer, judge, start.params()["policy"])
