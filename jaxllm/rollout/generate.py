"""Completions of a few prompts: all in one batch, or of one prompt while it is generated."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np

from jaxllm.models import Model, Params
from jaxllm.rollout.collect import BatchShapes, Completions, check_prompts, collect, make_requests
from jaxllm.rollout.decode import decode
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.rollout.scheduler import Scheduler


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
    vocab_size: int | None = None,
) -> Completions:
    """Complete each prompt with its own key of keys[N].

    A completion ends with the first of stop_ids, after sampling.max_new_tokens, or at model.max_length. Ids
    from `vocab_size` on, the size of the tokenizer's vocabulary, are never generated; None: the model's.
    """
    return collect(
        model,
        params,
        prompts,
        group_size=1,
        sampling=sampling,
        stop_ids=stop_ids,
        keys=keys,
        decode_batch_size=max(1, 2 * len(prompts)),  # all at once
        vocab_size=vocab_size,
    )


def stream(
    model: Model,
    params: Params,
    prompt: Sequence[int],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    key: jax.Array,
    max_steps: int,
    vocab_size: int | None = None,
) -> Iterator[list[int]]:
    """The completion of one prompt while it is generated, at most max_steps tokens at a time. `vocab_size` is
    as in `generate`."""
    check_prompts(model, [prompt], stop_ids, key[None])
    longest = model.config.max_length
    [request] = make_requests([prompt], key[None], sampling.max_new_tokens, longest)
    shapes = BatchShapes.of(1, 1, 1, len(prompt), longest)
    scheduler = Scheduler(model, params, shapes.batches, shapes.sizes)
    scheduler.read(deque([request]), 1)
    scheduler.start(1)
    stop_tokens, program_sampling = np.array(stop_ids, np.int32), replace(sampling, max_new_tokens=1)
    while scheduler.active:
        before = len(request.tokens)
        scheduler.decode(
            decode, max_steps, 0, stop_ids=stop_tokens, sampling=program_sampling, vocab_size=vocab_size
        )
        scheduler.update()
        yield request.tokens[before:]
