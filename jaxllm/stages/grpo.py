"""Group-relative policy optimisation: prompts, groups of answers, rewards that can be checked."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.rl import hooks as rollout_hooks
from jaxllm.rl import rollouts
from jaxllm.runs import weights
from jaxllm.runs.program import Program
from jaxllm.rl.config import RolloutTrainConfig
from jaxllm.rl.rollouts import Rollout, Rollouts, kl_metrics
from jaxllm.batches import RolloutBatch
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError
from jaxllm.losses import (
    discounted_returns,
    group_relative_advantages,
    leave_one_out_advantages,
    token_rewards,
    whiten,
)
from jaxllm.losses.advantages import SCALES
from jaxllm.losses.grpo import MODES
from jaxllm.models import Model, build_model
from jaxllm.objectives.grpo import loss_fn
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.state import TrainState

initial_params = weights.initial_params
load = rollouts.load_run_prompts
make_hooks = rollout_hooks.make_hooks
tokenizer_text = rollouts.tokenizer_text

ADVANTAGES = ("group", "leave_one_out", "reinforce_plus_plus")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss and of the advantages. See jaxllm.losses.grpo_loss."""

    variant: str  # grpo, dr_grpo, dapo, gspo or cispo
    clip_low: float
    clip_high: float
    kl_coefficient: float  # of the KL to the weights that the run begins with; 0 needs no second model
    kl_in: str  # "loss", by kl_estimator; or "reward": k1, taken off before advantages are found
    kl_estimator: str  # k1, k2 or k3
    entropy_coefficient: float
    advantage: str  # "group": GRPO's, by advantage_scale; "leave_one_out": RLOO's; "reinforce_plus_plus"
    advantage_scale: str  # group, batch or none
    advantage_epsilon: float

    def __post_init__(self):
        for name, choices in (
            ("variant", MODES),
            ("kl_estimator", ("k1", "k2", "k3")),
            ("advantage", ADVANTAGES),
            ("advantage_scale", SCALES),
            ("kl_in", ("loss", "reward")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"objective.{name}={value!r}: choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class Config(RolloutTrainConfig):
    """A GRPO run."""

    objective: ObjectiveConfig

    def __post_init__(self):
        if self.rollout.group_size < 2 and self.objective.advantage != "reinforce_plus_plus":
            raise ConfigError(
                f"rollout.group_size={self.rollout.group_size}: answers are compared with others to the same "
                f"prompt, make it 2 or more (or set objective.advantage=reinforce_plus_plus)"
            )
        super().__post_init__()


def build(config: Config) -> tuple[Model, Callable[..., Any]]:
    """The model and the loss."""
    model, knobs = build_model(config.model), config.objective
    return model, functools.partial(
        loss_fn,
        model=model,
        temperature=config.rollout.sampling.temperature,
        variant=knobs.variant,
        clip_low=knobs.clip_low,
        clip_high=knobs.clip_high,
        kl_coefficient=knobs.kl_coefficient if knobs.kl_in == "loss" else 0.0,
        kl_estimator=knobs.kl_estimator,
        entropy_coefficient=knobs.entropy_coefficient,
        max_length=config.rollout.sampling.max_new_tokens if knobs.variant == "dr_grpo" else None,
    )


def batch_shapes(config: Config) -> RolloutBatch:
    """Shape and dtype of every field of a batch."""
    batch, knobs = rollouts.batch_shapes(config), config.objective
    if knobs.advantage != "reinforce_plus_plus":  # one an answer
        batch = batch._replace(advantages=batch.advantages.update(shape=(config.data.batch_size,)))
    if knobs.kl_coefficient and knobs.kl_in == "loss":
        batch = batch._replace(ref_log_probs=batch.old_log_probs)
    return batch


class GroupRollouts(Rollouts):
    """An answer is worth what it is better than the others to its prompt."""

    def worth(self, state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, dict[str, float]]:
        config = self.program.config
        old_log_probs, row = self.old_log_probs(state.params, rollout)
        ref_log_probs, kl = None, np.zeros_like(old_log_probs)
        if self.reference is not None:
            ref_log_probs, kl = self.kl(old_log_probs, rollout)
            row |= kl_metrics(kl, rollout.mask)
        batch = RolloutBatch(
            tokens=rollout.tokens,
            mask=rollout.mask,
            old_log_probs=old_log_probs,
            advantages=np.asarray(advantages(config, rollout, kl)),
            ref_log_probs=ref_log_probs if config.objective.kl_in == "loss" else None,
            importance_weights=self.importance_weights(old_log_probs, rollout),
        )
        return batch, row


def advantages(config: Config, rollout: Rollout, kl: np.ndarray) -> Any:
    """One an answer, float32 [N]; or for REINFORCE++ (Hu 2025, arXiv:2501.03262) one a token, [N, T]."""
    knobs, size = config.objective, config.rollout.group_size
    coefficient = knobs.kl_coefficient if knobs.kl_in == "reward" else 0.0
    if knobs.advantage == "reinforce_plus_plus":
        paid = token_rewards(rollout.rewards, kl, rollout.mask, kl_coefficient=coefficient)
        return whiten(discounted_returns(paid, rollout.mask, discount=1.0), rollout.mask)
    rewards = rollout.rewards - coefficient * kl.sum(1)
    if knobs.advantage == "leave_one_out":
        return leave_one_out_advantages(rewards, size)
    return group_relative_advantages(
        rewards,
        size,
        scale=knobs.advantage_scale,
        epsilon=knobs.advantage_epsilon,
        valid=rollout.mask.any(1),
    )


def make_source(program: Program, data: Dataset, tokenizer: BaseTokenizer, start: weights.InitialWeights) -> BatchSource:
    """Rollouts, and what their answers are worth."""
    config = program.config
    judge = rollouts.make_judge(program, tokenizer, data)
    reference = start.params() if config.objective.kl_coefficient else None
    return GroupRollouts(program, program.model, data, tokenizer, judge, reference)
