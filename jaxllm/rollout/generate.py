"""Completions of prompts: prefill once, then decode one token a step for the whole batch.

Shapes: B rows, T prompt positions, S cache slots, N prompts (N <= B), V vocabulary.

Row b holds its prompt and then its completion in slots 0, 1, ... of `tokens`, and their keys and values
in the same slots of the cache. Prompts are padded on the right: a row never attends to a slot of padding
before it has written there itself, so that its completion depends only on its own tokens and key.
B, T and S are rounded up to a few sizes, and the cache grows from one size to the next as rows get longer:
attention reads few empty slots, and few programs are compiled.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxllm.errors import DataError
from jaxllm.models import Cache, Model, Params, unstack_layers
from jaxllm.parallel.global_arrays import gather, to_host
from jaxllm.parallel.sharding import BATCH, constrain
from jaxllm.rollout.sampling import SamplingConfig, sample

MIN_SLOTS = 32  # prompt positions, and slots by which a cache grows: fewer would only add programs

# Called once, not in every chunk of decoding: it copies all parameters.
unstack_jit = jax.jit(unstack_layers)


def unstack(params: Params) -> Params:
    """`unstack_layers`; the same arrays where that is done already."""
    return params if isinstance(params["blocks"], tuple) else unstack_jit(params)


class Completions(NamedTuple):
    """One entry a prompt, in the order of the prompts."""

    tokens: list[list[int]]  # with the stop token, and nothing after it
    log_probs: list[np.ndarray]  # float32, nats, under the sampling temperature, before any filter
    stop_reasons: list[str]  # "stop" (generated a stop token) or "length" (reached its maximum length)
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


class DecodeState(NamedTuple):
    """Everything needed to continue decoding. Rows are independent of each other."""

    tokens: jax.Array  # int32 [B, S]
    log_probs: jax.Array  # float32 [B, S], of the completion's tokens
    prompt_lengths: jax.Array  # int32 [B]
    lengths: jax.Array  # int32 [B], prompt and completion so far
    limits: jax.Array  # int32 [B], the maximum length of prompt and completion
    done: jax.Array  # bool [B], finished rows
    keys: jax.Array  # PRNG keys [B]; the draw at completion position t uses fold_in(key, t)
    steps: jax.Array  # int32, decode steps so far
    cache: Cache


def split_rows(state: DecodeState) -> DecodeState:
    """The state with its rows constrained to `data` and `fsdp`, the heads of its cache to `tensor`.

    Left to itself the compiler replicates a new state: every device would have the whole cache.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_heads = state.cache[0].keys_BKSh.shape[1]
    tensor = None if mesh.empty or num_heads % mesh.shape.get("tensor", 1) else "tensor"
    heads, rows = P(*BATCH, tensor), state._replace(cache=())
    rows = jax.tree.map(lambda array: constrain(array, BATCH) if array.ndim else array, rows)
    return rows._replace(cache=jax.tree.map(lambda array: constrain(array, heads), state.cache))


def bucket(size: int) -> int:
    """`size` rounded up to 2^n or 3 * 2^n."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


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


resize_jit = jax.jit(resize, static_argnames="slots")


@partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: Model,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    keys: jax.Array,
    slots: int,
) -> DecodeState:
    """The state after reading prompts tokens[B, T] of lengths[B]. A row whose limit is its length is done."""
    B, T = tokens.shape
    cache = cast(Cache, model.apply(params, tokens, cache=model.init_cache(B, T)).cache)
    log_probs = jnp.zeros(tokens.shape, jnp.float32)
    done, steps = lengths >= limits, jnp.int32(0)
    return resize(DecodeState(tokens, log_probs, lengths, lengths, limits, done, keys, steps, cache), slots)


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
    stop_ids: jax.Array,
    max_steps: jax.Array | int,
    min_rows: jax.Array | int,
    draw: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> DecodeState:
    """Decode until at most min_rows rows are active, a row needs another slot, or max_steps steps are done.

    `draw(logits[B, V], keys[B])` returns the next tokens and their log-probs.
    """
    slots = state.tokens.shape[1]
    # By row, so that each device finds the slots of its own rows. A finished row writes beyond its end, which
    # is never read.
    read_slot = jax.vmap(lambda row, slot: row[slot])
    write_slot = jax.vmap(lambda row, slot, value: row.at[slot].set(value, mode="drop"))
    last_step = state.steps + max_steps

    def keep_decoding(state: DecodeState) -> jax.Array:
        longest = jnp.max(jnp.where(state.done, 0, state.lengths))
        return (jnp.sum(~state.done) > min_rows) & (longest < slots) & (state.steps < last_step)

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

    return jax.lax.while_loop(keep_decoding, decode_step, state)


@partial(jax.jit, static_argnames=("model", "sampling", "vocab_size"), donate_argnames="state")
def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    stop_ids: jax.Array,
    max_steps: jax.Array | int,
    min_rows: jax.Array | int,
    *,
    sampling: SamplingConfig,
    vocab_size: int | None = None,
) -> DecodeState:
    """`decode_steps` with the same sampling for all rows. `vocab_size` is as in `within_vocabulary`."""
    draw = partial(sample, config=sampling, vocab_size=vocab_size)
    return decode_steps(model, params, state, stop_ids, max_steps, min_rows, draw)


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


def pad_prompts(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens[N, T], lengths[N] and limits[N], as `prefill` takes them. T is one of a few sizes."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    T = min(bucket(max(int(lengths.max()), MIN_SLOTS)), model.config.max_length)
    tokens = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    longest = model.config.max_length
    return tokens, lengths, np.minimum(lengths + min(max_new_tokens, longest), longest)  # no int32 overflow


def more_slots(model: Model, slots: int) -> int:
    """The next size of a cache, at most model.max_length. Each size compiles a program of its own."""
    return min(bucket(slots + MIN_SLOTS), model.config.max_length)


def prefill_prompts(
    model: Model, params: Params, prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int
) -> DecodeState:
    """The state after reading the prompts, with slots to decode into. Rows beyond the prompts are done."""
    N, B = len(prompts), bucket(len(prompts))
    tokens, lengths, limits = pad_prompts(model, prompts, max_new_tokens)
    rows = np.arange(B) % N
    limits = np.where(np.arange(B) < N, limits[rows], lengths[rows])
    slots = more_slots(model, tokens.shape[1])
    return prefill(model, params, tokens[rows], lengths[rows], limits, keys[rows], slots)


def decode_chunks(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
    max_steps: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[DecodeState]:
    """Decode until all rows are done, and yield the state whenever the cache must grow or max_steps are done.

    The arrays of a state are deleted once the next one is requested.
    """
    check_prompts(model, prompts, stop_ids, keys)
    state = prefill_prompts(model, params, prompts, keys, sampling.max_new_tokens)
    sampling = replace(sampling, max_new_tokens=1)  # state.limits has it; this way no program depends on it
    stop_tokens = np.array(stop_ids, np.int32)
    params = unstack(params)
    max_steps = model.config.max_length if max_steps is None else max_steps
    while True:
        state = decode(
            model, params, state, stop_tokens, max_steps, 0, sampling=sampling, vocab_size=vocab_size
        )
        yield state
        done, slots = to_host(state.done), state.tokens.shape[1]
        if done.all():
            return
        if to_host(state.lengths)[~done].max() == slots:
            state = resize_jit(state, more_slots(model, slots))


def completions(state: DecodeState, rows: Iterable[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """The completion of each of the rows so far, and the log-probs of its tokens."""
    tokens, log_probs, starts, ends = to_host(
        (state.tokens, state.log_probs, state.prompt_lengths, state.lengths)
    )
    for row in rows:
        completion = slice(starts[row], ends[row])
        yield tokens[row, completion].tolist(), log_probs[row, completion].copy()


def stop_reasons(completions: Iterable[Sequence[int]], stop_ids: Sequence[int]) -> list[str]:
    """Why each completion ended."""
    return ["stop" if tokens[-1] in stop_ids else "length" for tokens in completions]


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
    *_, state = decode_chunks(
        model, params, prompts, sampling=sampling, stop_ids=stop_ids, keys=keys, vocab_size=vocab_size
    )
    tokens, log_probs = zip(*completions(state, range(len(prompts))), strict=True)
    return Completions(list(tokens), list(log_probs), stop_reasons(tokens, stop_ids), int(state.steps))


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
    end = len(prompt)
    for state in decode_chunks(
        model,
        params,
        [prompt],
        sampling=sampling,
        stop_ids=stop_ids,
        keys=key[None],
        max_steps=max_steps,
        vocab_size=vocab_size,
    ):
        start, end = end, int(state.lengths[0])
        yield np.asarray(state.tokens)[0, start:end].tolist()
