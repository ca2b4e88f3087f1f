"""What PPO and GRPO both read: prompts, shapes of batches, and the rewards that the config names."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxllm.batches import RolloutBatch
from jaxllm.data.prompts import load_prompts, prompt_texts
from jaxllm.data.rows import Dataset
from jaxllm.evaluation.suite_hook import check_suites
from jaxllm.rewards.reward_model import RewardModel, check_reward_model
from jaxllm.rewards.scorer import RewardScorer
from jaxllm.rl.config import RolloutTrainConfig
from jaxllm.runs.context import RunInputs


def load(inputs: RunInputs[Any, Any]) -> Dataset:
    """Prompts to train on and to evaluate on."""
    config = inputs.program.config
    check_suites(config)
    if config.reward.model is not None:  # before anything is read
        check_reward_model(config.reward.model)
    return load_prompts(
        config.data,
        inputs.tokenizer,
        inputs.template,
        seed=config.seed,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        run_folder=inputs.bad_rows_folder,
    )


def tokenizer_text(config: RolloutTrainConfig) -> Iterator[str]:
    """The texts of the prompts."""
    return prompt_texts(config.data, seed=config.seed)


def batch_shapes(config: RolloutTrainConfig) -> RolloutBatch:
    """Shape and dtype of the fields that every batch of rollouts has."""
    shape = (config.data.batch_size, config.data.sequence_length)
    floats = jax.ShapeDtypeStruct(shape, np.float32)
    return RolloutBatch(
        tokens=jax.ShapeDtypeStruct(shape, np.int32),
        mask=jax.ShapeDtypeStruct(shape, bool),
        old_log_probs=floats,
        advantages=floats,
        importance_weights=floats if config.rollout.importance_sampling else None,
    )


def make_scorer(inputs: RunInputs[Any, Any]) -> RewardScorer:
    """All rewards of a run. Its processes start here; whoever holds it closes it."""
    program, model = inputs.program, None
    config = program.config.reward
    if config.model is not None:
        model = RewardModel(
            config.model,
            inputs.tokenizer,
            inputs.template,
            normalize=config.normalize,
            rows=program.microbatch_rows,
            length=program.config.data.sequence_length,
            mesh=program.mesh,
        )
    return RewardScorer(config, model)
