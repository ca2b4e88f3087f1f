"""Proximal policy optimization (PPO): a policy, a critic that predicts its returns, a frozen reference.

A rollout's completions are rewarded; each token is also charged kl_coefficient times its KL to the reference.
The critic's values turn these rewards into advantages (GAE), and policy and critic train on them together for
a few epochs. The critic is initialized from the reward model, rescaled to the units of the rewards.
Deviations from Ziegler et al. 2019 and InstructGPT: docs/algorithms.md.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.batches import RolloutBatch, counted_lengths
from jaxllm.data.rows import Dataset
from jaxllm.errors import ConfigError
from jaxllm.losses import (
    Weighted,
    adaptive_kl_coefficient,
    add_auxiliary,
    aggregate,
    generalized_advantage_estimation,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)
from jaxllm.models import Model, Params, ScalarModel, build_model, build_scalar_model
from jaxllm.rewards.reward_model import read_statistics
from jaxllm.rl import hooks, inputs
from jaxllm.rl.config import RolloutConfig, RolloutTrainConfig
from jaxllm.rl.log_probs import LogProbs, kl_metrics
from jaxllm.rl.rollouts import Metrics, Rollout, RolloutSource
from jaxllm.rollout.score import InBatches, next_token_log_probs
from jaxllm.runs import weights
from jaxllm.runs.checkpoints import read_adapters, read_base, read_policy
from jaxllm.runs.context import RunInputs
from jaxllm.runs.panels import COMPLETION_LENGTH, KL, REWARD, Panel
from jaxllm.runs.program import Program
from jaxllm.runs.stage import Headline
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.optimizer import ParameterGroup
from jaxllm.training.state import TrainState, is_none, merge_params, split_params
from jaxllm.training.step import LossFn
from jaxllm.training.step_folder import find_checkpoint

headline = Headline("eval/reward/model", highest=True)
generates = True
conversational = True
policy_prefix = "policy"
panels: tuple[Panel, ...] = (REWARD, KL, COMPLETION_LENGTH)
tokenizer_text = inputs.tokenizer_text
make_hooks = hooks.make_hooks


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss, of the rewards of tokens and of the advantages."""

    clip: float  # how far from 1 a ratio still has a gradient
    value_clip: float | None  # how far a value may move in one rollout, in units of reward; None: no limit
    value_coefficient: float
    entropy_coefficient: float
    discount: float
    gae_lambda: float  # 0 trusts the critic, 1 the rewards
    whiten_advantages: bool  # advantages, over the rollout
    kl_coefficient: float  # KL penalty: reward per nat of KL to the reference
    kl_target: float | None  # nats a completion, to which the coefficient is adapted; None: it is fixed
    kl_horizon: float  # completions over which the coefficient changes by the factor e^0.2 at most
    critic_warmup: int  # rollouts at the start on which only the critic trains
    critic_learning_rate: float | None  # at the peak of the schedule; None: optimizer.learning_rate
    critic_clip_norm: float | None  # of its gradient alone; None: clipped with the policy's

    def __post_init__(self):
        if self.kl_target is not None and self.kl_target <= 0:
            raise ConfigError(
                f"objective.kl_target={self.kl_target} must be above 0, or none for a fixed one"
            )
        if self.kl_coefficient < 0 or self.kl_horizon <= 0:
            raise ConfigError("objective.kl_coefficient must be 0 or more, objective.kl_horizon above 0")
        for name in ("critic_learning_rate", "critic_clip_norm"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"objective.{name}={value} must be above 0, or none for the policy's")


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
                        f"{name}={value} would move the policy while only the critic trains: set it to 0, or "
                        f"objective.critic_warmup=0"
                    )
        rate, policy_rate = self.objective.critic_learning_rate, self.optimizer.learning_rate
        if rate is not None and policy_rate <= 0:
            raise ConfigError(
                f"objective.critic_learning_rate={rate} follows the schedule of optimizer.learning_rate="
                f"{policy_rate}, which must be above 0"
            )

    @property
    def parameter_group(self) -> ParameterGroup | None:
        """The critic, where it has a learning rate or a gradient clip of its own."""
        rate, clip_norm = self.objective.critic_learning_rate, self.objective.critic_clip_norm
        if rate is None and clip_norm is None:
            return None
        factor = 1.0 if rate is None else rate / self.optimizer.learning_rate
        return ParameterGroup("^critic/", factor, clip_norm)


def loss_fn(
    params: Params,
    batch: RolloutBatch,
    key: jax.Array,
    *,
    model: Model,
    critic: ScalarModel,
    rollout: RolloutConfig,
    clip: float,
    value_clip: float | None,
    value_coefficient: float,
    entropy_coefficient: float,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Policy loss + value_coefficient value loss - entropy_coefficient entropy, all means over tokens.

    params: {"policy", "critic"}. Metrics are `policy/NAME` and `value/NAME`.
    """
    del key  # nothing here is random
    scores = next_token_log_probs(
        params["policy"],
        batch.tokens,
        model=model,
        temperature=rollout.sampling.temperature,
        counted=(batch.mask, rollout.sampling.max_new_tokens),
        entropy_gradient=entropy_coefficient != 0,
    )
    values, value_aux = critic.apply(critic_params(params), batch.tokens)
    assert batch.old_log_probs is not None
    policy, policy_metrics = ppo_policy_loss(
        scores.log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        clip_low=clip,
        clip_high=clip,
        importance_weights=batch.importance_weights,
    )
    assert batch.values is not None
    assert batch.returns is not None
    value, value_metrics = ppo_value_loss(values, batch.values, batch.returns, batch.mask, clip=value_clip)
    entropy = aggregate(scores.entropy, batch.mask, "token_mean")
    # The three count the same tokens, so their sums add up to a sum over the same weight.
    total = policy.sum + value_coefficient * value.sum - entropy_coefficient * entropy.sum
    loss = Weighted(total, policy.weight)
    metrics = {f"policy/{name}": x for name, x in (policy_metrics | {"entropy": entropy}).items()}
    metrics |= {f"value/{name}": value_metrics[name] for name in ("loss", "clip_fraction")} | {"loss": loss}
    aux = {f"policy/{name}": x for name, x in scores.aux.items()}
    aux |= {f"value/{name}": x for name, x in value_aux.items()}
    return add_auxiliary(loss, jax.tree.map(jax.lax.stop_gradient, metrics), aux)


class ActorCritic(NamedTuple):
    """Two models in one tree of parameters, {"policy", "critic"}. With adapters, the critic has what trains
    for itself, on the policy's frozen weights, and None in their place."""

    policy: Model
    critic: ScalarModel
    trainable: str

    def init(self, key: jax.Array) -> Params:
        policy_key, critic_key = jax.random.split(key)
        params = {"policy": self.policy.init(policy_key), "critic": self.critic.init(critic_key)}
        if self.policy.config.lora.rank is not None:
            params["critic"] = split_params(params, self.trainable)[0]["critic"]
        return params


def critic_params(params: Params) -> Params:
    """All parameters of the critic, those that it shares with the policy included."""
    critic, policy = params["critic"], params["policy"]
    return {name: merge_params(x, policy[name]) if name in policy else x for name, x in critic.items()}


def build(config: Config) -> tuple[ActorCritic, LossFn]:
    """The two models and the loss."""
    policy, critic, knobs = build_model(config.model), build_scalar_model(config.model), config.objective
    return ActorCritic(policy, critic, config.trainable), functools.partial(
        loss_fn,
        model=policy,
        critic=critic,
        rollout=config.rollout,
        clip=knobs.clip,
        value_clip=knobs.value_clip,
        value_coefficient=knobs.value_coefficient,
        entropy_coefficient=knobs.entropy_coefficient,
    )


def load(run: RunInputs[Config, ActorCritic]) -> Dataset:
    """Prompts to train on and to evaluate on."""
    if run.program.config.reward.model is not None and run.initial.parent is None:
        raise ConfigError("--init_from=RUN is missing: PPO starts from a trained policy, such as SFT's")
    return inputs.load(run)


def batch_shapes(config: Config) -> RolloutBatch:
    """Shape and dtype of every field of a batch."""
    batch = inputs.batch_shapes(config)
    return batch._replace(values=batch.old_log_probs, returns=batch.old_log_probs)


def initial_params(program: Program[Config, ActorCritic], parent: Path) -> Params:
    """The policy is the checkpoint's; the critic is the reward model, in the units of the rewards, or the
    policy with a head of zeros where there is none."""
    wanted, reward = program.placed_state.params, program.config.reward
    policy = read_policy(parent, wanted["policy"])
    folder = critic_folder(program.config, parent)
    if folder is None:

        def own(name: str, x: Any) -> Any:
            """The critic's copy of what it does not share; None for the head, which is fresh: zeros."""
            there = policy.get(name, jax.tree.map(lambda _: None, x))
            return jax.tree.map(
                lambda leaf, read: None if leaf is None or read is None else jnp.copy(read),
                x,
                there,
                is_leaf=is_none,
            )

        critic = {name: own(name, x) for name, x in wanted["critic"].items()}
    else:
        read = read_policy if program.config.model.lora.rank is None else read_adapters
        critic = read(folder, wanted["critic"])
        # What turns the reward model's differences into those of the rewards.
        scale = reward.model_weight / read_statistics(str(reward.model), folder, reward.normalize).std
        critic["scalar_head"] = jax.tree.map(lambda x: (x * scale).astype(x.dtype), critic["scalar_head"])
    return program.complete({"policy": policy, "critic": critic})


def critic_folder(config: Config, parent: Path) -> Path | None:
    """The reward model that the critic begins as; None: it begins as the policy, with a head of zeros."""
    if config.reward.model is None:
        return None
    folder, name = find_checkpoint(config.reward.model), f"reward.model={config.reward.model}"
    weights.check_shape(config, folder, f"{name} (initializes the critic)")
    if config.model.lora.rank is None:
        return folder
    base = read_base(folder)
    if base is None or base.hashed() != weights.base_of(config, parent, "--init_from"):
        print(f"note: the critic begins as the policy, whose frozen weights it shares: {name} has others")
        return None
    weights.base_of(config, folder, f"{name} (initializes the critic)")
    return folder


@functools.partial(jax.jit, static_argnames=("discount", "gae_lambda", "whitened"))
def advantages_and_returns(
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
    """[N, T] both, of scores [N] and kl, values, mask [N, T]."""
    rewards = token_rewards(scores, kl, mask, kl_coefficient=kl_coefficient)
    advantages, returns = generalized_advantage_estimation(
        rewards, values, mask, discount=discount, lambda_=gae_lambda
    )
    return whiten(advantages, mask) if whitened else advantages, returns


class PPO:
    """The algorithm: a token's advantage is its return beyond the critic's value."""

    def __init__(self, program: Program[Config, ActorCritic], reference: Params):
        config, model = program.config, program.model
        self.knobs, self.rollout = config.objective, config.rollout
        self.log_probs = LogProbs(program, model.policy, reference)
        self.values = InBatches(
            lambda params, tokens: model.critic.apply(params, tokens).values,
            program.microbatch_rows,
            config.data.sequence_length,
            program.mesh,
        )
        self.kl_coefficient = self.knobs.kl_coefficient

    def policy(self, params: Params) -> Params:
        return params["policy"]

    def metadata(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        self.kl_coefficient = metadata.get("kl_coefficient", self.kl_coefficient)

    def weights_without_gradient(self, rollout: Rollout) -> None:
        return None  # the critic learns from every row

    def make_batch(self, state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, Metrics]:
        """Log-probs and values before the first update, KL penalty, GAE."""
        step, knobs = int(state.step), self.knobs
        old_log_probs, row = self.log_probs.old(state.params["policy"], rollout, step)
        values = self.values(critic_params(state.params), counted_lengths(rollout.mask), rollout.tokens)
        _, kl = self.log_probs.kl(state.params["policy"], old_log_probs, rollout, step)
        advantages, returns = jax.device_get(
            advantages_and_returns(
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
        row["value/explained_variance"] = explained_variance(values, returns, rollout.mask)
        if step < knobs.critic_warmup * self.rollout.steps:
            advantages = np.zeros_like(advantages)  # no gradient for the policy, not even Adam's moments
        elif knobs.kl_target is not None:
            self.kl_coefficient = float(
                adaptive_kl_coefficient(
                    self.kl_coefficient,
                    row["kl/reference"],
                    target=knobs.kl_target,
                    horizon=knobs.kl_horizon,
                    num_samples=int(rollout.valid.sum()),
                )
            )
        batch = RolloutBatch(
            tokens=rollout.tokens,
            mask=rollout.mask,
            old_log_probs=old_log_probs,
            advantages=advantages,
            importance_weights=self.log_probs.importance_weights(old_log_probs, rollout),
            values=values,
            returns=returns,
        )
        return batch, row


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns) over the counted tokens of arrays [N, T]: of the critic that
    made the advantages, before it trains on these returns. NaN where returns do not vary."""
    values, returns = values[mask].astype(np.float64), returns[mask].astype(np.float64)
    if not returns.size or not returns.var():
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())


def make_source(run: RunInputs[Config, ActorCritic], data: Dataset) -> BatchSource:
    """Rollouts, rewarded by what the config names."""
    program = run.program
    scorer = inputs.make_scorer(run)
    algorithm = PPO(program, run.reference()["policy"])
    return RolloutSource(run, data, policy=program.model.policy, scorer=scorer, algorithm=algorithm)
