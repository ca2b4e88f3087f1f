"""Group-relative policy optimisation: prompts, groups of answers, rewards that can be checked."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.program import Program
from experiments.rl import (
    RewardConfig,
    Rollout,
    RolloutConfig,
    Rollouts,
    Scorer,
    check_steps,
    difference_metrics,
)
from experiments.run import Start, load_run_template, write_samples
from experiments.train_config import SampleConfig, TrainConfig
from jaxllm.batches import RolloutBatch
from jaxllm.data.prompts import PromptConfig, load_prompts, prompt_texts
from jaxllm.data.rows import Dataset
from jaxllm.data.show import show_mask
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError
from jaxllm.evaluation.preference import fraction
from jaxllm.losses import group_relative_advantages, leave_one_out_advantages
from jaxllm.models import Model, build_model
from jaxllm.objectives.grpo import loss_fn
from jaxllm.rollout.collect import collect
from jaxllm.training.feed import Feed
from jaxllm.training.loop import Hook
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState

OPTIONAL_PARAMETERS = ()


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss and of the advantages. See jaxllm.losses.grpo_loss."""

    variant: str  # grpo, dr_grpo, dapo, gspo or cispo
    clip_low: float
    clip_high: float
    kl_coefficient: float  # of the KL to the weights that the run begins with; 0 needs no second model
    kl_estimator: str  # k1, k2 or k3
    entropy_coefficient: float
    advantage: str  # "group": GRPO's, by advantage_scale; "leave_one_out": RLOO's
    advantage_scale: str  # group, batch or none
    advantage_epsilon: float

    def __post_init__(self):
        if self.advantage not in ("group", "leave_one_out"):
            raise ConfigError(f"objective.advantage={self.advantage!r}: choose group or leave_one_out")


@dataclass(frozen=True)
class Config(TrainConfig):
    """A GRPO run."""

    objective: ObjectiveConfig
    data: PromptConfig
    rollout: RolloutConfig
    reward: RewardConfig
    sample: SampleConfig

    def __post_init__(self):
        super().__post_init__()
        check_steps(self)
        if self.rollout.group_size < 2:
            raise ConfigError(
                f"rollout.group_size={self.rollout.group_size}: answers are compared with others to the same "
                f"prompt, make it 2 or more"
            )
        if self.data.batch_size != self.rollout.rows // self.rollout.minibatches:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be rollout.prompts x rollout.group_size / "
                f"rollout.minibatches = {self.rollout.rows // self.rollout.minibatches}"
            )


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
        kl_coefficient=knobs.kl_coefficient,
        kl_estimator=knobs.kl_estimator,
        entropy_coefficient=knobs.entropy_coefficient,
        max_length=config.rollout.sampling.max_new_tokens if knobs.variant == "dr_grpo" else None,
    )


def batch_shapes(config: Config) -> RolloutBatch:
    """Shape and dtype of every field of a batch."""
    rows, shape = config.data.batch_size, (config.data.batch_size, config.data.sequence_length)
    floats = jax.ShapeDtypeStruct(shape, np.float32)
    return RolloutBatch(
        tokens=jax.ShapeDtypeStruct(shape, np.int32),
        mask=jax.ShapeDtypeStruct(shape, bool),
        old_log_probs=floats,
        advantages=jax.ShapeDtypeStruct((rows,), np.float32),
        ref_log_probs=floats if config.objective.kl_coefficient else None,
    )


def tokenizer_text(config: Config) -> Iterator[str]:
    """What is asked."""
    return prompt_texts(config.data, seed=config.seed)


def load(program: Program, tokenizer: BaseTokenizer, folder: RunFolder, start: Start) -> Dataset:
    """Prompts to learn from and to be tested on."""
    config = program.config
    return load_prompts(
        config.data,
        tokenizer,
        load_run_template(config.data.template, tokenizer, folder, start),
        seed=config.seed,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        run_folder=folder.path,
    )


def make_feed(program: Program, data: Dataset, tokenizer: BaseTokenizer, start: Start) -> Feed:
    """Rollouts, and what their answers are worth."""
    config = program.config
    scorer = Scorer(program, program.model, config.data.batch_size)
    reference = start.params() if config.objective.kl_coefficient else None

    def worth(state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, dict[str, float]]:
        old_log_probs = scorer(state.params, rollout.tokens)
        batch = RolloutBatch(
            tokens=rollout.tokens,
            mask=rollout.mask,
            old_log_probs=old_log_probs,
            advantages=np.asarray(advantages(config, rollout)),
            ref_log_probs=None if reference is None else scorer(reference, rollout.tokens),
        )
        return batch, difference_metrics(rollout, old_log_probs)

    return Rollouts(program, data, tokenizer, config.reward.pool(), worth)


def advantages(config: Config, rollout: Rollout) -> jax.Array:
    """One a completion, float32 [N]."""
    knobs, size = config.objective, config.rollout.group_size
    if knobs.advantage == "leave_one_out":
        return leave_one_out_advantages(rollout.rewards, size)
    valid = rollout.mask.any(1)
    return group_relative_advantages(
        rollout.rewards, size, scale=knobs.advantage_scale, epsilon=knobs.advantage_epsilon, valid=valid
    )


def make_hooks(
    program: Program,
    data: Dataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
) -> list[Hook]:
    """pass@1 on the held-out prompts, one answer each, as the config samples."""
    if not data.validation:
        return []
    config = program.config
    prompts = [rows[i] for rows in data.validation for i in range(len(rows))]
    prompts = prompts[: config.evaluation.max_rows]
    shown = [show_mask(prompt.ids, [True] * len(prompt.ids), tokenizer) for prompt in prompts]

    def run(step: int, state: TrainState) -> dict[str, float]:
        said = collect(
            program.model,
            state.params,
            [prompt.ids for prompt in prompts],
            group_size=1,
            sampling=config.sample.sampling,
            stop_ids=data.template.stop_ids,
            keys=jax.random.split(jax.random.fold_in(state.key, step), len(prompts)),
            max_rows=config.rollout.max_rows,
            check=check,
        )
        texts = [tokenizer.decode(tokens, from_start=False) for tokens in said.tokens]
        with config.reward.pool() as pool:
            scores = pool.submit([prompt.row for prompt in prompts], texts).result(check)
        right = next(iter(scores.by_name.values())) == 1  # by the first reward
        rows = zip(shown, texts, scores.total, strict=True)
        write_samples(
            folder, step, [f"{prompt}\n{text}\nreward {reward:.3g}" for prompt, text, reward in rows][:50]
        )
        share, error = fraction(right)
        return {
            "eval/pass@1": share,
            "eval/pass@1_se": error,
            "eval/reward": float(scores.total.mean()),
            "eval/mean_length": float(np.mean([len(tokens) for tokens in said.tokens])),
            "eval/stopped_fraction": float(np.mean([reason == "stop" for reason in said.stop_reasons])),
        }

    return [Hook(config.training.evaluate_every, run)]
