"""Group-relative policy optimization (GRPO): reinforce the better completions of each prompt's group.

A group of completions is sampled for each prompt and rewarded, often by a check of the answer; a completion's
advantage is its reward relative to its group. Variants of the loss (DAPO, Dr. GRPO, GSPO, CISPO) and of the
advantages (RLOO, REINFORCE++) are fields of the config. Deviations from the papers: docs/algorithms.md.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.batches import RolloutBatch
from jaxllm.data.rows import Dataset
from jaxllm.errors import ConfigError
from jaxllm.losses import (
    Weighted,
    add_auxiliary,
    discounted_returns,
    group_relative_advantages,
    grpo_loss,
    leave_one_out_advantages,
    token_rewards,
    whiten,
)
from jaxllm.losses.advantages import SCALES
from jaxllm.losses.aggregate import row_weights
from jaxllm.losses.grpo import MODES
from jaxllm.models import Model, Params, build_model
from jaxllm.rl import hooks, inputs
from jaxllm.rl.config import RolloutConfig, RolloutTrainConfig
from jaxllm.rl.log_probs import LogProbs, kl_metrics, log_probs_in_step
from jaxllm.rl.rollouts import Metrics, Rollout, RolloutSource, has_signal
from jaxllm.rollout.score import next_token_log_probs
from jaxllm.runs.context import RunInputs
from jaxllm.runs.panels import COMPLETION_LENGTH, KL, REWARD, Panel, panel
from jaxllm.runs.program import Program
from jaxllm.runs.stage import Headline
from jaxllm.runs.weights import initial_params as initial_params
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.state import TrainState
from jaxllm.training.step import LossFn

headline = Headline("eval/sampled_pass@1", highest=True)
generates = True
conversational = True
policy_prefix = ""
panels: tuple[Panel, ...] = (
    panel(
        "Held-out pass@1",
        "fraction of problems",
        "highest",
        greedy="eval/pass@1",
        sampled="eval/sampled_pass@1",
    ),
    REWARD,
    COMPLETION_LENGTH,
    KL,
)
load = inputs.load
tokenizer_text = inputs.tokenizer_text
make_hooks = hooks.make_hooks

ADVANTAGES = ("group", "leave_one_out", "reinforce_plus_plus")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss and of the advantages. See jaxllm.losses.grpo_loss."""

    variant: str  # grpo, dr_grpo, dapo, gspo or cispo
    clip_low: float
    clip_high: float
    kl_coefficient: float  # of the KL to the reference, the initial weights; 0 needs no second model
    kl_in: str  # "loss", by kl_estimator; or "reward": k1, subtracted before advantages are computed
    kl_estimator: str  # k2 or k3; k1 has a gradient of 0 on average
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
        if self.kl_coefficient < 0:
            raise ConfigError(f"objective.kl_coefficient={self.kl_coefficient} must not be negative")
        if self.kl_coefficient and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ConfigError(
                "objective.kl_estimator=k1 in the loss has a gradient of 0 on average, and so no effect: use "
                "k3 or k2, or objective.kl_in=reward"
            )


@dataclass(frozen=True)
class Config(RolloutTrainConfig):
    """A GRPO run."""

    objective: ObjectiveConfig

    def __post_init__(self):
        if self.rollout.group_size < 2 and self.objective.advantage != "reinforce_plus_plus":
            raise ConfigError(
                f"rollout.group_size={self.rollout.group_size}: a group must have other completions to "
                f"compare with: use 2 or more (or objective.advantage=reinforce_plus_plus)"
            )
        super().__post_init__()


def loss_fn(
    params: Params,
    batch: RolloutBatch,
    key: jax.Array,
    *,
    model: Model,
    rollout: RolloutConfig,
    entropy_coefficient: float,
    **options: Any,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The loss of `grpo_loss` with these options; metrics `policy/NAME`, and those of `log_probs_in_step`."""
    del key  # nothing here is random
    scores = next_token_log_probs(
        params,
        batch.tokens,
        model=model,
        temperature=rollout.sampling.temperature,
        counted=(batch.mask, rollout.sampling.max_new_tokens),
        entropy_gradient=entropy_coefficient != 0,
    )
    old, weights, metrics = batch.old_log_probs, batch.importance_weights, {}
    if batch.sampler_log_probs is not None:
        old, weights, metrics = log_probs_in_step(scores.log_probs, batch, rollout)
    assert old is not None
    loss, of_policy = grpo_loss(
        scores.log_probs,
        old,
        batch.advantages,
        batch.mask,
        ref_log_probs=batch.ref_log_probs,
        importance_weights=weights,
        entropy=scores.entropy,
        entropy_coefficient=entropy_coefficient,
        **options,
    )
    if batch.extra_weight is not None:
        loss = loss._replace(weight=loss.weight + batch.extra_weight.sum())
    metrics |= {f"policy/{name}": value for name, value in of_policy.items()} | {"loss": loss}
    return add_auxiliary(loss, metrics, scores.aux)


def build(config: Config) -> tuple[Model, LossFn]:
    """The model and the loss."""
    model, knobs = build_model(config.model), config.objective
    return model, functools.partial(
        loss_fn,
        model=model,
        rollout=config.rollout,
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
    batch, knobs = inputs.batch_shapes(config), config.objective
    if knobs.advantage != "reinforce_plus_plus":  # one a completion
        batch = batch._replace(advantages=batch.advantages.update(shape=(config.data.batch_size,)))
    if knobs.kl_coefficient and knobs.kl_in == "loss":
        batch = batch._replace(ref_log_probs=batch.old_log_probs)
    if leaves_out_rows(config):
        batch = batch._replace(extra_weight=batch.advantages)
    if is_trained_on_once(config):
        old = batch.old_log_probs
        batch = batch._replace(sampler_log_probs=old, old_log_probs=None, importance_weights=None)
    return batch


def is_trained_on_once(config: Config) -> bool:
    """Whether a rollout has one update, so that the log-probs of the policy before it are those of the train
    step itself; and nothing needs them earlier."""
    knobs = config.objective
    return config.rollout.steps == 1 and not (knobs.kl_coefficient and knobs.kl_in == "reward")


def leaves_out_rows(config: Config) -> bool:
    """Whether a group of equal rewards, whose advantages are 0, has no gradient; and there are micro-batches
    to do without."""
    knobs = config.objective
    return (
        not knobs.kl_coefficient
        and not knobs.entropy_coefficient
        and knobs.advantage != "reinforce_plus_plus"
        and config.training.num_microbatches > 1
    )


class GRPO:
    """The algorithm: a completion's advantage is its reward relative to its group."""

    def __init__(self, program: Program[Config, Model], reference: Params | None):
        """`reference` is as in `LogProbs`; None where objective.kl_coefficient is 0."""
        self.config = program.config
        self.log_probs = LogProbs(program, program.model, reference)

    def policy(self, params: Params) -> Params:
        return params

    def metadata(self) -> dict[str, Any]:
        return {}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        pass

    def weights_without_gradient(self, rollout: Rollout) -> np.ndarray | None:
        if not leaves_out_rows(self.config):
            return None
        mode, longest = MODES[self.config.objective.variant], self.config.rollout.sampling.max_new_tokens
        weights = np.asarray(row_weights(rollout.mask, mode, max_length=longest), np.float32)
        size = self.config.rollout.group_size
        return np.where(np.repeat(has_signal(rollout, size), size), np.nan, weights)

    def make_batch(self, state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, Metrics]:
        """Advantages; log-probs and KL before the first update, unless the step makes them."""
        step, scorer = int(state.step), self.log_probs
        kl = np.zeros(rollout.mask.shape, np.float32)
        batch, row = RolloutBatch(rollout.tokens, rollout.mask, None, None), {}
        if is_trained_on_once(self.config):
            batch = batch._replace(sampler_log_probs=rollout.sampler_log_probs)
            if scorer.reference is not None:
                batch = batch._replace(ref_log_probs=scorer.of_reference(state.params, rollout))
        else:
            old, row = scorer.old(state.params, rollout, step)
            batch = batch._replace(
                old_log_probs=old, importance_weights=scorer.importance_weights(old, rollout)
            )
            if scorer.reference is not None:
                ref_log_probs, kl = scorer.kl(state.params, old, rollout, step)
                row |= kl_metrics(kl, rollout.mask)
                if self.config.objective.kl_in == "loss":
                    batch = batch._replace(ref_log_probs=ref_log_probs)
        return batch._replace(advantages=np.asarray(advantages(self.config, rollout, kl))), row


def advantages(config: Config, rollout: Rollout, kl: np.ndarray) -> Any:
    """One a completion, float32 [N]; or one a token, [N, T], for REINFORCE++ (Hu 2025, arXiv:2501.03262)."""
    knobs, size = config.objective, config.rollout.group_size
    coefficient = knobs.kl_coefficient if knobs.kl_in == "reward" else 0.0
    if knobs.advantage == "reinforce_plus_plus":
        rewards = token_rewards(rollout.rewards, kl, rollout.mask, kl_coefficient=coefficient)
        return whiten(discounted_returns(rewards, rollout.mask, discount=1.0), rollout.mask)
    rewards = rollout.rewards - coefficient * kl.sum(1)
    if knobs.advantage == "leave_one_out":
        return leave_one_out_advantages(rewards, size, valid=rollout.valid)
    return group_relative_advantages(
        rewards, size, scale=knobs.advantage_scale, epsilon=knobs.advantage_epsilon, valid=rollout.valid
    )


def make_source(run: RunInputs[Config, Model], data: Dataset) -> BatchSource:
    """Rollouts, rewarded by what the config names."""
    program = run.program
    scorer = inputs.make_scorer(run)
    reference = run.reference() if program.config.objective.kl_coefficient else None
    algorithm = GRPO(program, reference)
    return RolloutSource(run, data, policy=program.model, scorer=scorer, algorithm=algorithm)
