"""Many completions of many prompts: a fixed number of rows decode together, and a finished row makes room
for a waiting one, so that a few long answers do not hold the rest.

Shapes: N prompts, G completions a prompt, B rows decoded together, R rows refilled together, P prompts read
together, S cache slots. The R rows of a refill come from one reading of P prompts.

The host decides, the device works: a compiled loop decodes until R rows are free, which the host learns
from the `done` flags; a second program reads the next P prompts, a third copies them into the free rows,
once for each of their completions. All of these shapes are fixed but S, which takes a few sizes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.models import Model
from jaxllm.models.transformer import Params
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
    stop_reasons,
    unstack,
)
from jaxllm.rollout.sampling import SamplingConfig

REFILLS = 8  # a refill is this share of the rows: fewer would idle less and stop the loop more often
TAIL = 4  # once nothing waits and so small a share of the rows goes on, only that share decodes further
STRETCH = 64  # decode steps, at most, from one call of `check` to the next


@partial(jax.jit, static_argnames=("model", "slots"))
def idle(model: Model, keys: jax.Array, slots: int) -> DecodeState:
    """As many rows as keys, all of them free."""
    rows = jnp.ones(keys.shape, jnp.int32)
    tokens, log_probs = jnp.zeros((len(rows), slots), jnp.int32), jnp.zeros((len(rows), slots), jnp.float32)
    cache = model.init_cache(len(rows), slots)
    return DecodeState(tokens, log_probs, rows, rows, rows, rows > 0, keys, jnp.int32(0), cache)


@partial(jax.jit, donate_argnames="state")
def refill(
    state: DecodeState, prompts: DecodeState, rows: jax.Array, sources: jax.Array, keys: jax.Array
) -> DecodeState:
    """Begin prompt sources[r] with keys[r] in row rows[r]; a row beyond the last is nowhere."""
    new = jax.tree.map(lambda array: array[sources] if array.ndim else array, prompts)._replace(keys=keys)

    def put(old, new):
        # Slots beyond the prompt keep what the last completion left: nobody looks there before writing.
        return old.at[rows, *map(slice, new.shape[1:])].set(new, mode="drop") if old.ndim else old

    return jax.tree.map(put, state, new)


@partial(jax.jit, static_argnames="slots")
def keep_rows(state: DecodeState, rows: jax.Array, slots: int) -> DecodeState:
    """The same state with these rows only, and so many slots."""
    return resize(jax.tree.map(lambda array: array[rows] if array.ndim else array, state), slots)


def tail_slots(slots: int, last_slots: int) -> int:
    """All that could be needed, if that takes no more memory than before: one size is one program."""
    return max(slots, last_slots) if last_slots <= TAIL * slots else slots


class Block(NamedTuple):
    """Completions that begin together, each with its prompt."""

    completions: range  # at most R
    prompts: DecodeState  # P prompts, read
    sources: np.ndarray  # int [R], which of the prompts each completion continues
    keys: jax.Array  # PRNG keys [R]


def read_blocks(
    model: Model, params: Params, prompts: tuple[np.ndarray, ...], keys: jax.Array, rows: int
) -> Iterator[Block]:
    """All completions of padded prompts, `rows` at a time. A prompt is read once, when its turn comes."""
    tokens, lengths, limits = prompts
    N, G = len(tokens), len(keys) // len(tokens)
    P = min(-(-rows // G), bucket(N))
    for first in range(0, N, P):
        at = np.minimum(np.arange(first, first + P), N - 1)  # the last reading may repeat a prompt
        read = prefill(model, params, tokens[at], lengths[at], limits[at], keys[at * G], tokens.shape[1])
        end = min(first + P, N) * G
        for start in range(first * G, end, rows):
            begin = np.minimum(np.arange(start, start + rows), end - 1)
            yield Block(range(start, begin[-1] + 1), read, begin // G - first, keys[begin])


def run(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
    max_rows: int,
) -> Iterator[tuple[DecodeState, np.ndarray]]:
    """Decode to the end. Stops to refill rows, to grow the cache and after STRETCH steps, and yields the
    state, whose arrays are gone once the next is asked for, and which completion each row says (-1: none)."""
    number = len(keys)
    B = min(max_rows, bucket(number))
    R, tail = B if number <= B else -(-B // REFILLS), B // TAIL
    params = unstack(params)
    padded = tokens, _, limits = pad_prompts(model, prompts, sampling.max_new_tokens)
    blocks = read_blocks(model, params, padded, keys, R)
    first_slots = more_slots(model, tokens.shape[1])
    last_slots = min(bucket(limits.max().item()), model.config.max_length)
    sampling = replace(sampling, max_new_tokens=1)  # state.limits has it: no program depends on it
    stop_ids = jnp.array(stop_ids, jnp.int32)
    state = idle(model, keys[np.zeros(B, int)], first_slots)
    begun, owners = 0, np.full(B, -1)
    while begun < number or (owners >= 0).any():
        free = np.flatnonzero(owners < 0)
        if len(free) == B and state.tokens.shape[1] > first_slots:
            state = resize_jit(state, first_slots)
        while begun < number and len(free) >= R:
            block = next(blocks)
            rows, free = free[: len(block.completions)], free[len(block.completions) :]
            nowhere = np.full(R - len(rows), B)
            state = refill(state, block.prompts, np.append(rows, nowhere), block.sources, block.keys)
            owners[rows], begun = block.completions, block.completions.stop
        if begun == number and 0 < np.sum(owners >= 0) <= tail < len(owners):
            rows = np.argsort(owners < 0, stable=True)[:tail]
            state, owners = (
                keep_rows(state, rows, tail_slots(state.tokens.shape[1], last_slots)),
                owners[rows],
            )
        if begun < number:
            min_rows = B - R
        else:
            min_rows = tail if len(owners) > tail else 0
        state = decode(model, params, state, stop_ids, STRETCH, min_rows, sampling=sampling)
        yield state, owners
        done, lengths = jax.device_get((state.done, state.lengths))
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
    max_rows: int,
    check: Callable[[], None] = lambda: None,
    on_done: Callable[[list[int], list[list[int]]], None] = lambda numbers, tokens: None,
) -> Completions:
    """Continue each prompt group_size times: completion g of prompt p uses keys[p * group_size + g], says
    what `generate` says with that key, and stands at that place in the result.

    At most max_rows decode together. Between stretches of decoding `check` is called, and may raise, and
    `on_done`, with the numbers and the tokens of the completions that have just ended.
    """
    for name, value in (("group_size", group_size), ("max_rows", max_rows)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    check_prompts(model, prompts, stop_ids, keys, group_size)
    said, log_probs = [[] for _ in range(len(keys))], [np.empty(0) for _ in range(len(keys))]
    for state, owners in run(
        model, params, prompts, sampling=sampling, stop_ids=stop_ids, keys=keys, max_rows=max_rows
    ):
        check()
        rows = np.flatnonzero((owners >= 0) & np.asarray(state.done))
        ended = owners[rows].tolist()
        for owner, completion in zip(ended, completions(state, rows), strict=True):
            said[owner], log_probs[owner] = completion
        if ended:
            on_done(ended, [said[owner] for owner in ended])
    return Completions(said, log_probs, stop_reasons(said, stop_ids), int(state.steps))
