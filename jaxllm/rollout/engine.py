"""Serving by continuous batching: one thread owns the model, and a fixed number of rows decode together the
completions of requests that come and go.

Shapes: B rows, S cache slots, T prompt positions, P prompts prefilled together.

Every few steps the decode loop stops, delivers the new tokens, frees the rows of finished and canceled
requests, and admits waiting ones: a compiled program prefills P prompts, another copies them into free rows.
A completion depends only on its own prompt, sampling and seed. Sampling parameters are arrays with an entry a
row, so that requests with different ones decode together. S and T take a few sizes, each four times the one
before: every size compiles a program, and all requests wait while it compiles. The longest request sets S for
all rows, so `max_length` limits the memory of the cache.

Texts that are given can be scored as well (`Engine.score`): one between two chunks of decoding.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import DataError, RunError
from jaxllm.models import Model, Params
from jaxllm.rollout.collect import free_rows, refill
from jaxllm.rollout.generate import DecodeState, check_prompts, decode_steps, prefill, resize_jit, unstack
from jaxllm.rollout.sampling import RowSampling, SamplingConfig, row_sampling, sample_rows

CHUNK_STEPS = 8  # decode steps, at most, between deliveries of new tokens and admissions of new requests
MIN_SLOTS = 32  # prompt positions
GROWTH = 4  # from one size to the next
PREFILL_BATCH = 8  # prompts prefilled together where more than one waits
MAX_BATCHED_PROMPT = 512  # tokens; a longer prompt is prefilled alone, not with seven padded to its length
TOP_SCORES = 20  # most likely tokens whose log-probs `Engine.score` gives
SCORED_TOGETHER = 32  # positions whose logits are in memory at a time


class Busy(RunError):
    """The queue of waiting requests is full."""


@dataclass(eq=False)
class Request:
    """A prompt to be completed."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    seed: int
    on_tokens: Callable[[list[int], str | None], None]  # see Engine.submit
    delivered: int  # tokens of the prompt, and of the completion as far as it has been delivered
    canceled: bool = False

    def cancel(self) -> None:
        """Stop generating: its row is free from the next chunk on."""
        self.canceled = True


class Scores(NamedTuple):
    """What a model makes of T given tokens: entry t is about token t after those before it, at temperature 1.
    Entry 0 is about nothing."""

    log_probs: np.ndarray  # float32 [T], nats
    top_ids: np.ndarray  # int32 [T, TOP_SCORES], the most likely tokens first
    top_log_probs: np.ndarray  # float32 [T, TOP_SCORES], nats


@dataclass(eq=False)
class ScoreRequest:
    """Tokens to be scored."""

    tokens: Sequence[int]
    on_scores: Callable[[Scores | None], None]  # see Engine.score
    canceled: bool = False

    def cancel(self) -> None:
        """Do not score them if that has not begun."""
        self.canceled = True


@partial(jax.jit, static_argnames=("model", "vocab_size"))
def score_tokens(model: Model, params: Params, tokens: jax.Array, vocab_size: int) -> tuple[jax.Array, ...]:
    """The fields of the `Scores` of tokens[T]. Only ids below `vocab_size` are among the most likely ones."""
    hidden = model.apply(params, tokens[None]).hidden[0]

    def score(position: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        hidden, token = position
        log_probs = jax.nn.log_softmax(model.unembed(params, hidden))
        values, ids = jax.lax.top_k(log_probs[:vocab_size], min(TOP_SCORES, vocab_size))
        return log_probs[token], ids, values

    scored = jax.lax.map(score, (hidden, jnp.roll(tokens, -1)), batch_size=SCORED_TOGETHER)
    return tuple(jnp.roll(each, 1, axis=0) for each in scored)


@partial(jax.jit, static_argnames=("model", "vocab_size"), donate_argnames="state")
def decode_rows(
    model: Model,
    params: Params,
    state: DecodeState,
    active: np.ndarray,
    sampling: RowSampling,
    stop_ids: jax.Array,
    vocab_size: int,
) -> DecodeState:
    """At most CHUNK_STEPS decode steps of the active rows, each with its own sampling."""

    def draw(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = sample_rows(logits, keys, sampling, vocab_size)
        return tokens, jnp.zeros(tokens.shape, jnp.float32)  # log-probs are not used here

    # Steps count from 0 in each chunk: in a server that runs for long they would overflow an int32.
    state = state._replace(done=state.done | ~active, steps=jnp.int32(0))
    return decode_steps(model, params, state, stop_ids, CHUNK_STEPS, 0, draw)


class Engine:
    """Completes prompts, as many at once as there are rows."""

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        stop_ids: Sequence[int],
        rows: int = 16,
        max_waiting: int = 64,
        max_length: int | None = None,
        vocab_size: int | None = None,
    ):
        """Starts a thread. At most `max_waiting` requests wait while all `rows` are in use. `max_length` is
        the largest number of tokens of a prompt and its completion; None: the model's. `vocab_size` is as in
        `generate`."""
        self.model, self.stop_ids, self.max_waiting = model, tuple(stop_ids), max_waiting
        self.max_length = min(max_length or model.config.max_length, model.config.max_length)
        self.vocab_size = vocab_size or model.config.vocab_size
        self._params, self._rows = unstack(params), rows
        self._first_slots = self._size(GROWTH * MIN_SLOTS)
        self._state = free_rows(model, jax.random.split(jax.random.key(0), rows), self._first_slots)
        self._owners: list[Request | None] = [None] * rows
        self._waiting: deque[Request] = deque()
        self._to_score: deque[ScoreRequest] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.error: str | None = None  # why the thread ended by itself
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        sampling: SamplingConfig,
        seed: int,
        on_tokens: Callable[[list[int], str | None], None],
    ) -> Request:
        """Complete a prompt in the background.

        The completion equals that of `generate` with jax.random.key(seed), 0 <= seed < 2**32. The engine's
        thread calls `on_tokens(tokens, reason)` with a few tokens at a time; it must return at once. `reason`
        is None except in the last call: "stop", "length", or "error" (the engine has stopped).
        Raises DataError for a prompt that the model cannot complete, and Busy.
        """
        check_prompts(self.model, [prompt], self.stop_ids, np.zeros(1))
        self._check_length(len(prompt) + 1)
        request = Request(prompt, sampling, seed, on_tokens, delivered=len(prompt))
        self._enqueue(self._waiting, request)
        return request

    def score(self, tokens: Sequence[int], on_scores: Callable[[Scores | None], None]) -> ScoreRequest:
        """Score given tokens in the background. The engine's thread calls `on_scores(scores)` once, with None
        where the engine has stopped; it must return at once. Raises DataError and Busy."""
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.model.config.vocab_size:
            raise DataError(f"tokens must be ids from 0 to {self.model.config.vocab_size - 1}, at least one")
        self._check_length(len(tokens))
        request = ScoreRequest(tokens, on_scores)
        self._enqueue(self._to_score, request)
        return request

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise DataError(f"{length} tokens do not fit max_length={self.max_length}")

    def _enqueue(self, queue: deque, request: Request | ScoreRequest) -> None:
        with self._changed:
            if self._closed:
                raise RunError(f"the engine has stopped: {self.error or 'it was closed'}")
            waiting = sum(not each.canceled for each in queue)
            if waiting >= self.max_waiting:
                raise Busy(f"{waiting} requests are waiting already: try again in a moment")
            queue.append(request)
            self._changed.notify()

    @property
    def num_requests(self) -> int:
        """Requests that are being completed or are waiting."""
        return sum(owner is not None for owner in self._owners) + len(self._waiting)

    def close(self) -> None:
        """Stop the thread. Unfinished requests get the reason "error"."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._await_work():
                self._admit()
                if any(self._owners):
                    self._decode()
                self._score_next()
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._closed = True
                unfinished = [owner for owner in self._owners if owner] + list(self._waiting)
                unscored = list(self._to_score)
                self._waiting.clear()
                self._to_score.clear()
            for request in unfinished:
                request.on_tokens([], "error")
            for request in unscored:
                request.on_scores(None)

    def _await_work(self) -> bool:
        """Free the rows of canceled requests, shrink the cache to what the others need, and wait for work.
        False if the engine is closed."""
        self._owners = [owner and (None if owner.canceled else owner) for owner in self._owners]
        longest = max((owner.delivered for owner in self._owners if owner), default=0)
        needed = max(self._first_slots, self._size(longest + 1))
        if needed < self._state.tokens.shape[1]:
            self._state = resize_jit(self._state, needed)  # outside the lock, since it may compile
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._waiting or self._to_score or any(self._owners)
            )
            return not self._closed

    def _admit(self) -> None:
        """Prefill the prompts of waiting requests into free rows."""
        free = [row for row, owner in enumerate(self._owners) if owner is None]
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.canceled)
            first = list(self._waiting)[: min(len(free), PREFILL_BATCH)]
            short = list(itertools.takewhile(lambda each: len(each.prompt) <= MAX_BATCHED_PROMPT, first))
            new = short or first[:1]
            count = len(new)
            for _ in new:
                self._waiting.popleft()
            for row, request in zip(free, new, strict=False):
                self._owners[row] = request
        if not new:
            return
        P = 1 if count == 1 else PREFILL_BATCH
        lengths = np.ones(P, np.int32)
        lengths[:count] = [len(request.prompt) for request in new]
        T = self._size(max(lengths.max(), MIN_SLOTS))
        tokens, limits, seeds = np.zeros((P, T), np.int32), lengths.copy(), np.zeros(P, np.uint32)
        rows = np.full(P, self._rows)  # row B is dropped
        for i, request in enumerate(new):
            tokens[i, : lengths[i]], seeds[i], rows[i] = request.prompt, request.seed, free[i]
            limit = len(request.prompt) + request.sampling.max_new_tokens  # Python ints do not overflow
            limits[i] = min(limit, self.max_length)
        if self._state.tokens.shape[1] < T:
            self._state = resize_jit(self._state, T)
        keys = jax.vmap(jax.random.key)(seeds)
        prefilled = prefill(self.model, self._params, tokens, lengths, limits, keys, T)
        self._state = refill(self._state, prefilled, rows, np.arange(P), keys)

    def _decode(self) -> None:
        """Decode a chunk, and deliver the new tokens of each request."""
        active = np.array([owner is not None for owner in self._owners])
        config = self.model.config
        sampling = row_sampling(
            [owner.sampling if owner else IDLE for owner in self._owners], config.vocab_size
        )
        stop_ids = jnp.array(self.stop_ids)
        state = decode_rows(
            self.model, self._params, self._state, active, sampling, stop_ids, self.vocab_size
        )
        tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
        self._state, longest = state, 0
        for row, request in enumerate(self._owners):
            if request is None:
                continue
            new = tokens[row, request.delivered : lengths[row]].tolist()
            request.delivered = int(lengths[row])
            reason = None
            if done[row]:
                reason, self._owners[row] = "stop" if new[-1] in self.stop_ids else "length", None
            else:
                longest = max(longest, request.delivered)
            if new:
                request.on_tokens(new, reason)
        if longest == state.tokens.shape[1]:
            self._state = resize_jit(state, self._size(longest + 1))

    def _score_next(self) -> None:
        """Score the next text that waits."""
        with self._changed:
            while self._to_score and self._to_score[0].canceled:
                self._to_score.popleft()
            request = self._to_score[0] if self._to_score else None
        if request is None:
            return
        count = len(request.tokens)
        tokens = np.zeros(self._size(max(count, MIN_SLOTS)), np.int32)
        tokens[:count] = request.tokens
        scores = jax.device_get(score_tokens(self.model, self._params, tokens, self.vocab_size))
        with self._changed:
            self._to_score.popleft()  # only now: an error above is delivered to it too
        request.on_scores(Scores(*(each[:count] for each in scores)))

    def _size(self, length: int) -> int:
        """`length` rounded up to one of a few sizes, at most max_length."""
        size = MIN_SLOTS
        while size < length:
            size *= GROWTH
        return min(size, self.max_length)


IDLE = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=1)
