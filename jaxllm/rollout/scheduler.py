"""Continuous batching: which request each row of a batch decodes, and how large batch and cache are.

Shapes: B rows, P prompts read together, R rows started together, T prompt positions, S cache slots.

The host schedules a few compiled programs of fixed shapes: one reads P prompts; one copies them into R free
rows, once for each of their completions; one decodes a chunk of steps in all rows. Between chunks, rows of
finished requests become free, the cache grows or shrinks to the longest row, and the batch shrinks to the
rows that are left. A request holds its tokens so far, so that one whose row is released can be started again:
it is read again, and the draw at position t of its completion uses fold_in(key, t) as before.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from jaxllm.models import Model, Params
from jaxllm.parallel.global_arrays import to_host
from jaxllm.rollout.decode import (
    DecodeState,
    Starts,
    free_rows,
    keep_rows,
    prefill,
    resize,
    start_rows,
    unstack,
)

MARGIN = 32  # slots beyond the longest row that are kept when the cache shrinks: fewer would only add copies


@dataclass(eq=False)
class Request:
    """A prompt to be completed, and its completion so far."""

    tokens: list[int]  # of both
    prompt_length: int
    limit: int  # most tokens of both
    key: np.ndarray  # the data of its PRNG key
    log_probs: list[float] = field(default_factory=list)  # nats, of the completion's tokens
    length: int = 0  # tokens that its row has; `Scheduler.update` brings the last of them into `tokens`

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.prompt_length :]


AnyRequest = TypeVar("AnyRequest", bound=Request)


class Scheduler(Generic[AnyRequest]):
    """Rows that decode together, each for a request."""

    def __init__(self, model: Model, params: Params, batches: Sequence[int], sizes: Sequence[int]):
        """`batches` are the numbers of rows that it may shrink to, the first one last; `sizes`, ascending,
        those of prompt positions and of cache slots: it starts with the second one. Each pair may compile a
        program to decode."""
        self.model, self.params = model, unstack(params)
        self.batches, self.sizes = batches, sizes
        self.requests: list[AnyRequest | None] = [None] * batches[-1]  # of each row
        self.ready: deque[tuple[AnyRequest, int]] = deque()  # requests that are read, and where in `_read`
        self.steps = 0  # decode steps so far
        self._read: tuple[np.ndarray, Any] | None = None  # tokens [P, T] of prompts, and their cache
        self._least = sizes[min(1, len(sizes) - 1)]
        self._state = free_rows(model, batches[-1], self._least)

    @property
    def free(self) -> list[int]:
        """The rows without a request."""
        return [row for row, request in enumerate(self.requests) if request is None]

    @property
    def active(self) -> list[AnyRequest]:
        """The requests that have a row."""
        return [request for request in self.requests if request is not None]

    @property
    def slots(self) -> int:
        return self._state.tokens.shape[1]

    def size(self, length: int) -> int:
        """The smallest size for so many tokens, or the largest."""
        return next((size for size in self.sizes if size >= length), self.sizes[-1])

    def read(self, waiting: deque[AnyRequest], P: int) -> None:
        """Read the tokens of the first requests, at most P different ones, and make these `ready`."""
        texts: list[list[int]] = []
        self.ready.clear()
        while waiting and (len(texts) < P or texts[-1] == waiting[0].tokens):
            if texts[-1:] != [waiting[0].tokens]:
                texts.append(waiting[0].tokens)
            self.ready.append((waiting.popleft(), len(texts) - 1))
        tokens = np.zeros((P, self.size(max(map(len, texts)))), np.int32)
        for row, text in zip(tokens, texts, strict=False):
            row[: len(text)] = text
        self._read = tokens, prefill(self.model, self.params, tokens)

    def start(self, R: int) -> None:
        """Give free rows to requests that are ready, at most R."""
        assert self._read is not None
        chosen = [self.ready.popleft() for _ in range(min(R, len(self.ready), len(self.free)))]
        rows = self.free[: len(chosen)] + [len(self.requests)] * (R - len(chosen))
        chosen_or_last = chosen + chosen[-1:] * (R - len(chosen))
        requests, sources = zip(*chosen_or_last, strict=True)
        for row, (request, _) in zip(rows, chosen, strict=False):
            self.requests[row], request.length = request, len(request.tokens)
        lengths = [len(request.tokens) for request in requests]
        tokens, cache = self._read
        self._resize(max(self.slots, tokens.shape[1]))
        starts = Starts(
            np.array(rows, np.int32),
            np.array(sources, np.int32),
            np.array([request.prompt_length for request in requests], np.int32),
            np.array(lengths, np.int32),
            np.array([request.limit for request in requests], np.int32),
            np.stack([request.key for request in requests]),
        )
        self._state = start_rows(self._state, tokens, cache, starts)
        if not self.ready:
            self._read = None  # frees the cache

    def decode(
        self, program: Callable[..., DecodeState], max_steps: int, min_rows: int, **options: Any
    ) -> list[AnyRequest]:
        """Decode at most max_steps steps, or until at most min_rows rows are active or the cache is full.

        Args:
          program: `decode` or `decode_by_row`, with these options.

        Returns:
          The requests that are finished; their rows are free.
        """
        self.fit()
        active = np.array([request is not None for request in self.requests])
        self._state = program(self.model, self.params, self._state, active, max_steps, min_rows, **options)
        done, lengths, steps = to_host((self._state.done, self._state.lengths, self._state.steps))
        self.steps += int(steps)
        finished = [request for request, ended in zip(self.requests, done, strict=True) if request and ended]
        for request, length in zip(self.requests, lengths, strict=True):
            if request is not None:
                request.length = int(length)
        if finished:
            self.update()
        for request in finished:
            self.release(request)
        return finished

    def update(self) -> None:
        """Give all requests that have a row their tokens so far."""
        if all(len(request.tokens) == request.length for request in self.active):
            return  # nothing to read from the device
        tokens, log_probs = to_host((self._state.tokens, self._state.log_probs))
        for row, request in enumerate(self.requests):
            if request is not None:
                new = slice(len(request.tokens), request.length)
                request.tokens += tokens[row, new].tolist()
                request.log_probs += log_probs[row, new].tolist()

    def release(self, request: AnyRequest) -> None:
        """Stop decoding a request: its row is free."""
        self.requests[self.requests.index(request)] = None

    def smaller_batch(self) -> int:
        """The next smaller number of rows; 0 where there is none."""
        return max((rows for rows in self.batches if rows < len(self.requests)), default=0)

    def shrink(self) -> None:
        """Decode in the smallest batch that has room for the active requests, once there are any."""
        rows = next(rows for rows in self.batches if rows >= len(self.active))
        if not self.active or rows == len(self.requests):
            return
        kept = np.argsort([request is None for request in self.requests], stable=True)[:rows]
        self._state = keep_rows(self._state, kept)
        self.requests = [self.requests[row] for row in kept]

    def fit(self) -> None:
        """Grow or shrink the cache to the longest row, which gets another slot at least."""
        longest = max((request.length for request in self.active), default=0)
        self._resize(max(self.size(longest + 1), min(self.slots, self.size(longest + MARGIN)), self._least))

    def _resize(self, slots: int) -> None:
        if slots != self.slots:
            self._state = resize(self._state, slots)
