"""Evaluation and samples while training: what the hooks of all stages are made of."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.data.loader import device_batches, evaluation_batches
from jaxllm.data.show import printable
from jaxllm.files import write_text
from jaxllm.models import Model, Params
from jaxllm.parallel.global_arrays import share
from jaxllm.parallel.processes import is_first
from jaxllm.random_streams import SAMPLES, stream
from jaxllm.rollout.collect import Completions, gather_completions
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import RunContext
from jaxllm.runs.sampling_weights import SamplingWeights
from jaxllm.store import url_of
from jaxllm.training.loop import Hook
from jaxllm.training.metrics import Metrics
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import leave_together

SAMPLE_BATCH = 64  # prompts decoded at a time


def held_out_batches(config: TrainConfig, validation: Sequence[Any], own: np.ndarray | None = None) -> Any:
    """The batches to evaluate on, on the host: as many as evaluation.max_rows allows, of every source
    that evaluation.num_sources allows. `own`: of each batch only these rows."""
    rows, size = config.evaluation.max_rows, config.data.batch_size
    return evaluation_batches(
        validation[: config.evaluation.num_sources],
        batch_size=size,
        max_rows=None if rows is None else max(1, rows // size) * size,
        own=own,
    )


def evaluation_hooks(
    context: RunContext[Any, Any], measure: Callable[[Params, Iterator[Any]], Metrics]
) -> list[Hook]:
    """The hook that evaluates the parameters on the held-out batches, sharded; none where there are none."""
    config, data, program = context.program.config, context.data, context.program
    if not data.validation:
        return []
    batches = held_out_batches(config, data.validation, program.own_rows)

    def run(step: int, state: TrainState) -> Metrics:
        del step
        placed = device_batches(batches, program.batch_sharding, batch_size=config.data.batch_size)
        return measure(state.params, (data.complete(state.params, batch) for batch in placed))

    return [Hook(config.training.evaluate_every, run)]


def complete(
    context: RunContext[Any, Model],
    prompts: Sequence[Sequence[int]],
    step: int,
    state: TrainState,
    sampling: SamplingConfig,
) -> Completions:
    """A completion of each prompt, with keys that are the run's and the step's. Leaves after a signal."""
    weights = SamplingWeights(state.params, context.program.mesh, dtype=None, replicate=False)
    keys = jax.random.split(stream(state.key, SAMPLES, step), len(prompts))
    own = share(len(prompts)) if weights.alone else slice(0, len(prompts))
    check = context.own_check if weights.alone else context.check
    prompts = prompts[own]

    def sample() -> Completions:
        parts = []
        for first in range(0, len(prompts), SAMPLE_BATCH):
            check()
            rows = slice(first, first + SAMPLE_BATCH)
            part = generate(
                context.program.model,
                params,
                prompts[rows],
                sampling=sampling,
                stop_ids=context.template.stop_ids,
                keys=keys[rows],
                vocab_size=context.tokenizer.vocab_size,
            )
            parts.append(part)
        return Completions(
            tokens=[tokens for part in parts for tokens in part.tokens],
            log_probs=[log_probs for part in parts for log_probs in part.log_probs],
            stop_reasons=[reason for part in parts for reason in part.stop_reasons],
            steps=sum(part.steps for part in parts),
        )

    with weights.of(state.params, keys, own) as (params, keys):
        completions = leave_together(sample)
    return gather_completions(completions) if weights.alone else completions


def write_samples(folder: RunFolder, step: int, texts: Sequence[str], width: int | None = None) -> None:
    """All into `samples/STEP.txt`, the first onto the terminal, with its lines cut to `width` characters."""
    if not is_first():
        return
    file = folder.file("samples", f"{step}.txt")
    write_text(file, "".join(f"{text}\n{'-' * 20}\n" for text in texts))
    first = "\n".join(line[:width] for line in texts[0].splitlines())
    tqdm.write(printable(f"sample at step {step} (all in {url_of(file.parent)}): {first}"))
