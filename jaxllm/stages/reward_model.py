"""Reward model: pairs, Bradley-Terry, accuracy beside what lengths alone would say."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.runs import weights
from jaxllm.runs.program import Program
from jaxllm.runs.train import held_out_batches, load_run_template, row_source
from jaxllm.runs.config import TrainConfig
from jaxllm.batches import PairBatch
from jaxllm.data.loader import device_batches
from jaxllm.data.preferences import PreferenceConfig, load_preferences, preference_texts
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.evaluation.preference import reward_metrics, score_pairs
from jaxllm.models import ScalarModel, build_scalar_model
from jaxllm.objectives.reward_model import loss_fn
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Hook
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState

make_source = row_source
# A language model has the first, and lacks the second.
initial_params = functools.partial(weights.initial_params, optional=("head", "scalar_head"))


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    center_coefficient: float  # weight of (chosen + rejected)^2, which keeps rewards around 0


@dataclass(frozen=True)
class Config(TrainConfig):
    """A reward model's run."""

    objective: ObjectiveConfig
    data: PreferenceConfig


def build(config: Config) -> tuple[ScalarModel, Callable[..., Any]]:
    """The model and the loss."""
    model = build_scalar_model(config.model)
    return model, functools.partial(
        loss_fn, model=model, center_coefficient=config.objective.center_coefficient
    )


def batch_shapes(config: Any) -> PairBatch:
    """Shape and dtype of every field of a batch."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype)

    ints, floats = functools.partial(array, np.int32), functools.partial(array, np.float32)
    return PairBatch(ints(2, config.data.sequence_length), ints(), ints(2), floats(), floats(), floats(2))


def tokenizer_text(config: Config) -> Iterator[str]:
    """What is said in the pairs."""
    return preference_texts(config.data, seed=config.seed)


def load(program: Program, tokenizer: BaseTokenizer, folder: RunFolder, start: weights.InitialWeights) -> Dataset:
    """Pairs to train and to validate on."""
    config = program.config
    template = load_run_template(config.data.template, tokenizer, folder, start)
    return load_preferences(config.data, tokenizer, template, seed=config.seed, run_folder=folder.path)


def make_hooks(
    program: Program,
    data: Dataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
    feed: BatchSource,
) -> list[Hook]:
    """Accuracy on the held-out pairs."""
    if not data.validation:
        return []
    batches = held_out_batches(program.config, data.validation)
    rewards = program.model.rewards
    score = jax.jit(lambda params, batch: rewards(params, batch.tokens, batch.lengths))

    def run(step: int, state: TrainState) -> dict[str, float]:
        del step
        placed = device_batches(batches, program.batch_sharding)
        return reward_metrics(score_pairs(state.params, placed, score, check))

    return [Hook(program.config.training.evaluate_every, run)]
