"""Instruction fine-tuning (SFT): predict the assistant's turns of conversations, packed into rows."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.batches import TokenBatch
from jaxllm.data.chat import ChatConfig, ChatDataset, chat_texts, load_chats
from jaxllm.data.show import show_mask
from jaxllm.errors import ConfigError
from jaxllm.evaluation.preference import fraction, numbered
from jaxllm.evaluation.suite_hook import check_suites, suite_hooks
from jaxllm.losses import Weighted, add_auxiliary, aggregate, linear_cross_entropy, linear_token_log_probs
from jaxllm.models import Model, Params, build_model
from jaxllm.models.lora import dropout_key
from jaxllm.parallel.sequence import by_token
from jaxllm.runs.config import SampleConfig, TrainConfig
from jaxllm.runs.context import RunContext, RunInputs
from jaxllm.runs.hooks import complete, write_samples
from jaxllm.runs.panels import LOSS, TOKEN_ACCURACY, Panel, panel
from jaxllm.runs.rows import row_source
from jaxllm.runs.stage import Headline
from jaxllm.runs.weights import initial_params as initial_params
from jaxllm.stages.pretrain import batch_shapes as batch_shapes
from jaxllm.stages.pretrain import perplexity_hooks
from jaxllm.training.loop import Hook
from jaxllm.training.state import TrainState
from jaxllm.training.step import LossFn

headline = Headline("eval/loss", highest=False)
generates = True
conversational = True
policy_prefix = ""
panels: tuple[Panel, ...] = (
    LOSS,
    panel("Completions that end with a stop token", "fraction", "highest", held_out="eval/stopped_fraction"),
    TOKEN_ACCURACY,
)
make_source = row_source


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    z_loss: float  # weight of logsumexp(logits)^2
    neftune_alpha: float  # noise in the embeddings, of at most alpha / sqrt(T D); 0: none
    dft: bool  # weight each token's loss by its probability

    def __post_init__(self):
        if self.dft and self.z_loss:
            raise ConfigError("objective.dft has no z_loss: set objective.z_loss=0")
        if self.neftune_alpha < 0:
            raise ConfigError(f"objective.neftune_alpha={self.neftune_alpha} must not be negative")


@dataclass(frozen=True)
class CompletionsConfig(SampleConfig):
    """Completions generated while training: of the prompts, and of held-out ones."""

    num_held_out: int  # held-out prompts to complete, for `eval/stopped_fraction`


@dataclass(frozen=True)
class Config(TrainConfig):
    """An instruction fine-tuning run."""

    objective: ObjectiveConfig
    data: ChatConfig
    sample: CompletionsConfig


def loss_fn(
    params: Params,
    batch: TokenBatch,
    key: jax.Array,
    *,
    model: Model,
    z_loss: float,
    neftune_alpha: float,
    dft: bool,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Cross-entropy in nats a token.

    neftune_alpha > 0 adds uniform noise to the embeddings, of at most alpha / sqrt(T D) (NEFTune, Jain et al.
    2023, arXiv:2310.05914, where T is the length of the text; here it is that of the row). `dft` weights each
    token's loss by its own probability, a constant (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629):
    tokens that the model finds very unlikely contribute less. The metric `loss` is without that weight.
    """
    noise = None
    if neftune_alpha > 0:
        shape = (*batch.tokens.shape, model.config.width)
        noise = jax.random.uniform(key, shape, minval=-1) * neftune_alpha / (shape[1] * shape[2]) ** 0.5
    output = model.apply(
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        noise=noise,
        dropout_key=dropout_key(model.config, key),
    )
    hidden, head, softcap = output.hidden, model.head(params), model.config.logit_softcap
    if dft:
        scores = functools.partial(linear_token_log_probs, softcap=softcap)
        log_probs, _ = by_token(scores, sums=False)(hidden, head, batch.targets)
        weights = jax.lax.stop_gradient(jnp.exp(log_probs))
        loss = aggregate(-weights * log_probs, batch.mask, "token_mean")
        metrics = {"loss": aggregate(-log_probs, batch.mask, "token_mean"), "dft_loss": loss}
        metrics = jax.lax.stop_gradient(metrics)
    else:
        cross_entropy = functools.partial(linear_cross_entropy, z_loss=z_loss, softcap=softcap)
        loss, metrics = by_token(cross_entropy, sums=True)(hidden, head, batch.targets, batch.mask)
    return add_auxiliary(loss, metrics, output.aux)


def build(config: Config) -> tuple[Model, LossFn]:
    """The model and the loss."""
    model, knobs = build_model(config.model), config.objective
    return model, functools.partial(
        loss_fn, model=model, z_loss=knobs.z_loss, neftune_alpha=knobs.neftune_alpha, dft=knobs.dft
    )


def tokenizer_text(config: Config) -> Iterator[str]:
    """The texts of the conversations."""
    return chat_texts(config.data, seed=config.seed)


def load(inputs: RunInputs[Config, Model]) -> ChatDataset:
    """Conversations to train and to validate on."""
    config, folder = inputs.program.config, inputs.bad_rows_folder
    check_suites(config)
    return load_chats(config.data, inputs.tokenizer, inputs.template, seed=config.seed, run_folder=folder)


def make_hooks(context: RunContext[Config, Model]) -> list[Hook]:
    """Completions, the loss of the held-out rows, and suites."""
    return [completions_hook(context), *perplexity_hooks(context), *suite_hooks(context)]


def completions_hook(context: RunContext[Config, Model]) -> Hook:
    """Complete the config's prompts and some held-out ones into `samples/STEP.txt`, and log how many
    completions of held-out prompts end with a stop token."""
    config, longest = context.program.config.sample, context.program.config.model.max_length - 1
    template, tokenizer, data = context.template, context.tokenizer, context.data
    assert isinstance(data, ChatDataset)
    prompts = [template.prompt([{"role": "user", "content": prompt}]) for prompt in config.prompts]
    references = [""] * len(prompts)
    conversations = (each for each in data.held_out if len(each[0]) < longest)
    fitting = list(itertools.islice(conversations, config.num_held_out))
    held_out = [prompt for prompt, _ in fitting]
    for prompt, answer in fitting:
        prompts.append(prompt)
        references.append(f"\n(held out; the data's own completion: {tokenizer.decode(answer).strip()})")
    shown = [show_mask(prompt, [True] * len(prompt), tokenizer) for prompt in prompts]  # roles by name

    def run(step: int, state: TrainState) -> dict[str, float]:
        completions = complete(context, prompts, step, state, config.sampling)
        texts = [tokenizer.decode(tokens).strip() for tokens in completions.tokens]
        rows = zip(shown, texts, references, strict=True)
        samples = [f"{prompt}\n{text}{reference}" for prompt, text, reference in rows]
        write_samples(context.folder, step, samples)
        if not config.num_held_out:
            return {}
        stopped = np.array([reason == "stop" for reason in completions.stop_reasons])
        share, error = fraction(stopped[len(config.prompts) :], numbered(map(tuple, held_out)))
        return {"eval/stopped_fraction": share, "eval/stopped_fraction_se": error}

    return Hook(context.program.config.training.sample_every if prompts else 0, run)
