"""Prompts answered and the answers judged: for rollouts, for evaluation, and by experiments/answer.py."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.rewards import Judge
from jaxllm.data.prompts import Prompt
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.evaluation.pass_at_k import pass_at_k
from jaxllm.evaluation.preference import mean
from jaxllm.losses import overlong_penalty
from jaxllm.rewards.pool import Scores
from jaxllm.rollout.generate import Completions, bucket
from jaxllm.rollout.sampling import SamplingConfig


class Answers(NamedTuple):
    """N answers to N prompts, with their rewards."""

    said: Completions
    texts: list[str]
    tokens: np.ndarray  # int32 [N, T], prompts and answers
    prompt_lengths: np.ndarray  # int [N]
    lengths: np.ndarray  # int [N], tokens of the answers
    truncated: np.ndarray  # bool [N]
    rewards: np.ndarray  # float32 [N]: scores.total, and what an answer's length costs
    scores: Scores
    seconds: float  # spent on waiting for rewards when all was said


class Answering(NamedTuple):
    """All that it takes to answer, but for the parameters."""

    sample: Callable[..., Completions]  # (params, prompts, **options of `collect`)
    tokenizer: BaseTokenizer
    stop_ids: Sequence[int]
    judge: Judge
    length: int  # T; more where a prompt with its answer is longer

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        sampling: SamplingConfig,
        keys: jax.Array,
        check: Callable[[], None],
    ) -> Answers:
        """group_size answers to each prompt, one beside another."""
        asked = [prompt for prompt in prompts for _ in range(group_size)]
        judging = self.judge.judging([prompt.row for prompt in asked])
        texts = [""] * len(asked)

        def said(numbers: list[int], completions: list[list[int]]) -> None:
            for i, tokens in zip(numbers, completions, strict=True):
                texts[i] = self.tokenizer.decode(tokens, from_start=False)
            judging.add(numbers, [texts[i] for i in numbers])

        completions = self.sample(
            params,
            [prompt.ids for prompt in prompts],
            group_size=group_size,
            sampling=sampling,
            stop_ids=self.stop_ids,
            keys=keys,
            check=check,
            on_done=said,
        )
        began = time.perf_counter()
        prompt_lengths = np.array([len(prompt.ids) for prompt in asked])
        lengths = np.array([len(tokens) for tokens in completions.tokens])
        longest = int((prompt_lengths + lengths).max())
        T = self.length if longest <= self.length else bucket(longest)
        tokens = np.full((len(asked), T), self.tokenizer.pad_id, np.int32)
        for i, (prompt, ids) in enumerate(zip(asked, completions.tokens, strict=True)):
            tokens[i, : prompt_lengths[i] + lengths[i]] = [*prompt.ids, *ids]
        scores = judging.result(tokens, prompt_lengths + lengths, check)
        truncated = np.array([reason != "stop" for reason in completions.stop_reasons])
        config = self.judge.config
        rewards = scores.total + np.float32(config.missing_stop) * truncated
        if config.overlong_buffer:
            limit, buffer = sampling.max_new_tokens, config.overlong_buffer
            rewards += np.asarray(overlong_penalty(lengths, limit=limit, buffer=buffer))
        return Answers(
            said=completions,
            texts=texts,
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            truncated=truncated,
            rewards=rewards,
            scores=scores,
            seconds=time.perf_counter() - began,
        )


def answer_metrics(answers: Answers, group_size: int, prefix: str) -> dict[str, float]:
    """Means over prompts of their groups' means, with the standard error over prompts, which are independent
    of each other where answers to one prompt are not.

    `reward`, `reward/NAME` of each reward, `length`, `stopped_fraction`; and `pass@k` for k of 1, 2, 4, ...
    if there is a reward function: an answer is right where the first one gives 1.
    """
    columns = dict(answers.scores.by_name)
    if columns:
        columns = {"reward": answers.rewards} | {f"reward/{name}": x for name, x in columns.items()}
    columns |= {"length": answers.lengths, "stopped_fraction": ~answers.truncated}
    columns = {name: group_means(values.reshape(-1, group_size)) for name, values in columns.items()}
    first = next(iter(answers.scores.by_name), "model")
    if first != "model":
        right = answers.scores.by_name[first].reshape(-1, group_size) == 1
        k = 1
        while k <= group_size:
            columns[f"pass@{k}"] = pass_at_k(right, k)
            k *= 2
    row = {}
    for name, values in columns.items():
        row[f"{prefix}{name}"], row[f"{prefix}{name}_se"] = mean(values)
    return row


def group_means(values: np.ndarray) -> np.ndarray:
    """The mean of each row's numbers; rows of NaN alone, to which a reward does not apply, are left out."""
    applies = ~np.isnan(values.astype(np.float64))
    values, applies = values[applies.any(1)], applies[applies.any(1)]
    return np.where(applies, values, 0.0).sum(1) / applies.sum(1)


def answer_rows(answers: Answers) -> Iterator[dict[str, Any]]:
    """What was found out about each answer, as JSON."""
    for i, text in enumerate(answers.texts):
        yield {
            "completion": text,
            "tokens": int(answers.lengths[i]),
            "ended": not answers.truncated[i],
            "reward": float(answers.rewards[i]),
            "rewards": {
                name: None if np.isnan(values[i]) else float(values[i])  # None: does not apply
                for name, values in answers.scores.by_name.items()
            },
        }
