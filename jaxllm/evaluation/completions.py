"""Completions of prompts, and their rewards: for rollouts, evaluation and experiments/evaluate.py."""

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.prompts import Prompt, PromptOptions, question_messages, question_tools
from jaxllm.data.records import Record, Rename
from jaxllm.data.sources import BadRow, open_source
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import DataError
from jaxllm.evaluation.left_out import print_left_out
from jaxllm.evaluation.pass_at_k import pass_at_k
from jaxllm.evaluation.preference import mean, numbered
from jaxllm.losses import overlong_penalty
from jaxllm.models import Params
from jaxllm.parallel.global_arrays import gather, share
from jaxllm.random_streams import EVALUATION, stream
from jaxllm.rewards.pool import Scores
from jaxllm.rewards.reward_model import RewardModel
from jaxllm.rewards.scorer import TRIAL_ROWS, RewardConfig, RewardScorer, gather_processes
from jaxllm.rollout.collect import Completions, bucket, collect, gather_completions
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.rollout.score import log_probs_in_batches
from jaxllm.runs.checkpoints import LoadedModel, local_mesh
from jaxllm.runs.sampling_weights import SamplingWeights
from jaxllm.training.watchdog import leave_together

T = TypeVar("T")

_THOUGHT_TAGS = ("<think>", "</think>")
_OPENED_THOUGHT = re.compile(r"<think>\s*\Z")
_OPENED_TOKENS = 32  # enough for a tag of one token a byte

ROWS = 64  # completions of a checkpoint decoded, or scored, at a time


class ScoredCompletions(NamedTuple):
    """N completions of N prompts, with their rewards."""

    completions: Completions
    texts: list[str]  # as rewards read them: with the `<think>` that the prompt has opened
    tokens: np.ndarray  # int32 [N, T], prompts and completions
    prompt_lengths: np.ndarray  # int [N]
    lengths: np.ndarray  # int [N], tokens of the completions
    truncated: np.ndarray  # bool [N], completions without a stop token
    rewards: np.ndarray  # float32 [N]: scores.total and the penalties for length; NaN where it is not valid
    scores: Scores
    seconds: float  # spent waiting for rewards once all was generated


class Sample(Protocol):
    """`collect` of a model with everything fixed but these."""

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        keys: jax.Array,
        vocab_size: int,
        check: Callable[[], None],
        on_done: Callable[[list[int], list[list[int]]], None],
    ) -> Completions: ...


class Completer(NamedTuple):
    """Completes prompts and scores the completions; only the parameters are missing."""

    sample: Sample
    tokenizer: BaseTokenizer
    stop_ids: Sequence[int]
    scorer: RewardScorer
    length: int  # T; longer where a prompt with its completion is
    weights: SamplingWeights | None = None  # made of the parameters; None: they are this process's own

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        sampling: SamplingConfig,
        keys: jax.Array,
        check: Callable[[], None],
    ) -> ScoredCompletions:
        """group_size completions of each prompt, in consecutive rows.

        Of several processes each samples its own share of the prompts, if it can do so `alone`, and rewards
        it; all get the whole result. `check` may raise StopRequested at each process's own time.
        """
        own = share(len(prompts))
        scoring = self.scorer.begin([prompt.row for prompt in prompts[own] for _ in range(group_size)])
        texts = [""] * (own.stop - own.start) * group_size
        opened = [opened_thought(self.tokenizer, prompt.ids) for prompt in prompts[own]]

        def score(numbers: list[int], finished: list[list[int]]) -> None:
            for i, tokens in zip(numbers, finished, strict=True):
                texts[i] = opened[i // group_size] + with_thought_tags(self.tokenizer, tokens)
            scoring.add(numbers, [texts[i] for i in numbers])

        completions = self.complete(
            params,
            [prompt.ids for prompt in prompts],
            group_size=group_size,
            sampling=sampling,
            keys=keys,
            check=check,
            on_done=score,
        )
        began = time.perf_counter()
        scores = gather_processes(leave_together(lambda: scoring.result(check)))
        texts = [text for _, own_texts in gather({}, texts) for text in own_texts]
        repeated = [prompt for prompt in prompts for _ in range(group_size)]
        prompt_lengths = np.array([len(prompt.ids) for prompt in repeated])
        lengths = np.array([len(tokens) for tokens in completions.tokens])
        longest = int((prompt_lengths + lengths).max())
        width = self.length if longest <= self.length else bucket(longest)
        tokens = np.full((len(repeated), width), self.tokenizer.pad_id, np.int32)
        for i, (prompt, ids) in enumerate(zip(repeated, completions.tokens, strict=True)):
            tokens[i, : prompt_lengths[i] + lengths[i]] = [*prompt.ids, *ids]
        scores = self.scorer.finish(scores, tokens, prompt_lengths + lengths)
        truncated = np.array([reason != "stop" for reason in completions.stop_reasons])
        config = self.scorer.config
        rewards = scores.total + np.float32(config.missing_eos_penalty) * truncated
        if config.overlong_buffer:
            limit, buffer = sampling.max_new_tokens, config.overlong_buffer
            rewards += np.asarray(overlong_penalty(lengths, limit=limit, buffer=buffer))
        rewards[~scores.valid] = np.nan
        return ScoredCompletions(
            completions=completions,
            texts=texts,
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            truncated=truncated,
            rewards=rewards,
            scores=scores,
            seconds=time.perf_counter() - began,
        )

    def complete(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        sampling: SamplingConfig,
        keys: jax.Array,
        check: Callable[[], None],
        on_done: Callable[[list[int], list[list[int]]], None] = lambda numbers, tokens: None,
    ) -> Completions:
        """The completions of all prompts, without rewards. `on_done` is called for those of the process's own
        share of the prompts alone, which are numbered from 0."""
        own = share(len(prompts))
        alone = self.weights is None or self.weights.alone
        chosen = own if alone else slice(0, len(prompts))  # what this process samples
        first, last = ((i - chosen.start) * group_size for i in (own.start, own.stop))

        def own_done(numbers: list[int], tokens: list[list[int]]) -> None:
            found = [(i, ids) for i, ids in zip(numbers, tokens, strict=True) if first <= i < last]
            on_done([i - first for i, _ in found], [ids for _, ids in found])

        def sample_chosen() -> Completions:
            if chosen.start == chosen.stop:
                return Completions([], [], [], 0)
            return self.sample(
                params,
                prompts[chosen],
                group_size=group_size,
                sampling=sampling,
                stop_ids=self.stop_ids,
                keys=keys,
                vocab_size=self.tokenizer.vocab_size,
                check=check if alone else lambda: leave_together(check),
                on_done=own_done,
            )

        rows = slice(chosen.start * group_size, chosen.stop * group_size)
        if self.weights is not None:
            weights = self.weights.of(params, keys, rows)
        else:
            weights = nullcontext((params, keys if jax.process_count() == 1 else keys[rows]))
        with weights as (params, keys):
            completions = leave_together(sample_chosen)
        return gather_completions(completions) if alone else completions


def opened_thought(tokenizer: BaseTokenizer, prompt: Sequence[int]) -> str:
    """The `<think>` with which a prompt ends, and the white space after it; "" where there is none.

    Templates of reasoning models write it, so that the completion begins within the thought.
    """
    end = _OPENED_THOUGHT.search(with_thought_tags(tokenizer, prompt[-_OPENED_TOKENS:]))
    return end[0] if end else ""


def with_thought_tags(tokenizer: BaseTokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, in which the tags of a thought are kept where they are special tokens too."""
    tags = {tokenizer.special_ids[tag]: tag for tag in _THOUGHT_TAGS if tag in tokenizer.special_ids}
    if not tags:
        return tokenizer.decode(ids, from_start=False)
    pieces = itertools.groupby(ids, key=lambda i: tags.get(int(i)))
    return "".join(
        tag * len(list(run)) if tag else tokenizer.decode(run, from_start=False) for tag, run in pieces
    )


def read_prompts(
    name: str, options: PromptOptions, template: ChatTemplate, *, longest: int, max_rows: int, seed: int
) -> list[Prompt]:
    """The first prompts of at most `longest` tokens of a source; rows left out are named on stderr."""

    def prompt(record: dict, messages: list[dict[str, str]]) -> Prompt:
        ids = template.prompt(messages, tools=question_tools(record, options, template))
        if len(ids) > longest:
            raise BadRow("prompt that leaves no room for --max_new_tokens", f"{len(ids)} tokens")
        return Prompt(ids, record)

    prompts = read_messages(name, options, prompt, split="validation", max_rows=max_rows, seed=seed)
    if not prompts:
        raise DataError(f"{name}: no row has a prompt that can be completed")
    return prompts


def read_messages(
    name: str,
    options: PromptOptions,
    make: Callable[[dict, list[dict]], T],
    *,
    split: str,
    max_rows: int,
    seed: int,
    rename_field: str = "--rename",
) -> list[T]:
    """make(row, messages) of the first rows of a source; rows for which it raises BadRow go to stderr."""
    source = open_source(name, split=split, text_key=None, synthetic_rows=max_rows, seed=seed)
    rename = Rename(options.rename, rename_field)
    made: list[T] = []
    left_out: list[tuple[str, BadRow]] = []
    for row in source.rows():
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail)
            record = Record(rename(row.value))
            made.append(make(record.row, question_messages(record, options)[1]))
        except BadRow as error:
            left_out.append((row.where, rename.named(error)))
        if len(made) == max_rows:
            break
    print_left_out(left_out)
    rename.check()
    return made


def complete_prompts(
    loaded: LoadedModel,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    *,
    functions: Sequence[str],
    reward_model: str | None,
    samples: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: str | None = None,
    weights: SamplingWeights | None = None,
    check: Callable[[], None] = lambda: None,
) -> ScoredCompletions:
    """So many completions of each prompt by a checkpoint, with the rewards that `reward.functions` and
    `reward.model` of a config name; the reward model computes in `dtype`, as in `load_checkpoint`. `weights`
    and `check` are as in `Completer`."""
    rewards = RewardConfig(
        functions=tuple(functions),
        weights=(1.0,) * len(functions),
        model=reward_model,
        model_weight=1.0,
        normalize=True,
        workers=1,
        time_limit=5.0,
        error_reward=None,
        overlong_buffer=0,
        missing_eos_penalty=0.0,
    )
    longest = max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
    length = min(loaded.model.config.max_length, bucket(longest))
    model = None
    if reward_model is not None:
        model = RewardModel(
            reward_model,
            loaded.tokenizer,
            template,
            normalize=True,
            rows=ROWS,
            length=length,
            mesh=local_mesh,
            dtype=dtype,
        )
    with RewardScorer(rewards, model) as scorer:
        scorer.try_out([prompt.row for prompt in prompts[:TRIAL_ROWS]])
        completer = Completer(
            sample=functools.partial(collect, loaded.model, decode_batch_size=ROWS),
            tokenizer=loaded.tokenizer,
            stop_ids=template.stop_ids,
            scorer=scorer,
            length=length,
            weights=weights,
        )
        return completer(
            loaded.params,
            prompts,
            group_size=samples,
            sampling=sampling,
            keys=jax.random.split(stream(jax.random.key(seed), EVALUATION), len(prompts) * samples),
            check=check,
        )


def kl_to(reference: LoadedModel, completions: ScoredCompletions, temperature: float) -> np.ndarray:
    """Float32 [N], in nats: log-prob of each completion under its own model, less that under `reference`. Its
    mean over completions that were sampled unfiltered is the KL divergence of the one from the other."""
    score = log_probs_in_batches(
        reference.model, temperature, ROWS, completions.tokens.shape[1], reference.mesh
    )
    ends = completions.prompt_lengths + completions.lengths
    log_probs = score(reference.params, ends, completions.tokens)
    starts = completions.prompt_lengths - 1
    rows = zip(
        completions.completions.log_probs, log_probs, starts, starts + completions.lengths, strict=True
    )
    return np.array([own.sum() - row[start:end].sum() for own, row, start, end in rows], np.float32)


def completion_metrics(
    completions: ScoredCompletions, group_size: int, prefix: str, kl: np.ndarray | None = None
) -> dict[str, float]:
    """Means over rows of their groups' means, with the standard error over prompts, which are independent of
    each other where completions of one prompt are not. A prompt may be that of several rows.

    `reward`, `reward/NAME` of each reward, `length`, `stopped_fraction`, `kl` if it is given; and `pass@k`
    for k of 1, 2, 4, ... if there is a reward function: a completion is correct where the first one gives 1.
    Completions to which a reward does not apply, or whose call failed, are left out of its means and of
    `pass@k`, and with them prompts of which fewer than k are left.
    """
    by_name = completions.scores.by_name
    columns: dict[str, np.ndarray] = {}
    if by_name:
        columns = {"reward": completions.rewards} | {f"reward/{name}": x for name, x in by_name.items()}
    columns |= {"length": completions.lengths, "stopped_fraction": ~completions.truncated}
    if kl is not None:
        columns["kl"] = kl
    starts = zip(completions.tokens[::group_size], completions.prompt_lengths[::group_size], strict=True)
    prompts = numbered(row[:length].tobytes() for row, length in starts)
    columns = {name: group_means(values.reshape(-1, group_size)) for name, values in columns.items()}
    first = next(iter(by_name), "model")
    if first != "model":
        rewards = by_name[first].reshape(-1, group_size)
        k = 1
        while k <= group_size:
            columns[f"pass@{k}"] = pass_at_k(rewards == 1, k, known=~np.isnan(rewards))
            k *= 2
    row = {}
    for name, values in columns.items():
        applies = ~np.isnan(values)
        row[f"{prefix}{name}"], row[f"{prefix}{name}_se"] = mean(values[applies], prompts[applies])
    return row


def group_means(values: np.ndarray) -> np.ndarray:
    """The mean of each row's numbers; NaN for a row of NaN alone, to which a reward does not apply."""
    applies = ~np.isnan(values.astype(np.float64))
    means = np.where(applies, values, 0.0).sum(1) / np.maximum(applies.sum(1), 1)
    return np.where(applies.any(1), means, np.nan)


def completion_rows(completions: ScoredCompletions, kl: np.ndarray | None = None) -> Iterator[dict[str, Any]]:
    """What is known of each completion, as JSON."""
    for i, text in enumerate(completions.texts):
        more: Mapping[str, Any] = {} if kl is None else {"kl": float(kl[i])}
        yield {
            **more,
            "completion": text,
            "tokens": int(completions.lengths[i]),
            "ended": not completions.truncated[i],
            "reward": known(completions.rewards[i]),
            "rewards": {name: known(x[i]) for name, x in completions.scores.by_name.items()},
        }


def known(reward: np.floating) -> float | None:
    """A reward as JSON: None where it does not apply or failed."""
    return None if np.isnan(reward) else float(reward)
