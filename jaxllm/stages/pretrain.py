"""Pretraining: predict the next token of packed documents; measured in bits per byte of held-out text."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.batches import TokenBatch
from jaxllm.data.rows import Dataset
from jaxllm.data.text import TextConfig, load_text, text_documents
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.evaluation.perplexity import evaluate, row_sums
from jaxllm.evaluation.suite_hook import check_suites, suite_hooks
from jaxllm.losses import Weighted, add_auxiliary, linear_cross_entropy
from jaxllm.models import Model, Params, build_model
from jaxllm.models.lora import dropout_key
from jaxllm.parallel.processes import first_alone
from jaxllm.parallel.sequence import by_token
from jaxllm.runs.config import SampleConfig, TrainConfig
from jaxllm.runs.context import RunContext, RunInputs
from jaxllm.runs.hooks import complete, evaluation_hooks, write_samples
from jaxllm.runs.panels import LOSS, TOKEN_ACCURACY, Panel, panel
from jaxllm.runs.program import Program
from jaxllm.runs.rows import row_source
from jaxllm.runs.stage import Headline
from jaxllm.runs.weights import initial_params as initial_params
from jaxllm.training.loop import Hook
from jaxllm.training.state import TrainState
from jaxllm.training.step import LossFn

headline = Headline("eval/bits_per_byte", highest=False)
generates = True
conversational = False
policy_prefix = ""
panels: tuple[Panel, ...] = (
    LOSS,
    panel("Compression", "bits per byte", "lowest", held_out="eval/bits_per_byte"),
    TOKEN_ACCURACY,
)
make_source = row_source


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    z_loss: float  # weight of logsumexp(logits)^2


@dataclass(frozen=True)
class Config(TrainConfig):
    """A pretraining run."""

    objective: ObjectiveConfig
    data: TextConfig
    sample: SampleConfig


def loss_fn(
    params: Params, batch: TokenBatch, key: jax.Array, *, model: Model, z_loss: float
) -> tuple[Weighted, dict[str, Weighted]]:
    """Cross-entropy in nats a token."""
    output = model.apply(
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        dropout_key=dropout_key(model.config, key),
    )
    cross_entropy = functools.partial(linear_cross_entropy, z_loss=z_loss, softcap=model.config.logit_softcap)
    loss, metrics = by_token(cross_entropy, sums=True)(
        output.hidden, model.head(params), batch.targets, batch.mask
    )
    return add_auxiliary(loss, metrics, output.aux)


def build(config: Config) -> tuple[Model, LossFn]:
    """The model and the loss."""
    model = build_model(config.model)
    return model, functools.partial(loss_fn, model=model, z_loss=config.objective.z_loss)


def batch_shapes(config: TrainConfig) -> TokenBatch:
    """Shape and dtype of every field of a batch."""
    shape = (config.data.batch_size, config.data.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    return TokenBatch(ids, ids, jax.ShapeDtypeStruct(shape, bool), ids, ids)


def tokenizer_text(config: Config) -> Iterable[str]:
    """Documents to train a tokenizer on."""
    return text_documents(config.data, seed=config.seed)


def load(inputs: RunInputs[Config, Model]) -> Dataset:
    """Windows to train and to validate on."""
    config = inputs.program.config
    check_suites(config)
    with first_alone("tokenized text"):
        folder = inputs.bad_rows_folder
        return load_text(config.data, inputs.tokenizer, seed=config.seed, run_folder=folder)


def make_hooks(context: RunContext[Config, Model]) -> list[Hook]:
    """Continuations of the config's prompts, bits per byte of the held-out windows, and suites."""
    return [sampling_hook(context), *perplexity_hooks(context), *suite_hooks(context)]


def perplexity_hooks(context: RunContext[Any, Model]) -> list[Hook]:
    """Loss, bits per byte and accuracy on the held-out rows."""
    byte_lengths = model_byte_lengths(context.program, context.tokenizer)
    score = jax.jit(functools.partial(row_sums, byte_lengths=byte_lengths, model=context.program.model))
    return evaluation_hooks(context, lambda params, batches: evaluate(params, batches, score, context.check))


def model_byte_lengths(program: Program[Any, Model], tokenizer: BaseTokenizer) -> np.ndarray:
    """Int32 [V] of the model, whose vocabulary may be larger than the tokenizer's: bytes of each token."""
    byte_lengths = np.zeros(program.config.model.vocab_size, np.int32)
    byte_lengths[: tokenizer.vocab_size] = tokenizer.token_byte_lengths
    return byte_lengths


def sampling_hook(context: RunContext[Config, Model]) -> Hook:
    """Continue the config's prompts into `samples/STEP.txt` and onto the terminal."""
    config, tokenizer = context.program.config.sample, context.tokenizer
    prompts = [context.template.prompt([{"role": "user", "content": text}]) for text in config.prompts]

    def run(step: int, state: TrainState) -> dict[str, float]:
        completions = complete(context, prompts, step, state, config.sampling)
        texts = [tokenizer.decode(tokens, from_start=False) for tokens in completions.tokens]
        pairs = zip(config.prompts, texts, strict=True)
        write_samples(context.folder, step, [prompt + text for prompt, text in pairs])
        return {}

    return Hook(context.program.config.training.sample_every if prompts else 0, run)
