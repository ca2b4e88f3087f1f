"""Scores of answers, higher is better: by a reward model, or by a chat model that a rubric is shown to."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxllm.command_line import named_as_flags
from jaxllm.data.chat_template import load_template
from jaxllm.data.preferences import encode_completion
from jaxllm.data.sources import BadRow
from jaxllm.evaluation.completions import ROWS
from jaxllm.rewards.reward_model import RewardModel, check_reward_model
from jaxllm.runs.checkpoints import (
    inference_dtype,
    local_mesh,
    read_metadata,
    read_model,
    read_tokenizer,
    saved_template,
)
from jaxllm.synthesize.config import JudgeConfig
from jaxllm.synthesize.writers import Check, Writer

COMPARISON = "Reply with one line: Better: A, or Better: B."
_SCORE = re.compile(r"[Ss]core\W{0,8}(\d+(?:\.\d+)?)")
_BETTER = re.compile(r"[Bb]etter\W{0,8}([AB])\b")
HIGHEST = 10.0  # score of a rubric; the lowest is 1


class Judged(NamedTuple):
    """What a judge makes of the answers to one instruction."""

    scores: list[float | None]  # one each; None where there is none
    # Of a chat model: the best and the worst answer, and the one of them that it names, if it names one, when
    # they are shown in this order and in the other.
    compared: list[int] | None = None
    verdicts: list[int | None] | None = None


class Judge(Protocol):
    """What scores answers."""

    @property
    def identity(self) -> dict[str, str]:
        """As in `Writer`; empty where nothing judges."""
        ...

    def __call__(
        self, instructions: Sequence[str], answers: Sequence[Sequence[str]], keys: jax.Array, check: Check
    ) -> list[Judged]:
        """One entry for each instruction; `keys` has one each."""
        ...


class NoJudge:
    """All answers count alike."""

    def __init__(self):
        self.identity: dict[str, str] = {}

    def __call__(
        self, instructions: Sequence[str], answers: Sequence[Sequence[str]], keys: jax.Array, check: Check
    ) -> list[Judged]:
        """As in `Judge`."""
        return [Judged([None] * len(each)) for each in answers]


class RewardJudge:
    """A run of a reward model. It reads the texts with its own tokenizer and chat template, so that any model
    may have written them."""

    def __init__(self, config: JudgeConfig, *, dtype: str | None):
        """ConfigError where judge.model is no reward model, or cannot be normalized."""
        path = str(config.model)
        with named_as_flags({"reward.": "judge."}):
            folder = check_reward_model(path)
            self.tokenizer = read_tokenizer(folder)
            clock = read_metadata(folder).get("clock")
            self.template = load_template(self.tokenizer, saved_template(folder), clock)
            self.longest = read_model(folder).max_length
            self.model = RewardModel(
                path,
                self.tokenizer,
                self.template,
                normalize=config.normalize,
                rows=ROWS,
                length=self.longest,
                mesh=local_mesh,
                dtype=inference_dtype(dtype),
            )
        self.identity = {"model": path, "hash": self.model.hash}

    def __call__(
        self, instructions: Sequence[str], answers: Sequence[Sequence[str]], keys: jax.Array, check: Check
    ) -> list[Judged]:
        """As in `Judge`; None for an answer that the reward model cannot read, as one that is empty."""
        encoded = [
            self.encode(instruction, text)
            for instruction, texts in zip(instructions, answers, strict=True)
            for text in texts
        ]
        lengths = np.array([len(ids) for ids in encoded if ids], np.int32)
        tokens = np.full((len(lengths), self.longest), self.tokenizer.pad_id, np.int32)
        for row, ids in zip(tokens, filter(None, encoded), strict=True):
            row[: len(ids)] = ids
        check()
        found = iter(self.model.normalized(self.model(tokens, lengths)).tolist() if len(lengths) else ())
        scores = iter([next(found) if ids else None for ids in encoded])
        return [Judged([next(scores) for _ in texts]) for texts in answers]

    def encode(self, instruction: str, answer: str) -> list[int]:
        """The ids of a conversation; none where they cannot be read."""
        prompt, turn = {"role": "user", "content": instruction}, {"role": "assistant", "content": answer}
        try:
            ids = encode_completion(self.template, [prompt], turn).ids
        except BadRow:
            return []
        return ids if len(ids) <= self.longest else []


class RubricJudge:
    """A chat model that scores each answer from 1 to 10 by a rubric, and compares the best with the worst, in
    both orders since such judges prefer a place."""

    def __init__(self, config: JudgeConfig, writer: Writer):
        self.config, self.writer, self.identity = config, writer, writer.identity

    def __call__(
        self, instructions: Sequence[str], answers: Sequence[Sequence[str]], keys: jax.Array, check: Check
    ) -> list[Judged]:
        """As in `Judge`; None for a reply without a score."""
        rubric = self.config.rubric
        asked = [
            f"{rubric}\n\nInstruction:\n{instruction}\n\nAnswer:\n{text}\n\n"
            f"Reply with one line: Score: a number from 1 to {HIGHEST:g}."
            for instruction, texts in zip(instructions, answers, strict=True)
            for text in texts
        ]
        replies = iter(self.ask(asked, keys, 0, check))
        scores = [[read_score(next(replies)) for _ in texts] for texts in answers]
        pairs = [extremes(each) for each in scores]
        compared = [
            f"{rubric}\n\nInstruction:\n{instruction}\n\nAnswer A:\n{texts[first]}\n\n"
            f"Answer B:\n{texts[second]}\n\n{COMPARISON}"
            for instruction, texts, pair in zip(instructions, answers, pairs, strict=True)
            if pair
            for first, second in (pair, pair[::-1])
        ]
        replies = iter(self.ask(compared, keys, 1, check))
        judged = []
        for each, pair in zip(scores, pairs, strict=True):
            verdicts = [read_verdict(next(replies), order) for order in (pair, pair[::-1])] if pair else None
            judged.append(Judged(each, list(pair) if pair else None, verdicts))
        return judged

    def ask(self, prompts: Sequence[str], keys: jax.Array, number: int, check: Check) -> list[str]:
        """A reply to each prompt; "" to one that is too long."""
        sampling = self.config.sampling
        conversations: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text in prompts]
        fit = [not self.writer.problem(messages, sampling.max_new_tokens) for messages in conversations]
        chosen = [messages for messages, fits in zip(conversations, fit, strict=True) if fits]
        if not chosen:
            return [""] * len(prompts)
        own = jax.random.split(jax.random.fold_in(keys[0], number), len(chosen))
        written = self.writer.complete(chosen, group_size=1, sampling=sampling, keys=own, check=check)
        replies = iter(written)
        return [next(replies).text if fits else "" for fits in fit]


def read_score(reply: str) -> float | None:
    """The last number after "Score", if it is from 1 to 10."""
    found = [float(each) for each in _SCORE.findall(reply)]
    return found[-1] if found and 1 <= found[-1] <= HIGHEST else None


def read_verdict(reply: str, order: Sequence[int]) -> int | None:
    """The answer, of those that were shown as A and B, that a reply names last."""
    found = _BETTER.findall(reply)
    return order["AB".index(found[-1])] if found else None


def extremes(scores: Sequence[float | None]) -> tuple[int, int] | None:
    """The first answer with the highest score, and the first with the lowest; None where all are equal."""
    known = {i: score for i, score in enumerate(scores) if score is not None}
    if len(set(known.values())) < 2:
        return None
    return max(known, key=known.__getitem__), min(known, key=known.__getitem__)
