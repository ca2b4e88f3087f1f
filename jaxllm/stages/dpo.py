"""Preference optimisation without a reward model: pairs, a frozen reference, implicit rewards."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from tqdm import tqdm

from jaxllm.runs import weights
from jaxllm.runs.program import Program
from jaxllm.runs.train import held_out_batches, row_source
from jaxllm.stages import reward_model
from jaxllm.runs.config import TrainConfig
from jaxllm.data.loader import device_batches, evaluation_batches
from jaxllm.data.preferences import PairRows, PreferenceConfig
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError
from jaxllm.evaluation.preference import dpo_metrics, score_pairs
from jaxllm.losses.dpo import check_dpo_options
from jaxllm.models import Model, build_model
from jaxllm.objectives.dpo import answer_log_probs, loss_fn
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Hook
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState

make_source = row_source
batch_shapes = reward_model.batch_shapes
tokenizer_text = reward_model.tokenizer_text
initial_params = weights.initial_params

# For reference and evaluation alike, so that it is compiled once, and both are equal to the bit.
score_batch = jax.jit(answer_log_probs, static_argnames="model")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Knobs of the loss."""

    beta: float  # how far the policy may go from the reference: small is far
    variant: str  # sigmoid, robust, hinge, ipo, apo_zero or sppo
    label_smoothing: float  # share of the choices taken for wrong (sigmoid, robust)
    length_normalized: bool  # ipo: log-probs a token instead of summed

    def __post_init__(self):
        if self.beta <= 0:
            raise ConfigError(f"objective.beta={self.beta} must be above 0")
        if self.length_normalized and self.variant != "ipo":
            raise ConfigError(f"objective.length_normalized has no meaning in variant {self.variant!r}")
        try:
            check_dpo_options(self.variant, self.label_smoothing)
        except ValueError as error:
            raise ConfigError(f"objective.{error}") from None


@dataclass(frozen=True)
class ReferenceConfig(PreferenceConfig):
    """Pairs, and how the frozen reference's log-probs of them are had."""

    reference: str  # "cached": computed once before training; "on_the_fly": with each batch, a model more
    cache_dir: str  # where they are kept between runs

    def __post_init__(self):
        super().__post_init__()
        if self.reference not in ("cached", "on_the_fly"):
            raise ConfigError(f"data.reference={self.reference!r} must be 'cached' or 'on_the_fly'")


@dataclass(frozen=True)
class Config(TrainConfig):
    """A DPO run."""

    objective: ObjectiveConfig
    data: ReferenceConfig


def build(config: Config) -> tuple[Model, Callable[..., Any]]:
    """The model and the loss."""
    model = build_model(config.model)
    return model, functools.partial(loss_fn, model=model, **asdict(config.objective))


def load(program: Program, tokenizer: BaseTokenizer, folder: RunFolder, start: weights.InitialWeights) -> Dataset:
    """Pairs to train and to validate on, with the log-probs of the weights that the run began with."""
    config = program.config
    if start.parent is None:
        raise ConfigError("--init_from=RUN is missing: DPO begins with its weights, and holds on to them")
    data = reward_model.load(program, tokenizer, folder, start)
    score = functools.partial(score_batch, model=program.model)
    if config.data.reference == "on_the_fly":
        params = start.params()
        return replace(data, complete=lambda batch: batch._replace(ref_log_probs=score(params, batch)))
    key = xxhash.xxh3_128_hexdigest(
        repr((start.hash, data.fingerprint, config.model, config.data.sequence_length)).encode()
    )
    file = Path(config.data.cache_dir).expanduser() / f"reference-{key}.npy"
    sources = (*data.train, *data.validation)
    if not file.exists():
        found = np.concatenate(reference_log_probs(program, sources, start.params(), score))
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{folder.id}.npy")
        np.save(temporary, found)
        temporary.replace(file)
    known = np.load(file, allow_pickle=False)
    ends = np.cumsum([len(rows) for rows in sources])
    parts = np.split(known, ends[:-1])
    filled = [replace(rows, ref_log_probs=part) for rows, part in zip(sources, parts, strict=True)]
    count = len(data.train)
    return replace(data, train=tuple(filled[:count]), validation=tuple(filled[count:]))


def reference_log_probs(
    program: Program, sources: tuple[PairRows, ...], params: Any, score: Callable[..., jax.Array]
) -> list[np.ndarray]:
    """Log-probs [pairs, 2] of every source under the reference."""
    print(f"scoring {sum(map(len, sources)):,} pairs with the reference, once ...", flush=True)
    found = []
    for rows in sources:
        batches = evaluation_batches([rows], batch_size=program.config.data.batch_size)
        placed = tqdm(
            device_batches(batches, program.batch_sharding),
            desc="reference log-probs",
            total=len(batches),
            disable=None,
        )
        parts = [np.asarray(score(params, batch)) for batch in placed]
        found.append(np.concatenate(parts)[: len(rows)])
    return found


def make_hooks(
    program: Program,
    data: Dataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
    feed: BatchSource,
) -> list[Hook]:
    """Implicit rewards of the held-out pairs."""
    if not data.validation:
        return []
    batches = held_out_batches(program.config, data.validation)
    score = functools.partial(score_batch, model=program.model)

    def run(step: int, state: TrainState) -> dict[str, float]:
        del step
        placed = map(data.complete, device_batches(batches, program.batch_sharding))
        found = score_pairs(state.params, placed, score, check)
        return dpo_metrics(found, **asdict(program.config.objective))

    return [Hook(program.config.training.evaluate_every, run)]
