"""Answers to many requests that come and go: one thread owns the model, and a fixed number of rows decode
together, whoever asked for them.

Shapes: B rows, S cache slots, T prompt positions, P prompts read together.

Every few steps the decode loop stops, says what is new to those who asked, forgets who has gone, and lets
waiting requests in: a compiled program reads P prompts, another copies them into free rows. What a request is
told depends on its own prompt, sampling and seed alone; sampling is an array a row, so nobody waits for
others who sample alike. S and T take a few sizes, each four times the one before: a size is a program, and
while one compiles all wait.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import RunError
from jaxllm.models import Model
from jaxllm.models.transformer import Params
from jaxllm.rollout.collect import idle, refill
from jaxllm.rollout.generate import DecodeState, check_prompts, decode_steps, prefill, resize_jit, unstack
from jaxllm.rollout.sampling import RowSampling, SamplingConfig, row_sampling, sample_rows

STRETCH = 8  # decode steps, at most, before new tokens are said and new requests are let in
SHORTEST = 32  # prompt positions
GROWTH = 4  # from one size to the next
TOGETHER = 8  # prompts read at once where more than one waits


class Busy(RunError):
    """As many requests wait as may."""


@dataclass(eq=False)
class Request:
    """Something to be continued."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    seed: int
    say: Callable[[list[int], str | None], None]
    end: int = 0  # tokens of prompt and completion that are said
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody listens any more: its row is free from the next stop on."""
        self.cancelled = True


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_rows(
    model: Model,
    params: Params,
    state: DecodeState,
    live: jax.Array,
    sampling: RowSampling,
    stop_ids: jax.Array,
) -> DecodeState:
    """At most STRETCH steps of the rows that somebody listens to, each sampled in its own way."""

    def draw(logits, keys):
        tokens = sample_rows(logits, keys, sampling)
        return tokens, jnp.zeros(tokens.shape, jnp.float32)  # nobody asks for log-probs

    # Counted from 0 each time: a server that stays up would overflow an int32.
    state = state._replace(done=state.done | ~live, steps=jnp.int32(0))
    return decode_steps(model, params, state, stop_ids, STRETCH, 0, draw)


class Engine:
    """Continues prompts, as many at once as there are rows."""

    def __init__(
        self, model: Model, params: Params, *, stop_ids: Sequence[int], rows: int = 16, max_waiting: int = 64
    ):
        """Starts its thread. `max_waiting`: requests beyond the rows that may wait for one."""
        self.model, self.stop_ids, self.max_waiting = model, tuple(stop_ids), max_waiting
        self._params, self._rows = unstack(params), rows
        self._first_slots = self._size(GROWTH * SHORTEST)
        self._state = idle(model, jax.random.split(jax.random.key(0), rows), self._first_slots)
        self._owners: list[Request | None] = [None] * rows
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed, self._error = False, None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        sampling: SamplingConfig,
        seed: int,
        say: Callable[[list[int], str | None], None],
    ) -> Request:
        """Say what `generate` says with jax.random.key(seed), 0 <= seed < 2**32.

        `say(tokens, reason)` is called from the engine's thread with a few tokens at a time and must return
        at once; `reason` is None until the last call: "stop", "length", or "error" (the engine has ended).
        Raises DataError for a prompt that the model cannot read, and Busy.
        """
        check_prompts(self.model, [prompt], self.stop_ids, np.zeros(1))
        request = Request(prompt, sampling, seed, say, end=len(prompt))
        with self._changed:
            if self._closed:
                raise RunError(f"the engine has ended: {self._error or 'it was closed'}")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting already: try again in a moment")
            self._waiting.append(request)
            self._changed.notify()
        return request

    @property
    def occupied(self) -> int:
        """Requests that are being answered or wait."""
        return sum(owner is not None for owner in self._owners) + len(self._waiting)

    def close(self) -> None:
        """Answer nothing more; those who still listen are told "error"."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._await_work():
                self._admit()
                self._decode()
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._closed = True
                unanswered = [owner for owner in self._owners if owner] + list(self._waiting)
                self._waiting.clear()
            for request in unanswered:
                request.say([], "error")

    def _await_work(self) -> bool:
        """Forget who has gone, wait until there is something to do; False: to end."""
        self._owners = [owner and (None if owner.cancelled else owner) for owner in self._owners]
        if not any(self._owners) and self._state.tokens.shape[1] > self._first_slots:
            self._state = resize_jit(self._state, self._first_slots)  # may compile: not with the lock
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or any(self._owners))
            return not self._closed

    def _admit(self) -> None:
        """Read the prompts of waiting requests into free rows."""
        free = [row for row, owner in enumerate(self._owners) if owner is None]
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
            count = min(len(free), len(self._waiting), TOGETHER)
            new = [self._waiting.popleft() for _ in range(count)]
            for row, request in zip(free, new, strict=False):
                self._owners[row] = request
        if not new:
            return
        P = 1 if count == 1 else TOGETHER
        lengths = np.ones(P, np.int32)
        lengths[:count] = [len(request.prompt) for request in new]
        T = self._size(max(lengths.max(), SHORTEST))
        tokens, limits, seeds = np.zeros((P, T), np.int32), lengths.copy(), np.zeros(P, np.uint32)
        rows, longest = np.full(P, self._rows), self.model.config.max_length  # row B: nowhere
        for i, request in enumerate(new):
            tokens[i, : lengths[i]], seeds[i], rows[i] = request.prompt, request.seed, free[i]
            limits[i] = min(len(request.prompt) + request.sampling.max_new_tokens, longest)  # no int32 yet
        if self._state.tokens.shape[1] < T:
            self._state = resize_jit(self._state, T)
        keys = jax.vmap(jax.random.key)(seeds)
        read = prefill(self.model, self._params, tokens, lengths, limits, keys, T)
        self._state = refill(self._state, read, rows, np.arange(P), keys)

    def _decode(self) -> None:
        """A stretch of tokens, said to whom they are for."""
        live = np.array([owner is not None for owner in self._owners])
        config = self.model.config
        sampling = row_sampling(
            [owner.sampling if owner else IDLE for owner in self._owners], config.vocab_size
        )
        state = decode_rows(self.model, self._params, self._state, live, sampling, jnp.array(self.stop_ids))
        tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
        self._state, longest = state, 0
        for row, request in enumerate(self._owners):
            if request is None:
                continue
            said = tokens[row, request.end : lengths[row]].tolist()
            request.end = int(lengths[row])
            reason = None
            if done[row]:
                reason, self._owners[row] = "stop" if said[-1] in self.stop_ids else "length", None
            else:
                longest = max(longest, request.end)
            if said:
                request.say(said, reason)
        if longest == state.tokens.shape[1]:
            self._state = resize_jit(state, self._size(longest + 1))

    def _size(self, length: int) -> int:
        """`length` rounded up to one of a few sizes, as far as the model reaches."""
        size = SHORTEST
        while size < length:
            size *= GROWTH
        return min(size, self.model.config.max_length)


IDLE = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=1)
