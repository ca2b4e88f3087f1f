"""Two answers to a prompt, made before a rater has to wait for them."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict

from jaxllm.serve.board import ComparisonQueue, Comparison, Messages, Offer
from jaxllm.serve.errors import ApiError
from jaxllm.serve.speaker import ServedModel, together
from jaxllm.data.sources import BadRow
from jaxllm.rollout.sampling import SamplingConfig

TRIES = 4  # two answers that are the same, or one that is empty, teach nothing
AHEAD = 2  # comparisons that are ready when somebody asks


class Comparing:
    """Lets the speakers answer, and the raters have what is new to them."""

    def __init__(self, board: ComparisonQueue, speakers: Sequence[ServedModel], sampling: SamplingConfig, seed: int):
        self.board, self.speakers, self.sampling = board, list(speakers), sampling
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task] = set()

    async def next(self, rater: str) -> Offer | None:
        """What this rater is to judge; None if there is nothing left for them."""
        while (offer := await asyncio.to_thread(self.board.offer, rater)) is None:
            if (task := self._start()) is not None:
                await asyncio.shield(task)  # others may want it if this rater goes
            elif self._tasks:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            else:
                return None
        if self.board.unclaimed + len(self._tasks) < AHEAD:
            self._start()
        return offer

    async def ask(self, rater: str, prompt: Messages) -> Offer | None:
        """Two answers to a rater's own prompt; None if the speakers give none that differ."""
        made = await self._make(prompt)
        if made is None:
            return None
        self.board.add(made, from_prompts=False)
        return await asyncio.to_thread(self.board.offer, rater, made)

    def _start(self) -> asyncio.Task | None:
        """Answer the next prompt, if there is one."""
        prompt = self.board.take_prompt()
        if prompt is None:
            return None
        task = asyncio.create_task(self._answer(prompt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # told to who waits for it
        return task

    async def _answer(self, prompt: Messages) -> None:
        try:
            made = await self._make(prompt)
        except ApiError as error:
            if error.status >= 500:
                self.board.put_back(prompt)
                raise
            made = None  # this one cannot be answered, and never will be
        if made is None:
            self.board.skip()
        else:
            self.board.add(made)

    async def _make(self, prompt: Messages) -> Comparison | None:
        for _ in range(TRIES):
            speakers = self._random.sample(self.speakers, 2) if len(self.speakers) > 1 else self.speakers * 2
            seeds = [self._random.getrandbits(32) for _ in speakers]
            limit = self.sampling.max_new_tokens
            said = await together(
                speaker.answer(speaker.prompt(prompt, limit), self.sampling, seed)
                for speaker, seed in zip(speakers, seeds, strict=True)
            )
            answers = [each.text.strip() for each in said]
            if answers[0] != answers[1] and all(
                can_be_learnt(speaker, prompt, answer)
                for speaker, answer in zip(speakers, answers, strict=True)
            ):
                checkpoints = [speaker.checkpoint for speaker in speakers]
                return Comparison(prompt, answers, seeds, checkpoints, asdict(self.sampling))
        return None


def can_be_learnt(speaker: ServedModel, prompt: Messages, answer: str) -> bool:
    """Whether a reward model could read it: it is not empty and does not spell out special tokens."""
    try:
        speaker.template.encode([*prompt, {"role": "assistant", "content": answer}], loss_on="last")
    except BadRow:
        return False
    return True
