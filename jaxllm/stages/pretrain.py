"""Pretraining: text, windows, bits per byte, continuations."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.runs import weights
from jaxllm.runs.program import Program
from jaxllm.runs.train import held_out_batches, row_source, write_samples
from jaxllm.runs.config import SampleConfig, TrainConfig
from jaxllm.batches import TokenBatch
from jaxllm.data.loader import device_batches
from jaxllm.data.rows import Dataset
from jaxllm.data.text import TextConfig, load_text, text_documents
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.evaluation.perplexity import evaluate, row_sums
from jaxllm.models import Model, build_model
from jaxllm.objectives.pretrain import loss_fn
from jaxllm.rollout.generate import generate
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Hook
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState

make_source = row_source
initial_params = weights.initial_params


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


def build(config: Config) -> tuple[Model, Callable[..., Any]]:
    """The model and the loss."""
    model = build_model(config.model)
    return model, functools.partial(loss_fn, model=model, z_loss=config.objective.z_loss)


def batch_shapes(config: Any) -> TokenBatch:
    """Shape and dtype of every field of a batch."""
    shape = (config.data.batch_size, config.data.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    return TokenBatch(ids, ids, jax.ShapeDtypeStruct(shape, bool), ids, ids)


def tokenizer_text(config: Config) -> Any:
    """Documents to train a tokenizer on."""
    return text_documents(config.data, seed=config.seed)


def load(program: Program, tokenizer: BaseTokenizer, folder: RunFolder, start: weights.InitialWeights) -> Dataset:
    """Windows to train and to validate on."""
    return load_text(program.config.data, tokenizer, seed=program.config.seed, run_folder=folder.path)


def make_hooks(
    program: Program,
    data: Dataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
    feed: BatchSource,
) -> list[Hook]:
    """Samples, and bits per byte of the held-out windows."""
    hooks = [make_sampling(program, tokenizer, folder)]
    if data.validation:
        hooks.append(make_evaluation(program, data.validation, tokenizer, check))
    return hooks


def make_evaluation(
    program: Program, validation: Any, tokenizer: BaseTokenizer, check: Callable[[], None]
) -> Hook:
    """Score the held-out rows."""
    byte_lengths = model_byte_lengths(program, tokenizer)
    score = jax.jit(functools.partial(row_sums, byte_lengths=byte_lengths, model=program.model))
    batches = held_out_batches(program.config, validation)

    def run(step: int, state: TrainState) -> dict[str, float]:
        del step
        return evaluate(state.params, device_batches(batches, program.batch_sharding), score, check)

    return Hook(program.config.training.evaluate_every, run)


def model_byte_lengths(program: Program, tokenizer: BaseTokenizer) -> np.ndarray:
    """Int32 [V] of the model, whose vocabulary may be larger than the tokenizer's: bytes of each token."""
    byte_lengths = np.zeros(program.config.model.vocab_size, np.int32)
    byte_lengths[: tokenizer.vocab_size] = tokenizer.token_byte_lengths
    return byte_lengths


def make_sampling(program: Program, tokenizer: BaseTokenizer, folder: RunFolder) -> Hook:
    """Continue the config's prompts into `samples/STEP.txt` and onto the terminal."""
    config = program.config.sample
    every = program.config.training.sample_every if config.prompts else 0
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]

    def run(step: int, state: TrainState) -> dict[str, float]:
        said = generate(
            program.model,
            state.params,
            prompts,
            sampling=config.sampling,
            stop_ids=(tokenizer.eos_id,),
            keys=jax.random.split(jax.random.fold_in(state.key, step), len(prompts)),
        )
        continuations = (tokenizer.decode(tokens, from_start=False) for tokens in said.tokens)
        write_samples(folder, step, [p + text for p, text in zip(config.prompts, continuations, strict=True)])
        return {}

    return Hook(every, run)
