"""Instruction fine-tuning: conversations, packed rows, loss and accuracy, answers to prompts."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.runs import weights
from jaxllm.runs.program import Program
from jaxllm.runs.train import load_run_template, row_source, write_samples
from jaxllm.stages import pretrain
from jaxllm.runs.config import SampleConfig, TrainConfig
from jaxllm.data.chat import ChatConfig, ChatDataset, chat_texts, load_chats
from jaxllm.data.show import show_mask
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError
from jaxllm.evaluation.preference import fraction
from jaxllm.models import Model, build_model
from jaxllm.objectives.sft import loss_fn
from jaxllm.rollout.generate import generate
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Hook
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState

make_source = row_source
batch_shapes = pretrain.batch_shapes
initial_params = weights.initial_params


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    z_loss: float  # weight of logsumexp(logits)^2
    neftune_alpha: float  # noise in the embeddings, of at most alpha / sqrt(T D); 0: none
    dft: bool  # weigh each token's loss by its probability

    def __post_init__(self):
        if self.dft and self.z_loss:
            raise ConfigError("objective.dft has no z_loss: set objective.z_loss=0")
        if self.neftune_alpha < 0:
            raise ConfigError(f"objective.neftune_alpha={self.neftune_alpha} must not be negative")


@dataclass(frozen=True)
class AnswersConfig(SampleConfig):
    """Answers written while training: to the prompts, and to held-out ones."""

    num_held_out: int  # how many held-out prompts to answer, for `eval/stopped_fraction`


@dataclass(frozen=True)
class Config(TrainConfig):
    """An instruction fine-tuning run."""

    objective: ObjectiveConfig
    data: ChatConfig
    sample: AnswersConfig


def build(config: Config) -> tuple[Model, Callable[..., Any]]:
    """The model and the loss."""
    model, knobs = build_model(config.model), config.objective
    return model, functools.partial(
        loss_fn, model=model, z_loss=knobs.z_loss, neftune_alpha=knobs.neftune_alpha, dft=knobs.dft
    )


def tokenizer_text(config: Config) -> Iterator[str]:
    """What is said in the conversations."""
    return chat_texts(config.data, seed=config.seed)


def load(program: Program, tokenizer: BaseTokenizer, folder: RunFolder, start: weights.InitialWeights) -> ChatDataset:
    """Conversations to train and to validate on."""
    config = program.config
    template = load_run_template(config.data.template, tokenizer, folder, start)
    return load_chats(config.data, tokenizer, template, seed=config.seed, run_folder=folder.path)


def make_hooks(
    program: Program,
    data: ChatDataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
    feed: BatchSource,
) -> list[Hook]:
    """Answers, and the loss of the held-out rows."""
    hooks = [make_answering(program, data, tokenizer, folder, check)]
    if data.validation:
        hooks.append(pretrain.make_evaluation(program, data.validation, tokenizer, check))
    return hooks


def make_answering(
    program: Program,
    data: ChatDataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
) -> Hook:
    """Answer the config's prompts and some held-out ones into `samples/STEP.txt`; how many answers end."""
    config, longest = program.config.sample, program.config.model.max_length - 1
    template = data.template
    prompts = [template.prompt([{"role": "user", "content": prompt}]) for prompt in config.prompts]
    references = [""] * len(prompts)
    fitting = [(prompt, answer) for prompt, answer in data.held_out if len(prompt) < longest]
    for prompt, answer in fitting[: config.num_held_out]:
        prompts.append(prompt)
        references.append(f"\n(held out; the answer given there: {tokenizer.decode(answer).strip()})")
    shown = [show_mask(prompt, [True] * len(prompt), tokenizer) for prompt in prompts]  # roles by name

    def run(step: int, state: TrainState) -> dict[str, float]:
        keys = jax.random.split(jax.random.fold_in(state.key, step), len(prompts))
        texts, stopped = [], []
        for first in range(0, len(prompts), 64):
            check()
            part = slice(first, first + 64)
            said = generate(
                program.model,
                state.params,
                prompts[part],
                sampling=config.sampling,
                stop_ids=template.stop_ids,
                keys=keys[part],
            )
            texts += [tokenizer.decode(tokens).strip() for tokens in said.tokens]
            stopped += [reason == "stop" for reason in said.stop_reasons]
        rows = zip(shown, texts, references, strict=True)
        write_samples(folder, step, [f"{prompt}\n{text}{reference}" for prompt, text, reference in rows])
        share, error = fraction(np.array(stopped)[len(config.prompts) :])
        return {"eval/stopped_fraction": share, "eval/stopped_fraction_se": error} if config.num_held_out else {}

    return Hook(program.config.training.sample_every if prompts else 0, run)
