"""Generates pairs of answers for raters to compare, some ahead of time so that raters need not wait."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict

from jaxllm.data.sources import BadRow
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve.comparison_queue import Comparison, ComparisonQueue, Messages, Offer
from jaxllm.serve.errors import ApiError
from jaxllm.serve.served_model import ServedModel, gather

MAX_ATTEMPTS = 4  # to generate two answers that differ and that a reward model can train on
PREFETCH = 2  # comparisons to have ready for the next raters


class PairGenerator:
    """Fills a queue with comparisons as raters ask for them."""

    def __init__(
        self, queue: ComparisonQueue, models: Sequence[ServedModel], sampling: SamplingConfig, seed: int
    ):
        """Two of the models, chosen at random, generate each pair; a single model generates both answers."""
        self.queue, self.models, self.sampling = queue, list(models), sampling
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task] = set()

    async def next(self, rater: str) -> Offer | None:
        """What this rater compares next; None if nothing is left for them."""
        while (offer := await asyncio.to_thread(self.queue.offer, rater)) is None:
            if (task := self._start()) is not None:
                await asyncio.shield(task)  # another rater can use the pair if this one disconnects
            elif self._tasks:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            else:
                return None
        if self.queue.unclaimed + len(self._tasks) < PREFETCH:
            self._start()
        return offer

    async def compare(self, rater: str, prompt: Messages) -> Offer | None:
        """Two answers to a rater's own prompt; None if no usable pair could be generated."""
        comparison = await self._generate(prompt)
        if comparison is None:
            return None
        self.queue.add(comparison, from_prompts=False)
        return await asyncio.to_thread(self.queue.offer, rater, comparison)

    def _start(self) -> asyncio.Task | None:
        """Starts on the next prompt, if there is one."""
        prompt = self.queue.take_prompt()
        if prompt is None:
            return None
        task = asyncio.create_task(self._generate_for_queue(prompt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Only a rater who waits for the task sees its exception; reading it here avoids asyncio's warning.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def _generate_for_queue(self, prompt: Messages) -> None:
        try:
            comparison = await self._generate(prompt)
        except ApiError as error:
            if error.status >= 500:
                self.queue.put_back(prompt)
                raise
            comparison = None  # the prompt itself is at fault, so a retry would fail too
        if comparison is None:
            self.queue.skip()
        else:
            self.queue.add(comparison)

    async def _generate(self, prompt: Messages) -> Comparison | None:
        for _ in range(MAX_ATTEMPTS):
            models = self._random.sample(self.models, 2) if len(self.models) > 1 else self.models * 2
            seeds = [self._random.getrandbits(32) for _ in models]
            limit = self.sampling.max_new_tokens
            completions = await gather(
                model.generate(model.encode(prompt, limit), self.sampling, seed)
                for model, seed in zip(models, seeds, strict=True)
            )
            answers = [completion.text.strip() for completion in completions]
            if answers[0] != answers[1] and all(
                trainable(model, prompt, answer) for model, answer in zip(models, answers, strict=True)
            ):
                checkpoints = [model.checkpoint for model in models]
                return Comparison(prompt, answers, seeds, checkpoints, asdict(self.sampling))
        return None


def trainable(model: ServedModel, prompt: Messages, answer: str) -> bool:
    """Whether a reward model can train on the answer: it is not empty and spells out no special token."""
    try:
        model.template.encode([*prompt, {"role": "assistant", "content": answer}], loss_on="last")
    except BadRow:
        return False
    return True
