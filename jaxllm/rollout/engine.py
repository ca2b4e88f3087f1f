"""Serving by continuous batching: one thread owns the model, and a fixed number of rows decode together the
completions of requests that come and go.

Every few steps the scheduler stops decoding, new tokens are delivered, the rows of finished and canceled
requests become free, and waiting requests take them. A completion depends only on its own prompt, sampling
and seed. Sampling parameters are arrays with an entry a row, so that requests with different ones decode
together. Prompt positions and cache slots take a few sizes, each four times the one before: every size
compiles a program, and all requests wait while it compiles. The longest request sets the slots of all rows,
so `max_length` limits the memory of the cache.

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
from jaxllm.rollout.collect import check_prompts, stop_reasons
from jaxllm.rollout.decode import decode_by_row
from jaxllm.rollout.sampling import SamplingConfig, row_sampling
from jaxllm.rollout.scheduler import Request as Decoding
from jaxllm.rollout.scheduler import Scheduler

CHUNK_STEPS = 8  # decode steps, at most, between deliveries of new tokens and admissions of new requests
MIN_SLOTS = 32  # prompt positions; a cache has GROWTH times as many slots, or more
GROWTH = 4  # from one size to the next
PREFILL_BATCH = 8  # prompts prefilled together where more than one waits
MAX_BATCHED_PROMPT = 512  # tokens; a longer prompt is prefilled alone, not with seven padded to its length
TOP_SCORES = 20  # most likely tokens whose log-probs `Engine.score` gives
SCORED_TOGETHER = 32  # positions whose logits are in memory at a time


class Busy(RunError):
    """The queue of waiting requests is full."""


@dataclass(eq=False, kw_only=True)
class Request(Decoding):
    """A prompt to be completed for someone who waits."""

    sampling: SamplingConfig
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
        sizes = [min(MIN_SLOTS, self.max_length)]
        while sizes[-1] < self.max_length:
            sizes.append(min(sizes[-1] * GROWTH, self.max_length))
        self._scheduler: Scheduler[Request] = Scheduler(model, params, [rows], sizes)
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
        limit = min(len(prompt) + sampling.max_new_tokens, self.max_length)
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        request = Request(
            list(prompt),
            len(prompt),
            limit,
            key,
            sampling=sampling,
            on_tokens=on_tokens,
            delivered=len(prompt),
        )
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
        return len(self._scheduler.active) + len(self._scheduler.ready) + len(self._waiting)

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
                if self._scheduler.active:
                    self._decode()
                self._score_next()
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._closed = True
                ready = [request for request, _ in self._scheduler.ready]
                unfinished = self._scheduler.active + ready + list(self._waiting)
                unscored = list(self._to_score)
                self._waiting.clear()
                self._to_score.clear()
            for request in unfinished:
                request.on_tokens([], "error")
            for request in unscored:
                request.on_scores(None)

    def _await_work(self) -> bool:
        """Free the rows of canceled requests, and wait for work. False if the engine is closed."""
        for request in self._scheduler.active:
            if request.canceled:
                self._scheduler.release(request)
        self._scheduler.fit()  # outside the lock, since it may compile
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._waiting or self._to_score or self._scheduler.active
            )
            return not self._closed

    def _admit(self) -> None:
        """Give free rows to waiting requests."""
        scheduler = self._scheduler
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.canceled)
            first = list(self._waiting)[: min(len(scheduler.free), PREFILL_BATCH)]
            short = list(itertools.takewhile(lambda each: len(each.tokens) <= MAX_BATCHED_PROMPT, first))
            new = deque(short or first[:1])
            for _ in new:
                self._waiting.popleft()
        if new:
            P = 1 if len(new) == 1 else PREFILL_BATCH
            scheduler.read(new, P)
            scheduler.start(P)

    def _decode(self) -> None:
        """Decode a chunk, and deliver the new tokens of each request."""
        scheduler = self._scheduler
        decoded = scheduler.active
        sampling = row_sampling(
            [request.sampling if request else IDLE for request in scheduler.requests],
            self.model.config.vocab_size,
        )
        finished = scheduler.decode(
            decode_by_row,
            CHUNK_STEPS,
            0,
            stop_ids=np.array(self.stop_ids, np.int32),
            sampling=sampling,
            vocab_size=self.vocab_size,
        )
        scheduler.update()
        for request in decoded:
            new, request.delivered = request.tokens[request.delivered :], len(request.tokens)
            reason = stop_reasons([new], self.stop_ids)[0] if request in finished else None
            if new:
                request.on_tokens(new, reason)

    def _score_next(self) -> None:
        """Score the next text that waits."""
        with self._changed:
            while self._to_score and self._to_score[0].canceled:
                self._to_score.popleft()
            request = self._to_score[0] if self._to_score else None
        if request is None:
            return
        count = len(request.tokens)
        tokens = np.zeros(self._scheduler.size(count), np.int32)
        tokens[:count] = request.tokens
        scores = jax.device_get(score_tokens(self.model, self._scheduler.params, tokens, self.vocab_size))
        with self._changed:
            self._to_score.popleft()  # only now: an error above is delivered to it too
        request.on_scores(Scores(*(each[:count] for each in scores)))


IDLE = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=1)
