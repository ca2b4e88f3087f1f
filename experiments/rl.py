"""Rollouts: prompts answered by the policy, judged, and made into the batches of its next few updates.

An iteration is a rollout and rollout.epochs x rollout.minibatches updates on it. What it samples is a
function of the seed, the iteration and the parameters it begins with, and checkpoints lie between iterations,
so that a run killed anywhere says, scores and learns the same again.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.program import Program
from jaxllm.batches import RolloutBatch
from jaxllm.config import nearest_multiples
from jaxllm.data.loader import shuffled_rows
from jaxllm.data.prompts import Prompt
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError
from jaxllm.losses import overlong_penalty
from jaxllm.objectives.score import next_token_log_probs
from jaxllm.rewards.pool import RewardPool, Scores
from jaxllm.rollout.collect import collect
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.training.feed import Feed
from jaxllm.training.state import TrainState
from jaxllm.training.watch import StopRequested


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy is asked, and how often it learns from its answers."""

    prompts: int  # in a rollout
    group_size: int  # answers to each
    epochs: int  # times every answer is learnt from
    minibatches: int  # updates an epoch
    max_rows: int  # answers decoded at a time
    mask_truncated: bool  # leave answers that did not end out of the loss
    refills: int  # times groups whose rewards are all equal are replaced by other prompts' (DAPO)
    sampling: SamplingConfig

    def __post_init__(self):
        for name in ("prompts", "group_size", "epochs", "minibatches", "max_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)} must be at least 1")
        if self.rows % self.minibatches:
            sizes = " or ".join(map(str, nearest_multiples(self.rows, self.minibatches)))
            raise ConfigError(
                f"rollout.prompts x rollout.group_size = {self.rows} does not divide into "
                f"rollout.minibatches={self.minibatches}: make it {sizes}"
            )
        if self.sampling.temperature == 0:
            raise ConfigError("rollout.sampling.temperature=0: a greedy policy does not explore; use 1.0")

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def steps(self) -> int:
        """Updates of an iteration."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class RewardConfig:
    """What answers are paid."""

    functions: tuple[str, ...]  # modules of jaxllm.rewards, package.module.function, or FILE.py:FUNCTION
    weights: tuple[float, ...]  # one each
    workers: int  # processes
    time_limit: float  # seconds for one call
    default: float  # for a call that fails
    overlong_buffer: int  # tokens before max_new_tokens from which on length is penalised, down to -1; 0: not

    def __post_init__(self):
        if len(self.functions) != len(self.weights):
            raise ConfigError(
                f"reward.weights has {len(self.weights)} entries for {len(self.functions)} reward.functions"
            )

    def pool(self) -> RewardPool:
        """The processes that score."""
        names = [spec.rpartition(":")[2].rpartition(".")[2] for spec in self.functions]
        return RewardPool(
            dict(zip(names, self.functions, strict=True)),
            weights=dict(zip(names, self.weights, strict=True)),
            workers=self.workers,
            time_limit=self.time_limit,
            default=self.default,
        )


class Rollout(NamedTuple):
    """N answers, the answers to one prompt beside each other."""

    prompts: list[Prompt]  # N
    tokens: np.ndarray  # int32 [N, T]
    mask: np.ndarray  # bool [N, T], as in RolloutBatch
    sampler_log_probs: np.ndarray  # float32 [N, T], at the positions of mask
    lengths: np.ndarray  # int [N], tokens of the answers
    truncated: np.ndarray  # bool [N]
    texts: list[str]
    rewards: np.ndarray  # float32 [N]
    scores: Scores
    decode_steps: int


# Worth: the state and a rollout -> batches' fields [N, ...] and metrics.
Worth = Callable[[TrainState, Rollout], tuple[RolloutBatch, dict[str, float]]]


class Rollouts(Feed):
    """The batches of PPO and GRPO."""

    def __init__(
        self,
        program: Program,
        data: Dataset,
        tokenizer: BaseTokenizer,
        pool: RewardPool,
        worth: Worth,
    ):
        self.program, self.data, self.tokenizer, self.pool = program, data, tokenizer, pool
        self.worth = worth
        self.prompts = shuffled_rows(data.train, data.weights, program.config.seed)
        self.config = program.config.rollout
        self.consumed = 0  # prompts, since the run began
        self.row: dict[str, float] = {}

    def observe(self, state: TrainState) -> None:
        self.state = state

    def may_stop(self, step: int) -> bool:
        return step % self.config.steps == 0

    def metadata(self) -> dict[str, Any]:
        return {"prompts_consumed": self.consumed}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        self.consumed = metadata.get("prompts_consumed", 0)

    def close(self) -> None:
        self.pool.close()

    def metrics(self, step: int) -> dict[str, float]:
        return self.row if self.may_stop(step) else {}

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[RolloutBatch]:
        self.state, self.check = state, check
        for iteration in itertools.count(int(state.step) // self.config.steps):
            consumed = self.consumed
            try:
                rollout, row = self.roll_out(self.state, iteration)
                began = time.perf_counter()
                fields, worth_row = self.worth(self.state, rollout)
            except StopRequested:
                self.consumed = consumed  # this rollout is made anew when the run goes on
                raise
            row |= worth_row | {"time/score": time.perf_counter() - began}
            updating = time.perf_counter()
            for epoch in range(self.config.epochs):
                draw = np.random.default_rng((self.program.config.seed, iteration, epoch))
                for rows in np.split(draw.permutation(self.config.rows), self.config.minibatches):
                    self.row = row | {"time/update": time.perf_counter() - updating}
                    batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], fields)
                    yield jax.device_put(batch, self.program.batch_sharding)

    def roll_out(self, state: TrainState, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Answers with rewards; groups without signal replaced as often as the config allows."""
        config = self.config
        kept: list[Rollout] = []
        timing = {"time/rollout": 0.0, "time/reward": 0.0}
        wanted = config.prompts
        for attempt in range(config.refills + 1):
            prompts = [self.prompts[self.consumed + i] for i in range(wanted)]
            self.consumed += wanted
            rollout = self.answer(state, prompts, (iteration, attempt), timing)
            kept.append(rollout)
            wanted = config.prompts - sum(int(has_signal(each, config.group_size).sum()) for each in kept)
            if wanted <= 0:
                break
        rollout = join(kept, config)
        return rollout, timing | rollout_metrics(rollout, config)

    def answer(
        self, state: TrainState, prompts: Sequence[Prompt], place: tuple[int, int], timing: dict[str, float]
    ) -> Rollout:
        """Sample and score; adds its seconds to `timing`."""
        config, program = self.config, self.program
        key = jax.random.key(program.config.seed)
        for number in place:
            key = jax.random.fold_in(key, number)
        began = time.perf_counter()
        said = collect(
            program.model,
            state.params,
            [prompt.ids for prompt in prompts],
            group_size=config.group_size,
            sampling=config.sampling,
            stop_ids=self.data.template.stop_ids,
            keys=jax.random.split(key, len(prompts) * config.group_size),
            max_rows=config.max_rows,
            check=self.check,
        )
        asked = [prompt for prompt in prompts for _ in range(config.group_size)]
        texts = [self.tokenizer.decode(tokens, from_start=False) for tokens in said.tokens]
        sampled = time.perf_counter()
        scores = self.pool.submit([prompt.row for prompt in asked], texts).result(self.check)
        timing["time/rollout"] += sampled - began
        timing["time/reward"] += time.perf_counter() - sampled
        T = program.config.data.sequence_length
        tokens = np.full((len(asked), T), self.tokenizer.pad_id, np.int32)
        mask = np.zeros((len(asked), T), bool)
        log_probs = np.zeros((len(asked), T), np.float32)
        for i, (prompt, ids) in enumerate(zip(asked, said.tokens, strict=True)):
            start, end = len(prompt.ids), len(prompt.ids) + len(ids)
            tokens[i, :end] = [*prompt.ids, *ids]
            mask[i, start - 1 : end - 1] = True
            log_probs[i, start - 1 : end - 1] = said.log_probs[i]
        lengths = mask.sum(1)
        truncated = np.array([reason != "stop" for reason in said.stop_reasons])
        rewards = scores.total
        if buffer := program.config.reward.overlong_buffer:
            limit = config.sampling.max_new_tokens
            rewards = rewards + np.asarray(overlong_penalty(lengths, limit=limit, buffer=buffer))
        if config.mask_truncated:
            mask = mask & ~truncated[:, None]
        return Rollout(asked, tokens, mask, log_probs, lengths, truncated, texts, rewards, scores, said.steps)


def has_signal(rollout: Rollout, group_size: int) -> np.ndarray:
    """Of each group, whether its rewards differ."""
    groups = rollout.rewards.reshape(-1, group_size)
    return groups.max(1) > groups.min(1)


def join(parts: list[Rollout], config: RolloutConfig) -> Rollout:
    """One rollout of config.prompts groups: those with signal first, in the order they came."""
    if len(parts) == 1:
        return parts[0]
    signal = np.concatenate([has_signal(part, config.group_size) for part in parts])
    chosen = np.sort(np.argsort(~signal, kind="stable")[: config.prompts])
    rows = (chosen[:, None] * config.group_size + np.arange(config.group_size)).ravel()

    def pick(columns: Sequence[Any]) -> Any:
        if isinstance(columns[0], np.ndarray):
            return np.concatenate(columns)[rows]
        together = list(itertools.chain(*columns))
        return [together[i] for i in rows]

    scores = [part.scores for part in parts]
    joined = Scores(
        pick([each.total for each in scores]),
        {name: pick([each.by_name[name] for each in scores]) for name in scores[0].by_name},
        {name: sum(each.counters[name] for each in scores) for name in scores[0].counters},
        list(itertools.chain(*(each.messages for each in scores))),
    )
    columns = [pick(column) for column in zip(*(part[:8] for part in parts), strict=True)]
    return Rollout(*columns, joined, sum(part.decode_steps for part in parts))


def rollout_metrics(rollout: Rollout, config: RolloutConfig) -> dict[str, float]:
    """What a rollout was like, by the names of its area."""
    row = {
        "reward/mean": float(rollout.rewards.mean()),
        "reward/std": float(rollout.rewards.std()),
        "reward/zero_std_fraction": float((~has_signal(rollout, config.group_size)).mean()),
        "completion/mean_length": float(rollout.lengths.mean()),
        "completion/max_length": float(rollout.lengths.max()),
        "completion/truncated_fraction": float(rollout.truncated.mean()),
        "rollout/decode_steps": float(rollout.decode_steps),
    }
    for name, values in rollout.scores.by_name.items():
        row[f"reward/{name}"] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return row | {name: float(count) for name, count in rollout.scores.counters.items()}


class Scorer:
    """Log-probs of rollouts under any parameters, a minibatch at a time, as the train step finds them."""

    def __init__(self, program: Program, model: Any, rows: int):
        self.program, self.rows = program, rows
        temperature = program.config.rollout.sampling.temperature
        self.run = jax.jit(
            lambda params, tokens: next_token_log_probs(params, tokens, model=model, temperature=temperature)
        )

    def __call__(self, params: Any, tokens: np.ndarray) -> np.ndarray:
        """Float32 [N, T]."""
        parts = [
            self.run(params, jax.device_put(part, self.program.batch_sharding))[0]
            for part in np.split(tokens, len(tokens) // self.rows)
        ]
        return np.concatenate(jax.device_get(parts))


def difference_metrics(rollout: Rollout, old_log_probs: np.ndarray) -> dict[str, float]:
    """How far trainer and sampler are apart on what was said."""
    gaps = np.abs(old_log_probs - rollout.sampler_log_probs)[rollout.mask]
    return {
        "sampler/log_prob_difference_mean": float(gaps.mean()) if gaps.size else 0.0,
        "sampler/log_prob_difference_max": float(gaps.max()) if gaps.size else 0.0,
    }


def check_steps(config: Any) -> None:
    """ConfigError where something would happen in the middle of an iteration."""
    steps = config.rollout.steps
    for name in ("steps", "log_every", "evaluate_every", "sample_every", "checkpoint_every"):
        value = getattr(config.training, name)
        if value % steps:
            sizes = " or ".join(map(str, nearest_multiples(value, steps)))
            raise ConfigError(
                f"training.{name}={value} must be a multiple of rollout.epochs x rollout.minibatches = "
                f"{steps}: use {sizes}"
            )
