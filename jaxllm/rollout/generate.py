"""Completions of prompts: prefill once, then one token a step for the whole batch.

Shapes: B rows, T prompt positions, S cache slots, N prompts (N <= B), V vocabulary.

Row b holds its prompt and then its completion in slots 0, 1, ... of `tokens`, and their keys and values
in the same slots of the cache. Prompts are padded on the right: a pad lies beyond every slot that its row
looks at until the row writes there itself, so what a row says depends on its own tokens and key alone.
B, T and S are rounded up to a few sizes and the cache grows from one to the next as rows get longer, so
attention reads little more than what is filled, and a run compiles a handful of programs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import DataError
from jaxllm.models import Model, unstack_layers
from jaxllm.models.transformer import Cache, Params
from jaxllm.rollout.sampling import SamplingConfig, sample

SHORTEST = 32  # prompt positions: shorter prompts share one program

# Once, and not in every stretch of decoding: a copy of all parameters.
unstack = jax.jit(unstack_layers)


class Completions(NamedTuple):
    """One entry a prompt, in the order of the prompts."""

    tokens: list[list[int]]  # the stop token included, nothing after it
    log_probs: list[np.ndarray]  # float32, under the sampling temperature, before any filter
    stop_reasons: list[str]  # "stop" (said a stop id) or "length" (ran out of tokens)
    steps: int  # decode steps that were run, each one token for every unfinished row


class DecodeState(NamedTuple):
    """Everything a row needs to go on; rows know nothing of each other."""

    tokens: jax.Array  # int32 [B, S]
    log_probs: jax.Array  # float32 [B, S], of the completion's tokens
    prompt_lengths: jax.Array  # int32 [B]
    lengths: jax.Array  # int32 [B], prompt and completion so far
    limits: jax.Array  # int32 [B], the length at which a row ends in any case
    done: jax.Array  # bool [B]
    keys: jax.Array  # PRNG keys [B]; the draw at completion position t uses fold_in(key, t)
    steps: jax.Array  # int32, decode steps so far
    cache: Cache


def bucket(size: int) -> int:
    """`size` rounded up to 2^n or 3 * 2^n."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with more slots."""

    def pad(array, axis):
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, slots - array.shape[axis])
        return jnp.pad(array, widths)

    return state._replace(
        tokens=pad(state.tokens, 1),
        log_probs=pad(state.log_probs, 1),
        cache=jax.tree.map(lambda array: pad(array, 2), state.cache),
    )


grow_jit = jax.jit(grow, static_argnames="slots")


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
    """Read prompts tokens[B, T] of some lengths[B]. A row whose limit is its length is done at once."""
    _, cache = model.apply(params, tokens, cache=model.init_cache(*tokens.shape))
    log_probs = jnp.zeros(tokens.shape, jnp.float32)
    done, steps = lengths >= limits, jnp.int32(0)
    return grow(DecodeState(tokens, log_probs, lengths, lengths, limits, done, keys, steps, cache), slots)


def next_logits(
    model: Model, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Float32 logits [B, V] after tokens[B] at positions[B], and the cache with them in it."""
    hidden, cache = model.apply(params, tokens[:, None], positions=positions[:, None], cache=cache)
    return model.unembed(params, hidden[:, 0]), cache


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    stop_ids: jax.Array,
    max_steps: jax.Array,
    *,
    sampling: SamplingConfig,
) -> DecodeState:
    """Say tokens until every row is done, a row needs another slot, or max_steps steps were run."""
    rows, slots = jnp.arange(state.tokens.shape[0]), state.tokens.shape[1]
    last_step = state.steps + max_steps

    def goes_on(state):
        longest = jnp.max(jnp.where(state.done, 0, state.lengths))
        return (longest > 0) & (longest < slots) & (state.steps < last_step)

    def decode_step(state):
        # The last token is read here and not earlier, so its keys are written now. The first step reads
        # the prompt's last token again, and with that needs no logits from the prefill.
        last = state.lengths - 1
        logits, cache = next_logits(model, params, state.tokens[rows, last], last, state.cache)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths - state.prompt_lengths)
        tokens, log_probs = sample(logits, keys, sampling)
        here = (rows, state.lengths)  # a finished row writes beyond its end, where nobody reads
        lengths = state.lengths + ~state.done
        return state._replace(
            tokens=state.tokens.at[here].set(tokens, mode="drop"),
            log_probs=state.log_probs.at[here].set(log_probs, mode="drop"),
            lengths=lengths,
            done=state.done | jnp.isin(tokens, stop_ids) | (lengths >= state.limits),
            steps=state.steps + 1,
            cache=cache,
        )

    return jax.lax.while_loop(goes_on, decode_step, state)


def check(model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], keys: jax.Array) -> None:
    """DataError, naming the prompt, where the model cannot read or continue it."""
    longest, vocab_size = model.config.max_length - 1, model.config.vocab_size
    if keys.shape != (len(prompts),) or not len(prompts):
        raise DataError(f"keys of shape {keys.shape} for {len(prompts)} prompts: give one key a prompt")
    for name, tokens in [("stop_ids", stop_ids), *((f"prompts[{i}]", p) for i, p in enumerate(prompts))]:
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise DataError(
                f"{name} has token ids from {min(tokens)} to {max(tokens)}; "
                f"the model knows 0 to {vocab_size - 1} (model.vocab_size)"
            )
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise DataError(
                f"prompts[{i}] has {len(prompt)} tokens; give 1 to {longest} (one less than model.max_length)"
            )


def begin(
    model: Model, params: Params, prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int
) -> DecodeState:
    """Prompts in rows of equal length, read, with room to write; rows beyond the prompts are done."""
    N, B, max_length = len(prompts), bucket(len(prompts)), model.config.max_length
    lengths = np.array([len(prompt) for prompt in prompts] + [1] * (B - N), np.int32)
    limits = np.where(np.arange(B) < N, np.minimum(lengths + max_new_tokens, max_length), lengths)
    T = min(bucket(max(int(lengths.max()), SHORTEST)), max_length)
    tokens = np.zeros((B, T), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    slots = min(bucket(T + 1), max_length)
    return prefill(model, params, tokens, lengths, limits, keys[np.arange(B) % N], slots)


def run(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
    max_steps: int | None = None,
) -> Iterator[DecodeState]:
    """Decode to the end. Stops wherever the cache must grow, and after max_steps, to yield the state, whose
    arrays are gone once the next is asked for."""
    check(model, prompts, stop_ids, keys)
    max_length = model.config.max_length
    state = begin(model, params, prompts, keys, sampling.max_new_tokens)
    sampling = replace(sampling, max_new_tokens=1)  # state.limits has it: no program depends on it
    stop_ids = jnp.array(stop_ids, jnp.int32)
    params = unstack(params)
    max_steps = max_length if max_steps is None else max_steps
    while True:
        state = decode(model, params, state, stop_ids, max_steps, sampling=sampling)
        yield state
        done, slots = np.asarray(state.done), state.tokens.shape[1]
        if done.all():
            return
        if np.asarray(state.lengths)[~done].max() == slots:
            state = grow_jit(state, min(bucket(slots + 1), max_length))


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    keys: jax.Array,
) -> Completions:
    """Continue each prompt with its own key of keys[N] until it says one of stop_ids, has said
    sampling.max_new_tokens, or fills model.max_length."""
    *_, state = run(model, params, prompts, sampling=sampling, stop_ids=stop_ids, keys=keys)
    tokens, log_probs = np.asarray(state.tokens), np.asarray(state.log_probs)
    starts, ends = np.asarray(state.prompt_lengths), np.asarray(state.lengths)
    spans = [slice(starts[row], ends[row]) for row in range(len(prompts))]
    said = [tokens[row, span].tolist() for row, span in enumerate(spans)]
    return Completions(
        tokens=said,
        log_probs=[log_probs[row, span] for row, span in enumerate(spans)],
        stop_reasons=["stop" if completion[-1] in stop_ids else "length" for completion in said],
        steps=int(state.steps),
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
) -> Iterator[list[int]]:
    """The completion of one prompt as it is said, at most max_steps tokens at a time."""
    end = len(prompt)
    for state in run(
        model, params, [prompt], sampling=sampling, stop_ids=stop_ids, keys=key[None], max_steps=max_steps
    ):
        start, end = end, int(state.lengths[0])
        yield np.asarray(state.tokens)[0, start:end].tolist()
