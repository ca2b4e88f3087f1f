"""Reward model: give the preferred of two completions the higher reward (Bradley-Terry).

Its accuracy on held-out pairs is logged beside that of choosing the longer completion.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.batches import PairBatch
from jaxllm.data.preferences import PreferenceConfig, load_preferences, preference_texts
from jaxllm.data.rows import Dataset
from jaxllm.errors import ConfigError
from jaxllm.evaluation.preference import reward_metrics, score_pairs
from jaxllm.evaluation.suite_hook import check_suites
from jaxllm.losses import Weighted, add_auxiliary, bradley_terry_loss
from jaxllm.models import Params, ScalarModel, build_scalar_model
from jaxllm.models.lora import dropout_key
from jaxllm.runs import weights
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import RunContext, RunInputs
from jaxllm.runs.hooks import evaluation_hooks
from jaxllm.runs.panels import Panel, panel
from jaxllm.runs.rows import row_source
from jaxllm.runs.stage import Headline
from jaxllm.training.loop import Hook
from jaxllm.training.step import LossFn

headline = Headline("eval/accuracy", highest=True)
generates = False
conversational = True
policy_prefix = ""
panels: tuple[Panel, ...] = (
    panel(
        "Preference accuracy",
        "fraction of pairs",
        "highest",
        training="train/accuracy",
        held_out="eval/accuracy",
    ),
    panel("Reward margin", "reward", "highest", training="train/margin", held_out="eval/margin"),
    panel("Loss", "nats per pair", "lowest", training="train/loss", held_out="eval/loss"),
)
make_source = row_source
# A language model has the first, and lacks the second.
initial_params = functools.partial(weights.initial_params, optional=("head", "scalar_head"))

LossAndMetrics = tuple[Weighted, dict[str, Weighted]]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    center_coefficient: float  # weight of (chosen + rejected)^2, which keeps rewards around 0


@dataclass(frozen=True)
class Config(TrainConfig):
    """A reward model's run."""

    objective: ObjectiveConfig
    data: PreferenceConfig

    def __post_init__(self):
        super().__post_init__()
        if self.evaluation.suites:
            raise ConfigError(
                "evaluation.suites is not supported: a reward model cannot generate; set it to ()"
            )

    @property
    def last_block(self) -> float:
        """One token a row, which is as good as none."""
        return 0.0


def loss_fn(
    params: Params, batch: PairBatch, key: jax.Array, *, model: ScalarModel, center_coefficient: float
) -> LossAndMetrics:
    """Bradley-Terry with margins, in nats a pair."""
    dropout = dropout_key(model.config, key)
    rewards, aux = model.rewards(params, batch.tokens, batch.lengths, dropout_key=dropout)
    loss = functools.partial(bradley_terry_loss, center_coefficient=center_coefficient)
    weighted = weighted_pairs(loss, batch.weight, rewards[:, 0], rewards[:, 1], margin=batch.margin)
    return add_auxiliary(*weighted, aux)


def weighted_pairs(
    loss: Callable[..., LossAndMetrics], weight: jax.Array, *args: jax.Array, **kwargs: jax.Array
) -> LossAndMetrics:
    """A loss over pairs, and its metrics, with weight[B] for each: weighted sums of what it gives a pair."""
    pairs = jax.tree.map(lambda x: x[:, None], (args, kwargs))
    each = jax.vmap(lambda args, kwargs: loss(*args, **kwargs))(*pairs)
    return jax.tree.map(lambda x: jnp.sum(x * weight), each)


def build(config: Config) -> tuple[ScalarModel, LossFn]:
    """The model and the loss."""
    model = build_scalar_model(config.model)
    return model, functools.partial(
        loss_fn, model=model, center_coefficient=config.objective.center_coefficient
    )


def batch_shapes(config: TrainConfig) -> PairBatch:
    """Shape and dtype of every field of a batch."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype)

    ints, floats = functools.partial(array, np.int32), functools.partial(array, np.float32)
    return PairBatch(ints(2, config.data.sequence_length), ints(), ints(2), floats(), floats(), floats(2))


def tokenizer_text(config: Any) -> Iterator[str]:
    """The texts of the pairs."""
    return preference_texts(config.data, seed=config.seed)


def load(inputs: RunInputs[Any, Any]) -> Dataset:
    """Pairs to train and to validate on."""
    config, folder = inputs.program.config, inputs.bad_rows_folder
    check_suites(config)
    return load_preferences(
        config.data, inputs.tokenizer, inputs.template, seed=config.seed, run_folder=folder
    )


def make_hooks(context: RunContext[Config, ScalarModel]) -> list[Hook]:
    """Accuracy on the held-out pairs."""
    model = context.program.model

    @jax.jit
    def score(params: Params, batch: PairBatch) -> jax.Array:
        return model.rewards(params, batch.tokens, batch.lengths).values

    return evaluation_hooks(
        context, lambda params, pairs: reward_metrics(score_pairs(params, pairs, score, context.check))
    )
