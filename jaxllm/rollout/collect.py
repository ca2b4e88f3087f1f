"""Many completions of many prompts, by continuous batching: a fixed number of rows decode together, and a
waiting completion takes the row of a finished one, so that a few long completions do not delay the others.

Shapes: N prompts, G completions a prompt, B rows decoded together, R rows refilled together, P prompts
prefilled together, S cache slots. The R rows of a refill come from one prefill of P prompts.

The host schedules three compiled programs: one decodes until R rows are free, which the host reads from the
`done` flags; a second prefills the next P prompts; a third copies them into the free rows, once for each of
their completions. All of these shapes are fixed except S, which takes a few sizes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.models import Model, Params
from jaxllm.parallel.global_arrays import to_host
from jaxllm.rollout.generate import (
    Completions,
    DecodeState,
    bucket,
    check_prompts,
    completions,
    decode,
    more_slots,
    pad_prompts,
    prefill,
    resize,
    resize_jit,
    split_rows,
    stop_reasons,
    unstack,
)
from jaxllm.rollout.sampling import SamplingConfig

REFILL_DIVISOR = 8  # R = B / 8: smaller refills leave fewer rows idle, but stop the decode loop more often
TAIL_DIVISOR = 4  # once no completion waits and at most B / 4 rows are active, the batch shrinks to B / 4
CHUNK_STEPS = 64  # decode steps between two calls of `check`, at most


@partial(jax.jit, static_argnames=("model", "slots"))
def free_rows(model: Model, keys: jax.Array, slots: int) -> DecodeState:
    """A state of one row for each key, all of them done."""
    rows = jnp.ones(keys.shape, jnp.int32)
    tokens, log_probs = jnp.zeros((len(rows), slots), jnp.int32), jnp.zeros((len(rows), slots), jnp.float32)
    cache = model.init_cache(len(rows), slots)
    state = DecodeState(tokens, log_probs, rows, rows, rows, rows > 0, keys, jnp.int32(0), cache)
    return split_rows(state)


@partial(jax.jit, donate_argnames="state")
def refill(
    state: DecodeState, prompts: DecodeState, rows: jax.Array, sources: jax.Array, keys: jax.Array
) -> DecodeState:
    """Complete prompt sources[r] with keys[r] in row rows[r]. Row indices beyond the last are dropped."""
    new = jax.tree.map(lambda array: array[sources] if array.ndim else array, prompts)._replace(keys=keys)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        # Slots beyond the prompt keep the tokens of the previous completion: no row reads a slot before it
        # has written there.
        return old.at[rows, *map(slice, new.shape[1:])].set(new, mode="drop") if old.ndim else old

    return split_rows(jax.tree.map(put, state, new))


@partial(jax.jit, static_argnames="slots")
def keep_rows(state: DecodeState, rows: jax.Array, slots: int) -> DecodeState:
    """The same state with only these rows, and with `slots` slots."""
    return resize(jax.tree.map(lambda array: array[rows] if array.ndim else array, state), slots)


def tail_slots(slots: int, last_slots: int) -> int:
    """Slots of the smaller batch at the end: all that it may need (a single program), unless that would
    take more memory than the batch before."""
    return max(slots, last_slots) if last_slots <= TAIL_DIVISOR * slots else slots


def batch_sizes(num_prompts: int, group_size: int, decode_batch_size: int) -> tuple[int, int, int]:
    """(B, R, P) for so many prompts."""
    number = num_prompts * group_size
    B = min(decode_batch_size, bucket(number))
    R = B if number <= B else -(-B // REFILL_DIVISOR)
    return B, R, min(-(-R // group_size), bucket(num_prompts))


class Block(NamedTuple):
    """Completions that start together, with their prompts."""

    completions: range  # indices of at most R completions
    prompts: DecodeState  # P prompts, prefilled
    sources: np.ndarray  # int [R], the index of each completion's prompt among them
    keys: jax.Array  # PRNG keys [R]


def read_blocks(
    model: Model, params: Params, prompts: tuple[np.ndarray, ...], keys: jax.Array, rows: int, P: int
) -> Iterator[Block]:
    """All completions of padded prompts, `rows` at a time. Each prompt is prefilled once, when needed."""
    tokens, lengths, limits = prompts
    N, G = len(tokens), len(keys) // len(tokens)
    for first in range(0, N, P):
        at = np.minimum(np.arange(first, first + P), N - 1)  # the last prefill may repeat a prompt
        prefilled = prefill(model, params, tokens[at], lengths[at], limits[at], keys[at * G], tokens.shape[1])
        end = min(first + P, N) * G
        for start in range(first * G, end, rows):
            indices = np.minimum(np.arange(start, start + rows), end - 1)
            yield Block(range(start, indices[-1] + 1), prefilled, indices // G - first, keys[indices])


def decode_chunks(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
    decode_batch_size: int,
    vocab_size: int | None,
) -> Iterator[tuple[DecodeState, np.ndarray]]:
    """Decode all completions. Yields the state, and which completion each row holds (-1: none), whenever rows
    can be refilled, the cache must grow or CHUNK_STEPS steps are done.

    The arrays of a state are deleted once the next one is requested.
    """
    number = len(keys)
    B, R, P = batch_sizes(len(prompts), number // len(prompts), decode_batch_size)
    tail = B // TAIL_DIVISOR
    params = unstack(params)
    padded = tokens, _, limits = pad_prompts(model, prompts, sampling.max_new_tokens)
    blocks = read_blocks(model, params, padded, keys, R, P)
    first_slots = more_slots(model, tokens.shape[1])
    last_slots = min(bucket(limits.max().item()), model.config.max_length)
    sampling = replace(sampling, max_new_tokens=1)  # state.limits has it; this way no program depends on it
    stop_tokens = np.array(stop_ids, np.int32)
    state = free_rows(model, keys[np.zeros(B, int)], first_slots)
    started, owners = 0, np.full(B, -1)  # completions started, and the completion of each row
    while started < number or (owners >= 0).any():
        free = np.flatnonzero(owners < 0)
        if len(free) == B and state.tokens.shape[1] > first_slots:
            state = resize_jit(state, first_slots)
        while started < number and len(free) >= R:
            block = next(blocks)
            rows, free = free[: len(block.completions)], free[len(block.completions) :]
            dropped = np.full(R - len(rows), B)
            state = refill(state, block.prompts, np.append(rows, dropped), block.sources, block.keys)
            owners[rows], started = block.completions, block.completions.stop
        if started == number and 0 < np.sum(owners >= 0) <= tail < len(owners):
            rows = np.argsort(owners < 0, stable=True)[:tail]
            state = keep_rows(state, rows, tail_slots(state.tokens.shape[1], last_slots))
            owners = owners[rows]
        if started < number:
            min_rows = B - R
        else:
            min_rows = tail if len(owners) > tail else 0
        state = decode(
            model,
            params,
            state,
            stop_tokens,
            CHUNK_STEPS,
            min_rows,
            sampling=sampling,
            vocab_size=vocab_size,
        )
        yield state, owners
        done, lengths = to_host((state.done, state.lengths))
        owners[done] = -1
        if lengths[owners >= 0].max(initial=0) == state.tokens.shape[1]:
            state = resize_jit(state, more_slots(model, state.tokens.shape[1]))


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
) -> Completions:
    """Complete each prompt group_size times.

    Completion i = p * group_size + g of prompt p uses keys[i], equals that of `generate` with this key, and
    is entry i of the result.

    Args:
      decode_batch_size: number of completions decoded together, at most.
      vocab_size: as in `generate`.
      check: called between chunks of decoding; may raise to leave.
      on_done: called with the indices and the tokens of the completions that have just finished.
    """
    for name, value in (("group_size", group_size), ("decode_batch_size", decode_batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    check_prompts(model, prompts, stop_ids, keys, group_size)
    tokens: list[list[int]] = [[] for _ in range(len(keys))]
    log_probs = [np.empty(0) for _ in range(len(keys))]
    for state, owners in decode_chunks(
        model,
        params,
        prompts,
        sampling=sampling,
        stop_ids=stop_ids,
        keys=keys,
        decode_batch_size=decode_batch_size,
        vocab_size=vocab_size,
    ):
        check()
        rows = np.flatnonzero((owners >= 0) & to_host(state.done))
        finished = owners[rows].tolist()
        for i, completion in zip(finished, completions(state, rows), strict=True):
            tokens[i], log_probs[i] = completion
        if finished:
            on_done(finished, [tokens[i] for i in finished])
    return Completions(tokens, log_probs, stop_reasons(tokens, stop_ids), int(state.steps))
