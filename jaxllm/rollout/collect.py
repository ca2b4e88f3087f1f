"""Many completions of many prompts, by continuous batching: a fixed number of rows decode together, and a
waiting completion takes the row of a finished one, so that a few long completions do not delay the others.

Shapes: N prompts, G completions a prompt, B rows decoded together, R rows started together, P prompts
read together, T prompt positions, S cache slots.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.errors import ConfigError, DataError
from jaxllm.models import Model, Params
from jaxllm.parallel.global_arrays import gather, to_host
from jaxllm.rollout.decode import decode
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.rollout.scheduler import Request, Scheduler

MIN_SLOTS = 32  # prompt positions, and slots by which a cache grows: fewer would only add programs
REFILL_DIVISOR = 8  # rows wait until B / 8 are free: fewer would stop the decode loop more often
MIN_BATCH = 8  # the batch is halved as rows end, but not below: fewer rows are hardly faster
CHUNK_STEPS = 64  # decode steps between two calls of `check`, at most
UNFINISHED = "unfinished"  # the stop reason of a completion that can be continued


class Completions(NamedTuple):
    """One entry a completion, those of a prompt one after the other, in the order of the prompts."""

    tokens: list[list[int]]  # with the stop token, and nothing after it
    log_probs: list[np.ndarray]  # float32, nats, under the sampling temperature, before any filter
    stop_reasons: list[str]  # "stop" (a stop token), "length" (its maximum length), or UNFINISHED
    steps: int  # decode steps, each of which generates one token for every active row


def gather_completions(own: Completions) -> Completions:
    """The completions of all processes, each of which has made its own, in the order of the processes."""
    if jax.process_count() == 1:
        return own
    arrays = {
        "lengths": np.array([len(each) for each in own.tokens], np.int32),
        "tokens": np.array(list(itertools.chain(*own.tokens)), np.int32),
        "log_probs": np.concatenate([np.empty(0, np.float32), *own.log_probs]),
    }
    tokens: list[list[int]] = []
    log_probs: list[np.ndarray] = []
    reasons: list[str] = []
    steps = []
    for found, (own_reasons, own_steps) in gather(arrays, (own.stop_reasons, own.steps)):
        ends = np.cumsum(found["lengths"])[:-1] if len(found["lengths"]) else None
        if ends is not None:
            tokens += [each.tolist() for each in np.split(found["tokens"], ends)]
            log_probs += np.split(found["log_probs"], ends)
        reasons += own_reasons
        steps.append(own_steps)
    return Completions(tokens, log_probs, reasons, max(steps))


def check_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    keys: jax.Array | np.ndarray,
    group_size: int = 1,
) -> None:
    """DataError, naming the prompt, where the model cannot complete it, or where keys are missing."""
    longest, vocab_size = model.config.max_length - 1, model.config.vocab_size
    if keys.shape != (len(prompts) * group_size,) or not len(prompts):
        raise DataError(
            f"keys has shape {keys.shape} for {len(prompts)} prompts x {group_size} completions: pass one "
            f"key for each completion, and at least one prompt"
        )
    for name, tokens in [("stop_ids", stop_ids), *((f"prompts[{i}]", p) for i, p in enumerate(prompts))]:
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise DataError(
                f"{name} has token ids from {min(tokens)} to {max(tokens)}, "
                f"which must be from 0 to {vocab_size - 1} (model.vocab_size - 1)"
            )
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise DataError(
                f"prompts[{i}] has {len(prompt)} tokens, must have 1 to {longest} (model.max_length - 1)"
            )


def bucket(size: int) -> int:
    """`size` rounded up to 2^n or 3 * 2^n."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def row_devices() -> int:
    """The devices over which the current mesh splits rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))


class BatchShapes(NamedTuple):
    """The shapes that compiled programs are made for."""

    batches: list[int]  # B, ascending
    R: int
    P: int
    sizes: list[int]  # T, then those of S, ascending

    @classmethod
    def of(
        cls, num_prompts: int, group_size: int, decode_batch_size: int, longest: int, max_length: int
    ) -> "BatchShapes":
        """Those for so many prompts of at most `longest` tokens, with completions to `max_length` tokens."""
        number, devices = num_prompts * group_size, row_devices()
        B = min(decode_batch_size, bucket(number))
        R = B if number <= B else -(-B // REFILL_DIVISOR)
        P = min(-(-R // group_size), bucket(num_prompts))
        batches = [-(-B // devices) * devices]
        while batches[0] >= 2 * MIN_BATCH and batches[0] % (2 * devices) == 0:
            batches.insert(0, batches[0] // 2)
        sizes = [min(bucket(max(longest, MIN_SLOTS)), max_length)]
        while sizes[-1] < max_length:
            sizes.append(min(bucket(sizes[-1] + MIN_SLOTS), max_length))
        return cls(batches, R, P, sizes)

    def describe(self, max_new_tokens: int) -> str:
        """How many programs may decode, and of what shapes."""
        slots = self.sizes[1:] or self.sizes
        longest = self.sizes[0] + max_new_tokens
        slots = [size for size, before in zip(slots, [0, *slots], strict=False) if before < longest]
        rows = ", ".join(map(str, self.batches))
        return (
            f"at most {len(self.batches) * len(slots)} compiled programs decode "
            f"({rows} rows x {', '.join(map(str, slots))} cache slots), and one reads "
            f"{self.P} x {self.sizes[0]} prompt tokens"
        )


def collect(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
    decode_batch_size: int,
    vocab_size: int | None = None,
    check: Callable[[], None] = lambda: None,
    on_done: Callable[[list[int], list[list[int]]], None] = lambda indices, tokens: None,
    until: Callable[[int], bool] = lambda finished: False,
    started: Completions | None = None,
    shapes: BatchShapes | None = None,
) -> Completions:
    """Complete each prompt group_size times.

    Completion i = p * group_size + g of prompt p uses keys[i], equals that of `generate` with this key, and
    is entry i of the result.

    Args:
      decode_batch_size: number of completions decoded together, at most.
      vocab_size: as in `generate`.
      check: called between chunks of decoding; may raise to leave.
      on_done: called with the indices and the tokens of the completions that have just finished.
      until: asked between chunks, with the number of completions that have finished: once it is true, the
        others are returned as they are, with the stop reason UNFINISHED.
      started: what a call with these prompts and keys has returned: only its unfinished completions are
        continued, to the tokens that they would have had without the interruption.
      shapes: of other calls, to use their programs; None: those for these prompts.
    """
    for name, value in (("group_size", group_size), ("decode_batch_size", decode_batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    check_prompts(model, prompts, stop_ids, keys, group_size)
    requests = make_requests(prompts, keys, sampling.max_new_tokens, model.config.max_length)
    reasons = [UNFINISHED] * len(requests)
    if started is not None:
        reasons = list(started.stop_reasons)
        for request, tokens, log_probs in zip(requests, started.tokens, started.log_probs, strict=True):
            request.tokens += tokens
            request.log_probs += log_probs.tolist()
    index = {request: i for i, request in enumerate(requests) if reasons[i] == UNFINISHED}
    waiting = deque(index)
    if shapes is None:
        longest = max(map(len, prompts))
        shapes = BatchShapes.of(len(prompts), group_size, decode_batch_size, longest, model.config.max_length)
    batches = [rows for rows in shapes.batches if rows < 2 * len(waiting)] or shapes.batches[:1]
    scheduler = Scheduler(model, params, batches, shapes.sizes)
    options = {
        "stop_ids": np.array(stop_ids, np.int32),
        "sampling": replace(sampling, max_new_tokens=1),  # limits have it; this way no program depends on it
        "vocab_size": vocab_size,
    }
    while (waiting or scheduler.ready or scheduler.active) and not until(len(requests) - len(index)):
        B = len(scheduler.requests)
        refill = min(shapes.R, -(-B // REFILL_DIVISOR))
        while scheduler.free and (waiting or scheduler.ready):
            if not scheduler.ready:
                scheduler.read(waiting, shapes.P)
            if len(scheduler.free) < min(refill, len(scheduler.ready)):
                break
            scheduler.start(shapes.R)
        if waiting or scheduler.ready:
            min_rows = B - refill
        else:
            scheduler.shrink()
            min_rows = scheduler.smaller_batch()
        finished = scheduler.decode(decode, CHUNK_STEPS, min_rows, **options)
        check()
        if finished:
            found = [index.pop(request) for request in finished]
            completed = [request.completion for request in finished]
            for i, reason in zip(found, stop_reasons(completed, stop_ids), strict=True):
                reasons[i] = reason
            on_done(found, completed)
    scheduler.update()
    log_probs = [np.array(request.log_probs, np.float32) for request in requests]
    return Completions([request.completion for request in requests], log_probs, reasons, scheduler.steps)


def make_requests(
    prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int, max_length: int
) -> list[Request]:
    """A request for each of keys[N * G], those of a prompt one after the other."""
    data, group_size = to_host(jax.random.key_data(keys)), len(keys) // len(prompts)
    limits = [min(len(prompt) + max_new_tokens, max_length) for prompt in prompts]
    return [
        Request(list(prompts[p]), len(prompts[p]), limits[p], data[p * group_size + g])
        for p in range(len(prompts))
        for g in range(group_size)
    ]


def stop_reasons(completions: Iterable[Sequence[int]], stop_ids: Sequence[int]) -> list[str]:
    """Why each completion ended."""
    return ["stop" if tokens[-1] in stop_ids else "length" for tokens in completions]
