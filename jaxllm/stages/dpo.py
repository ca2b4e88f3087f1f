"""Preference optimization without a reward model: DPO and its variants, against a frozen reference.

The reference is the model that the run is initialized from. Its log-probs of the pairs are computed once and
cached, or with each batch.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from jaxllm.batches import PairBatch
from jaxllm.data.preferences import PreferenceConfig
from jaxllm.data.rows import Dataset
from jaxllm.errors import ConfigError
from jaxllm.evaluation.preference import dpo_metrics, score_pairs
from jaxllm.evaluation.reference import reference_log_probs
from jaxllm.evaluation.suite_hook import suite_hooks
from jaxllm.losses import Weighted, add_auxiliary, dpo_loss
from jaxllm.losses.dpo import check_dpo_options
from jaxllm.models import Model, Params, build_model
from jaxllm.models.lora import dropout_key
from jaxllm.rollout.score import next_token_log_probs
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import RunContext, RunInputs
from jaxllm.runs.hooks import evaluation_hooks
from jaxllm.runs.panels import Panel, panel
from jaxllm.runs.rows import row_source
from jaxllm.runs.sampling_weights import in_compute_dtype
from jaxllm.runs.stage import Headline
from jaxllm.runs.weights import initial_params as initial_params
from jaxllm.stages import reward_model
from jaxllm.stages.reward_model import LossAndMetrics, weighted_pairs
from jaxllm.training.loop import Hook
from jaxllm.training.state import merge_params
from jaxllm.training.step import LossFn

headline = Headline("eval/rewards/accuracies", highest=True)
generates = True
conversational = True
policy_prefix = ""
panels: tuple[Panel, ...] = (
    panel(
        "Preference accuracy",
        "fraction of pairs",
        "highest",
        training="rewards/accuracies",
        held_out="eval/rewards/accuracies",
    ),
    panel(
        "Reward margin",
        "implicit reward",
        "highest",
        training="rewards/margins",
        held_out="eval/rewards/margins",
    ),
    panel(
        "Held-out rewards",
        "implicit reward",
        chosen="eval/rewards/chosen",
        rejected="eval/rewards/rejected",
    ),
)
make_source = row_source
batch_shapes = reward_model.batch_shapes
tokenizer_text = reward_model.tokenizer_text


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    beta: float  # strength of the pull to the reference: a small one lets the policy move further
    variant: str  # sigmoid, robust, hinge, ipo, apo_zero or sppo
    label_smoothing: float  # assumed share of flipped labels (sigmoid, robust)
    length_normalized: bool  # ipo: log-probs a token instead of summed

    def __post_init__(self):
        if self.beta <= 0:
            raise ConfigError(f"objective.beta={self.beta} must be above 0")
        if self.length_normalized and self.variant != "ipo":
            raise ConfigError(f"objective.length_normalized is not supported in variant {self.variant!r}")
        try:
            check_dpo_options(self.variant, self.label_smoothing)
        except ValueError as error:
            raise ConfigError(f"objective.{error}") from None


@dataclass(frozen=True)
class ReferenceConfig(PreferenceConfig):
    """Pairs, and how the frozen reference scores them."""

    reference: str  # "cached": once before training; "on_the_fly": with each batch, which keeps two models

    def __post_init__(self):
        super().__post_init__()
        if self.reference not in ("cached", "on_the_fly"):
            raise ConfigError(f"data.reference={self.reference!r} must be 'cached' or 'on_the_fly'")


@dataclass(frozen=True)
class Config(TrainConfig):
    """A DPO run."""

    objective: ObjectiveConfig
    data: ReferenceConfig


def loss_fn(
    params: Params, batch: PairBatch, key: jax.Array, *, model: Model, **options: Any
) -> LossAndMetrics:
    """The variant's loss a pair; `options` are the fields of ObjectiveConfig. The reference's log-probs come
    with the batch."""
    dropout = dropout_key(model.config, key)
    log_probs, aux = completion_log_probs(params, batch, model=model, dropout_key=dropout)
    return add_auxiliary(*pair_loss(log_probs, batch, **options), aux)


def pair_loss(
    log_probs: jax.Array, batch: PairBatch, *, length_normalized: bool, **options: Any
) -> LossAndMetrics:
    """The loss of log_probs[B, 2] of the completions, whichever model gave them."""
    lengths = {}
    if length_normalized:
        tokens = batch.lengths - batch.prompt_lengths[:, None]
        lengths = {"chosen_length": tokens[:, 0], "rejected_length": tokens[:, 1]}
    sides = (log_probs[:, 0], log_probs[:, 1], batch.ref_log_probs[:, 0], batch.ref_log_probs[:, 1])
    return weighted_pairs(functools.partial(dpo_loss, **options), batch.weight, *sides, **lengths)


def completion_log_probs(
    params: Params, batch: PairBatch, *, model: Model, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Weighted]]:
    """Log-probs [B, 2] in nats of the completions given the prompt, end-of-turn token included; and the
    model's auxiliary losses. One function for policy and reference."""
    length = batch.tokens.shape[-1]
    tokens = batch.tokens.reshape(-1, length)
    scores = next_token_log_probs(params, tokens, model=model, dropout_key=dropout_key)
    positions = jnp.arange(length) + 1  # of the predicted tokens
    mask = (positions >= batch.prompt_lengths[:, None, None]) & (positions < batch.lengths[:, :, None])
    return jnp.where(mask, scores.log_probs.reshape(batch.tokens.shape), 0).sum(-1), scores.aux


@functools.partial(jax.jit, static_argnames="model")
def score_batch(params: Params, batch: PairBatch, *, model: Model) -> jax.Array:
    """`completion_log_probs` for reference and evaluation alike: compiled once, both are equal to the bit,
    given parameters of `in_compute_dtype`."""
    return completion_log_probs(params, batch, model=model)[0]


def build(config: Config) -> tuple[Model, LossFn]:
    """The model and the loss."""
    model = build_model(config.model)
    return model, functools.partial(loss_fn, model=model, **asdict(config.objective))


def load(inputs: RunInputs[Config, Model]) -> Dataset:
    """Pairs to train and to validate on, with the reference's log-probs."""
    program, initial = inputs.program, inputs.initial
    config = program.config
    if initial.parent is None:
        raise ConfigError("--init_from=RUN is missing: it initializes DPO's policy and is its reference")
    data = reward_model.load(inputs)
    score = functools.partial(score_batch, model=program.model)
    if config.data.reference == "on_the_fly":
        reference = inputs.reference()

        def complete(params: Params, batch: PairBatch) -> PairBatch:
            whole = in_compute_dtype(merge_params(reference, params), config.model)
            return batch._replace(ref_log_probs=score(whole, batch))

        return replace(data, complete=complete)
    sources = (*data.train, *data.validation)
    lengths = [
        len(rows) for rows in sources
    ]  # of distinct held-out rows, which the fingerprint does not tell
    identity = (initial.hash, data.fingerprint, config.model, config.data.sequence_length, lengths)
    key = xxhash.xxh3_128_hexdigest(repr(identity).encode())

    def make_score() -> Callable[[PairBatch], jax.Array]:
        params = initial.params(keep=not inputs.folder.resuming)
        return functools.partial(score, in_compute_dtype(params, config.model))

    cached = reference_log_probs(
        key,
        sources,
        make_score,
        batch_size=config.data.batch_size,
        sharding=program.batch_sharding,
        run_folder=inputs.folder.path,
    )
    parts = np.split(cached, np.cumsum(lengths)[:-1])
    filled = [replace(rows, ref_log_probs=part) for rows, part in zip(sources, parts, strict=True)]
    count = len(data.train)
    return replace(data, train=tuple(filled[:count]), validation=tuple(filled[count:]))


def make_hooks(context: RunContext[Config, Model]) -> list[Hook]:
    """Implicit rewards of the held-out pairs, and suites."""
    config = context.program.config
    score = functools.partial(score_batch, model=context.program.model)

    def evaluate(params: Params, pairs: Iterable[PairBatch]) -> dict[str, float]:
        params = in_compute_dtype(params, config.model)  # once, not for every batch
        return dpo_metrics(score_pairs(params, pairs, score, context.check), **asdict(config.objective))

    pairs = evaluation_hooks(context, evaluate)
    return [*pairs, *suite_hooks(context)]
