"""Prompts answered and the answers judged: for rollouts, for evaluation, and by experiments/answer.py."""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxllm.runs.checkpoints import Loaded
from jaxllm.rewards.scorer import InBatches, RewardScorer, RewardConfig, RewardModel
from jaxllm.data.chat import renamed
from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.prompts import Prompt, question_messages
from jaxllm.data.sources import BadRow, open_source
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.pass_at_k import pass_at_k
from jaxllm.evaluation.preference import mean
from jaxllm.losses import overlong_penalty
from jaxllm.rollout.score import next_token_log_probs
from jaxllm.rewards.pool import Scores
from jaxllm.rollout.collect import collect
from jaxllm.rollout.generate import Completions, bucket
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.parallel.sharding import MeshConfig, make_mesh

T = TypeVar("T")

ROWS = 64  # answers of a checkpoint decoded, or scored, at a time


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
    judge: RewardScorer
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
        rewards = scores.total + np.float32(config.missing_eos_penalty) * truncated
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


class PlainText(NamedTuple):
    """In the place of a chat template, for a model that continues text: a prompt is the text itself."""

    tokenizer: BaseTokenizer
    source: str = ""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id,)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        text = "\n".join(message["content"] for message in messages)
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]


def read_prompts(
    name: str, question: Any, template: ChatTemplate | PlainText, *, longest: int, max_rows: int, seed: int
) -> list[Prompt]:
    """The first prompts of at most `longest` tokens of a source; what is left out goes to stderr.

    `question` has the fields `rename`, `prompt_format` and `system` of a PromptConfig.
    """

    def prompt(record: dict, messages: list[dict[str, str]]) -> Prompt:
        ids = template.prompt(messages)
        if len(ids) > longest:
            raise BadRow("prompt that leaves no room for --max_new_tokens", f"{len(ids)} tokens")
        return Prompt(ids, record)

    prompts = read_questions(name, question, prompt, split="validation", max_rows=max_rows, seed=seed)
    if not prompts:
        raise DataError(f"{name}: no row can be answered")
    return prompts


def read_questions(
    name: str, question: Any, make: Callable[[dict, list[dict]], T], *, split: str, max_rows: int, seed: int
) -> list[T]:
    """make(row, messages) of the first rows of a source; what it refuses with BadRow goes to stderr."""
    source = open_source(name, split=split, text_key=None, synthetic_rows=max_rows, seed=seed)
    made: list[T] = []
    for row in source.rows():
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail)
            record = renamed(row.value, question.rename)
            made.append(make(record, question_messages(record, question)[1]))
        except BadRow as error:
            print(f"left out: {row.where}: {error}", file=sys.stderr)
        if len(made) == max_rows:
            break
    return made


def answer_prompts(
    loaded: Loaded,
    template: ChatTemplate | PlainText,
    prompts: Sequence[Prompt],
    *,
    functions: Sequence[str],
    reward_model: str | None,
    samples: int,
    sampling: SamplingConfig,
    seed: int,
) -> Answers:
    """What a checkpoint says to each prompt, so many times, judged as `reward.functions` and `reward.model`
    of a config would."""
    rewards = RewardConfig(
        functions=tuple(functions),
        weights=(1.0,) * len(functions),
        model=reward_model,
        model_weight=1.0,
        normalize=True,
        workers=1,
        time_limit=5.0,
        error_reward=0.0,
        overlong_buffer=0,
        missing_eos_penalty=0.0,
    )
    longest = max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
    length = min(loaded.model.config.max_length, bucket(longest))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = None
    if reward_model is not None:
        model = RewardModel(rewards, loaded.tokenizer, template, rows=ROWS, length=length, mesh=mesh)
    with RewardScorer(rewards, model) as judge:
        answer = Answering(
            sample=functools.partial(collect, loaded.model, max_rows=ROWS),
            tokenizer=loaded.tokenizer,
            stop_ids=template.stop_ids,
            judge=judge,
            length=length,
        )
        return answer(
            loaded.params,
            prompts,
            group_size=samples,
            sampling=sampling,
            keys=jax.random.split(jax.random.key(seed), len(prompts) * samples),
            check=lambda: None,
        )


def kl_to(reference: Loaded, answers: Answers, temperature: float) -> np.ndarray:
    """Float32 [N], in nats: how much likelier each answer was to who gave it than it is to `reference`. Its
    mean over answers that were sampled unfiltered is the KL divergence of the one from the other."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    score = InBatches(
        lambda params, tokens: next_token_log_probs(
            params, tokens, model=reference.model, temperature=temperature
        )[0],
        ROWS,
        mesh,
    )
    found = score(reference.params, answers.tokens)
    starts, ends = answers.prompt_lengths - 1, answers.prompt_lengths - 1 + answers.lengths
    return np.array(
        [
            said.sum() - row[start:end].sum()
            for said, row, start, end in zip(answers.said.log_probs, found, starts, ends, strict=True)
        ],
        np.float32,
    )


def check_speaks(loaded: Loaded, flag: str) -> Loaded:
    """The checkpoint that a flag names; ConfigError where it is a reward model."""
    if loaded.stage == "reward_model":
        raise ConfigError(f"{flag} is a reward model, which says nothing: give another")
    return loaded


def answer_metrics(
    answers: Answers, group_size: int, prefix: str, kl: np.ndarray | None = None
) -> dict[str, float]:
    """Means over prompts of their groups' means, with the standard error over prompts, which are independent
    of each other where answers to one prompt are not.

    `reward`, `reward/NAME` of each reward, `length`, `stopped_fraction`, `kl` if it is given; and `pass@k`
    for k of 1, 2, 4, ... if there is a reward function: an answer is right where the first one gives 1.
    """
    columns = dict(answers.scores.by_name)
    if columns:
        columns = {"reward": answers.rewards} | {f"reward/{name}": x for name, x in columns.items()}
    columns |= {"length": answers.lengths, "stopped_fraction": ~answers.truncated}
    if kl is not None:
        columns["kl"] = kl
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


def answer_rows(answers: Answers, kl: np.ndarray | None = None) -> Iterator[dict[str, Any]]:
    """What was found out about each answer, as JSON."""
    for i, text in enumerate(answers.texts):
        known = {} if kl is None else {"kl": float(kl[i])}
        yield known | {
            "completion": text,
            "tokens": int(answers.lengths[i]),
            "ended": not answers.truncated[i],
            "reward": float(answers.rewards[i]),
            "rewards": {
                name: None if np.isnan(values[i]) else float(values[i])  # None: does not apply
                for name, values in answers.scores.by_name.items()
            },
        }
