"""The compiled programs of generation: prompts are read into a cache, then rows decode from it together.

Shapes: B rows, P prompts read together, R rows started together, T prompt positions, S cache slots,
V vocabulary.

Row b holds its prompt and then its completion in slots 0, 1, ... of `tokens`, and their keys and values
in the same slots of the cache. Prompts are padded on the right: a row never attends to a slot of padding
before it has written there itself, so that its completion depends only on its own tokens and key.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.models import Cache, Model, Params, unstack_layers
from jaxllm.parallel.sharding import BATCH, constrain
from jaxllm.rollout.sampling import RowSampling, SamplingConfig, sample, sample_rows

# Called once, not in every chunk of decoding: it copies all parameters.
unstack_jit = jax.jit(unstack_layers)


def unstack(params: Params) -> Params:
    """`unstack_layers`; the same arrays where that is done already."""
    return params if isinstance(params["blocks"], tuple) else unstack_jit(params)


class DecodeState(NamedTuple):
    """Everything needed to continue decoding. Rows are independent of each other."""

    tokens: jax.Array  # int32 [B, S]
    log_probs: jax.Array  # float32 [B, S], of the tokens that the row has generated
    prompt_lengths: jax.Array  # int32 [B]
    lengths: jax.Array  # int32 [B], prompt and completion so far
    limits: jax.Array  # int32 [B], the maximum length of prompt and completion
    done: jax.Array  # bool [B], finished rows
    keys: jax.Array  # PRNG keys [B]; the draw at completion position t uses fold_in(key, t)
    steps: jax.Array  # int32, decode steps of the last chunk
    cache: Cache


def split_cache(cache: Cache) -> Cache:
    """The cache with its rows constrained to `data` and `fsdp`, its heads to `tensor`.

    Left to itself the compiler replicates a new cache: every device would have the whole of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_heads = cache[0].keys_BKSh.shape[1]
    tensor = None if mesh.empty or num_heads % mesh.shape.get("tensor", 1) else "tensor"
    return jax.tree.map(lambda array: constrain(array, P(*BATCH, tensor)), cache)


def split_rows(state: DecodeState) -> DecodeState:
    """The state with its rows constrained to `data` and `fsdp`, the heads of its cache to `tensor`."""
    rows = state._replace(cache=())
    rows = jax.tree.map(lambda array: constrain(array, BATCH) if array.ndim else array, rows)
    return rows._replace(cache=split_cache(state.cache))


@partial(jax.jit, static_argnames=("model", "rows", "slots"))
def free_rows(model: Model, rows: int, slots: int) -> DecodeState:
    """A state of rows that are all done."""
    ones, tokens = jnp.ones(rows, jnp.int32), jnp.zeros((rows, slots), jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    cache = model.init_cache(rows, slots)
    log_probs = tokens.astype(jnp.float32)
    return split_rows(DecodeState(tokens, log_probs, ones, ones, ones, ones > 0, keys, jnp.int32(0), cache))


@partial(jax.jit, static_argnames="model")
def prefill(model: Model, params: Params, tokens: jax.Array) -> Cache:
    """The cache, with T slots, after reading prompts tokens[P, T]."""
    B, T = tokens.shape
    return split_cache(cast(Cache, model.apply(params, tokens, cache=model.init_cache(B, T)).cache))


class Starts(NamedTuple):
    """What is to start in R rows: arrays, on the host or a device."""

    rows: Any  # int [R]; those beyond the last row are dropped
    sources: Any  # int [R], which of the prompts that were read
    prompt_lengths: Any  # int32 [R]
    lengths: Any  # int32 [R], of the tokens to read: prompts, and what their completions have already
    limits: Any  # int32 [R]
    keys: Any  # uint32 [R, ...], the data of PRNG keys


@partial(jax.jit, donate_argnames="state")
def start_rows(state: DecodeState, tokens: jax.Array, cache: Cache, starts: Starts) -> DecodeState:
    """Start rows with prompts tokens[P, T] and the cache of them. A row whose limit is its length is done."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        # Slots beyond the prompt keep the tokens of the previous completion: no row reads a slot before it
        # has written there.
        return old.at[starts.rows, *map(slice, new.shape[1:])].set(new, mode="drop")

    started = state._replace(
        tokens=put(state.tokens, tokens[starts.sources]),
        prompt_lengths=put(state.prompt_lengths, starts.prompt_lengths),
        lengths=put(state.lengths, starts.lengths),
        limits=put(state.limits, starts.limits),
        done=put(state.done, starts.lengths >= starts.limits),
        keys=put(state.keys, jax.random.wrap_key_data(starts.keys)),
        cache=jax.tree.map(lambda old, new: put(old, new[starts.sources]), state.cache, cache),
    )
    return split_rows(started)


@partial(jax.jit, static_argnames="slots")
def resize(state: DecodeState, slots: int) -> DecodeState:
    """The same state with more slots, or with only the first ones."""

    def pad(array: jax.Array, axis: int) -> jax.Array:
        edges = [(0, 0, 0)] * array.ndim
        edges[axis] = (0, slots - array.shape[axis], 0)
        return jax.lax.pad(array, jnp.zeros((), array.dtype), edges)

    resized = state._replace(
        tokens=pad(state.tokens, 1),
        log_probs=pad(state.log_probs, 1),
        cache=jax.tree.map(lambda array: pad(array, 2), state.cache),
    )
    return split_rows(resized)


@jax.jit
def keep_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """The same state with only these rows."""
    return split_rows(jax.tree.map(lambda array: array[rows] if array.ndim else array, state))


def next_logits(
    model: Model, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Float32 logits [B, V] after tokens[B] at positions[B], and the cache with these tokens added."""
    output = model.apply(params, tokens[:, None], positions=positions[:, None], cache=cache)
    return model.unembed(params, output.hidden[:, 0]), cast(Cache, output.cache)


def decode_steps(
    model: Model,
    params: Params,
    state: DecodeState,
    active: jax.Array,
    stop_ids: jax.Array,
    max_steps: jax.Array | int,
    min_rows: jax.Array | int,
    draw: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> DecodeState:
    """Decode the active rows until at most min_rows of them are, a row needs another slot, or max_steps steps
    are done.

    `draw(logits[B, V], keys[B])` returns the next tokens and their log-probs.
    """
    slots = state.tokens.shape[1]
    # By row, so that each device finds the slots of its own rows. A finished row writes beyond its end, which
    # is never read.
    read_slot = jax.vmap(lambda row, slot: row[slot])
    write_slot = jax.vmap(lambda row, slot, value: row.at[slot].set(value, mode="drop"))

    def keep_decoding(state: DecodeState) -> jax.Array:
        longest = jnp.max(jnp.where(state.done, 0, state.lengths))
        return (jnp.sum(~state.done) > min_rows) & (longest < slots) & (state.steps < max_steps)

    def decode_step(state: DecodeState) -> DecodeState:
        # Each step reads the last token, whose keys and values are written now. The first step reads the last
        # token of the prompt again, so that the prefill need not compute logits.
        last = state.lengths - 1
        logits, cache = next_logits(model, params, read_slot(state.tokens, last), last, state.cache)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths - state.prompt_lengths)
        tokens, log_probs = draw(logits, keys)
        lengths = state.lengths + ~state.done
        state = state._replace(
            tokens=write_slot(state.tokens, state.lengths, tokens),
            log_probs=write_slot(state.log_probs, state.lengths, log_probs),
            lengths=lengths,
            done=state.done | jnp.isin(tokens, stop_ids) | (lengths >= state.limits),
            steps=state.steps + 1,
            cache=cache,
        )
        return split_rows(state)

    # Steps count from 0 in each chunk: in a server that runs for long they would overflow an int32.
    state = state._replace(done=state.done | ~active, steps=jnp.int32(0))
    return jax.lax.while_loop(keep_decoding, decode_step, state)


@partial(jax.jit, static_argnames=("model", "sampling", "vocab_size"), donate_argnames="state")
def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    active: jax.Array,
    max_steps: jax.Array | int,
    min_rows: jax.Array | int,
    *,
    stop_ids: jax.Array,
    sampling: SamplingConfig,
    vocab_size: int | None = None,
) -> DecodeState:
    """`decode_steps` with the same sampling for all rows. `vocab_size` is as in `within_vocabulary`."""
    draw = partial(sample, config=sampling, vocab_size=vocab_size)
    return decode_steps(model, params, state, active, stop_ids, max_steps, min_rows, draw)


@partial(jax.jit, static_argnames=("model", "vocab_size"), donate_argnames="state")
def decode_by_row(
    model: Model,
    params: Params,
    state: DecodeState,
    active: jax.Array,
    max_steps: jax.Array | int,
    min_rows: jax.Array | int,
    *,
    stop_ids: jax.Array,
    sampling: RowSampling,
    vocab_size: int,
) -> DecodeState:
    """`decode_steps` with a sampling of its own for each row, and without log-probs."""

    def draw(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = sample_rows(logits, keys, sampling, vocab_size)
        return tokens, jnp.zeros(tokens.shape, jnp.float32)

    return decode_steps(model, params, state, active, stop_ids, max_steps, min_rows, draw)
