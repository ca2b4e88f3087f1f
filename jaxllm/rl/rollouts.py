"""Rollouts: prompts completed by the policy, rewarded, and made into the batches of its next few updates.

An iteration is a rollout and rollout.epochs x rollout.num_minibatches updates on it:

    prompts -> sample and score (evaluation/completions.py) -> Rollout
            -> Algorithm.make_batch: log-probs (rl/log_probs.py), advantages (losses/) -> RolloutBatch

What it samples is a function of the seed, the iteration and the parameters at its start, and checkpoints lie
between iterations, so that a run killed anywhere samples, scores and trains the same again.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxllm.batches import RolloutBatch
from jaxllm.config import nearest_multiples
from jaxllm.data.loader import shuffled_rows
from jaxllm.data.prompts import Prompt
from jaxllm.data.rows import Dataset
from jaxllm.data.show import printable
from jaxllm.errors import ConfigError, NumericsError
from jaxllm.evaluation.completions import Completer, ScoredCompletions
from jaxllm.losses import Weighted
from jaxllm.models import Model, Params, build_model
from jaxllm.parallel.global_arrays import own_mesh
from jaxllm.parallel.processes import is_first
from jaxllm.random_streams import ROLLOUT, stream
from jaxllm.rewards.pool import Scores, gather
from jaxllm.rewards.scorer import TRIAL_ROWS, RewardScorer
from jaxllm.rl.config import RolloutConfig, RolloutTrainConfig
from jaxllm.rl.health import Health, unrewarded
from jaxllm.rollout.collect import BatchShapes, collect, row_devices
from jaxllm.runs.context import RunInputs
from jaxllm.runs.sampling_weights import SamplingWeights
from jaxllm.runs.step_by_length import split_batch
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.metrics import Metrics
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import StopRequested

RATIO_LIMIT = 0.01  # from 1, of the first update's mean ratio; float32 has 1e-6, bfloat16 1e-3


class Rollout(NamedTuple):
    """N completions, those of one prompt in consecutive rows."""

    prompts: list[Prompt]  # N
    tokens: np.ndarray  # int32 [N, T]
    mask: np.ndarray  # bool [N, T], as in RolloutBatch: nowhere in completions that are not valid
    sampler_log_probs: np.ndarray  # float32 [N, T], at the positions of mask
    lengths: np.ndarray  # int [N], tokens of the completions
    truncated: np.ndarray  # bool [N]
    texts: list[str]
    rewards: np.ndarray  # float32 [N]; NaN where no reward applies or a call failed
    scores: Scores
    decode_steps: int

    @property
    def valid(self) -> np.ndarray:
        """Bool [N]: the completions that train, and that are in the baselines of others."""
        return np.asarray(self.mask.any(1))


class Algorithm(Protocol):
    """What PPO and GRPO do with a rollout, each in its own way."""

    def policy(self, params: Params) -> Params:
        """The parameters that generate, of all that are trained."""
        ...

    def make_batch(self, state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, Metrics]:
        """Fields [N, ...] of the batches to train on, and metrics."""
        ...

    def weights_without_gradient(self, rollout: Rollout) -> np.ndarray | None:
        """Float32 [N]: the weight in the loss of each row that has no gradient, NaN for the others. None: all
        rows have one."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the state."""
        ...

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take back what `metadata` gave."""
        ...


class RolloutSource(BatchSource):
    """The batches of PPO and GRPO."""

    def __init__(
        self,
        inputs: RunInputs[Any, Any],
        data: Dataset,
        *,
        policy: Model,
        scorer: RewardScorer,
        algorithm: Algorithm,
    ):
        """`policy` is the model that generates."""
        self.program, self.scorer, self.algorithm = inputs.program, scorer, algorithm
        self.config: RolloutConfig = self.program.config.rollout
        # Endless: every index has a prompt.
        self.prompts: Any = shuffled_rows(data.train, data.weights, self.program.config.seed)
        sampler = sampling_model(policy, self.config)
        weights = SamplingWeights(
            algorithm.policy(self.program.abstract_state.params),
            self.program.mesh,
            dtype=self.config.dtype,
            replicate=self.config.replicate_params,
        )
        if weights.copied:  # each process samples its own prompts
            shapes = rollout_shapes(self.program.config, own_mesh(weights.mesh), jax.process_count())
        else:
            shapes = rollout_shapes(self.program.config, weights.mesh)
        if is_first():
            print(f"rollouts: {shapes.describe(self.config.sampling.max_new_tokens)}", flush=True)
        self.completer = Completer(
            sample=partial(collect, sampler, decode_batch_size=self.config.decode_batch_size, shapes=shapes),
            tokenizer=inputs.tokenizer,
            stop_ids=inputs.template.stop_ids,
            scorer=scorer,
            length=self.program.config.data.sequence_length,
            weights=weights,
        )
        scorer.try_out([self.prompts[i].row for i in range(TRIAL_ROWS)])
        self.consumed = 0  # prompts, since the run began
        self.rollout_stream = [ROLLOUT]  # see jaxllm.random_streams
        self.health = Health(self.config.log_prob_difference_limit)
        self.sums: dict[str, Weighted] = {}  # see merge
        self.rows: dict[int, Metrics] = {}  # by the last step of an iteration, until they are logged
        self.last: tuple[Rollout, np.ndarray] | None = None  # with advantages, [N] or [N, T]
        self.fingerprints = {} if scorer.model is None else {"reward model": scorer.model.hash}

    def after_step(self, state: TrainState) -> None:
        self.state = state

    def can_stop_after(self, step: int) -> bool:
        return step % self.config.steps == 0

    def metadata(self) -> dict[str, Any]:
        own = {
            "prompts_consumed": self.consumed,
            "health": self.health.first,
            "rollout_stream": self.rollout_stream,
        }
        return own | self.algorithm.metadata()

    def restore(self, metadata: Mapping[str, Any]) -> None:
        self.consumed = metadata.get("prompts_consumed", 0)
        self.health.first = metadata.get("health", {})
        # Rollouts of older runs had no constant of their own: these continue as they began.
        self.rollout_stream = metadata.get("rollout_stream", [] if metadata else [ROLLOUT])
        self.algorithm.restore(metadata)

    def close(self) -> None:
        self.scorer.close()

    def merge(self, step: int, metrics: dict[str, Weighted]) -> dict[str, Weighted]:
        """With `policy/NAME` and `value/NAME` over all updates of the iteration so far."""
        if (step - 1) % self.config.steps == 0:
            self.sums = {}
        updates = {name: x for name, x in metrics.items() if name.startswith(("policy/", "value/"))}
        self.sums = {name: self.sums.get(name, 0) + x for name, x in jax.device_get(updates).items()}
        return metrics | self.sums

    def finish_row(self, step: int, row: Metrics) -> Metrics:
        if (step - 1) % self.config.steps == 0:
            check_first_update(row, step)
        if step not in self.rows:
            return row
        row = row | self.with_update_time(step)
        del self.rows[step]
        for line in self.health.lines(row):
            tqdm.write(f"step {step}: {line}")
        return row

    def with_update_time(self, step: int) -> Metrics:
        """The row of an iteration's last step, with the time that its updates took."""
        row = self.rows[step]
        row.setdefault("time/update", time.perf_counter() - self.updating)
        return row

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[list[RolloutBatch]]:
        self.state, config = state, self.config
        for iteration in itertools.count(int(state.step) // config.steps):
            last_step = (iteration + 1) * config.steps
            before = self.metadata()
            try:
                rollout, row = self.roll_out(self.state, iteration, check)
                began = time.perf_counter()
                fields, batch_row = self.algorithm.make_batch(self.state, rollout)
            except StopRequested:
                self.restore(before)  # this rollout is made again when the run resumes
                raise
            if iteration == 0:
                for line in unrewarded(rollout.scores, rollout.texts[0], rollout.prompts[0].row):
                    tqdm.write(printable(line))
            weights = self.algorithm.weights_without_gradient(rollout)
            self.last = rollout, fields.advantages
            self.updating = time.perf_counter()
            self.rows[last_step] = row | batch_row | {"time/score": self.updating - began}
            for epoch in range(config.epochs):
                draw = np.random.default_rng((self.program.config.seed, iteration, epoch))
                for rows in np.split(draw.permutation(config.rows), config.num_minibatches):
                    batch = select(fields, rows, weights, self.program.microbatch_rows)
                    yield split_batch(self.program, batch)
            if last_step in self.rows:
                jax.block_until_ready(self.state.step)
                self.with_update_time(last_step)

    def roll_out(
        self, state: TrainState, iteration: int, check: Callable[[], None]
    ) -> tuple[Rollout, Metrics]:
        """Completions with rewards; groups without signal are resampled as often as the config allows."""
        config = self.config
        params = self.algorithm.policy(state.params)
        began = time.perf_counter()
        kept: list[Rollout] = []
        waited, wanted = 0.0, config.num_prompts
        for attempt in range(config.max_resamples + 1):
            prompts = [self.prompts[self.consumed + i] for i in range(wanted)]
            self.consumed += wanted
            key = stream(jax.random.key(self.program.config.seed), *self.rollout_stream, iteration, attempt)
            completions = self.completer(
                params,
                prompts,
                group_size=config.group_size,
                sampling=config.sampling,
                keys=jax.random.split(key, wanted * config.group_size),
                check=check,
            )
            waited += completions.seconds
            kept.append(make_rollout(prompts, completions, config))
            with_signal = sum(int(has_signal(each, config.group_size).sum()) for each in kept)
            wanted = config.num_prompts - with_signal
            if wanted <= 0:
                break
        rollout = join(kept, config)
        timing = {"time/rollout": time.perf_counter() - began - waited, "time/reward": waited}
        return rollout, timing | rollout_metrics(rollout, config) | resampling_metrics(kept, config)


def rollout_shapes(config: RolloutTrainConfig, mesh: Mesh, processes: int = 1) -> BatchShapes:
    """The shapes of all rollouts of a run, which its config alone decides: what they sample compiles nothing.

    Raises ConfigError where the rows cannot be split over the devices of `mesh`.
    """
    rollout, new_tokens = config.rollout, config.rollout.sampling.max_new_tokens
    with jax.set_mesh(mesh):
        devices = row_devices()
        if rollout.decode_batch_size % devices:
            sizes = " or ".join(map(str, nearest_multiples(rollout.decode_batch_size, devices)))
            raise ConfigError(
                f"rollout.decode_batch_size={rollout.decode_batch_size} is not divisible by mesh.data x "
                f"mesh.fsdp = {devices}: use {sizes}"
            )
        return BatchShapes.of(
            -(-rollout.num_prompts // processes),
            rollout.group_size,
            rollout.decode_batch_size,
            config.data.sequence_length - new_tokens,
            config.model.max_length,
        )


def sampling_model(policy: Model, config: RolloutConfig) -> Model:
    """The policy, in the dtype that it samples in."""
    if config.dtype is None:
        return policy
    return build_model(replace(policy.config, compute_dtype=config.dtype, param_dtype=config.dtype))


def select(fields: RolloutBatch, rows: np.ndarray, weights: np.ndarray | None, multiple: int) -> RolloutBatch:
    """The rows of an update, a multiple of `multiple`; without as many as possible of those that have no
    gradient, by `weights_without_gradient`. Their weight in the loss is kept."""
    extra = None
    if weights is not None:
        rows = rows[np.argsort(~np.isnan(weights[rows]), kind="stable")]
        needed = int(np.isnan(weights[rows]).sum())
        end = max(1, -(-needed // multiple)) * multiple
        extra = np.zeros(end, np.float32)
        extra[0] = weights[rows[end:]].sum()
        rows = rows[:end]
    return jax.tree.map(lambda x: np.asarray(x)[rows], fields)._replace(extra_weight=extra)


def make_rollout(prompts: Sequence[Prompt], scored: ScoredCompletions, config: RolloutConfig) -> Rollout:
    """Completions of prompts, with the mask of the tokens that the policy generated."""
    positions = np.arange(scored.tokens.shape[1])
    starts = scored.prompt_lengths[:, None] - 1
    mask = (positions >= starts) & (positions < starts + scored.lengths[:, None])
    log_probs = np.zeros(mask.shape, np.float32)
    log_probs[mask] = np.concatenate(scored.completions.log_probs)
    valid = ~np.isnan(scored.rewards)
    if config.mask_truncated:
        valid &= ~scored.truncated
    return Rollout(
        prompts=[prompt for prompt in prompts for _ in range(config.group_size)],
        tokens=scored.tokens,
        mask=mask & valid[:, None],
        sampler_log_probs=log_probs,
        lengths=scored.lengths,
        truncated=scored.truncated,
        texts=scored.texts,
        rewards=scored.rewards,
        scores=scored.scores,
        decode_steps=scored.completions.steps,
    )


def check_first_update(row: Mapping[str, float], step: int) -> None:
    """NumericsError where the train step and the scoring before it disagree: at the first update on a rollout
    the policy is the old policy, so that the mean ratio must be 1 (it is 0 where no token counts); and at
    that of a run its own reference, so that its KL, where the step computes it, must be 0."""
    ratio = row["policy/ratio"]
    if ratio and abs(ratio - 1) > RATIO_LIMIT:  # NaN is the step's to skip and count
        raise NumericsError(
            f"the first update on a rollout has policy/ratio={ratio:.4g}, which must be 1: the train step "
            f"and the scoring before it disagree; try model.compute_dtype=float32"
        )
    if step == 1 and abs(kl := row.get("kl/reference_token", 0.0)) > RATIO_LIMIT:
        raise NumericsError(
            f"the first update has kl/reference_token={kl:.3g}, which must be 0: the train step and the "
            f"scoring by the same weights disagree; try model.compute_dtype=float32"
        )


def has_signal(rollout: Rollout, group_size: int) -> np.ndarray:
    """Whether the rewards of each group's valid completions differ: bool [N / group_size]."""
    highest, lowest = (np.where(rollout.valid, rollout.rewards, x) for x in (-np.inf, np.inf))
    return highest.reshape(-1, group_size).max(1) > lowest.reshape(-1, group_size).min(1)


def join(parts: list[Rollout], config: RolloutConfig) -> Rollout:
    """One rollout of config.num_prompts groups: those with signal first, in the order they came."""
    if len(parts) == 1:
        return parts[0]
    signal = np.concatenate([has_signal(part, config.group_size) for part in parts])
    chosen = np.sort(np.argsort(~signal, kind="stable")[: config.num_prompts])
    rows = (chosen[:, None] * config.group_size + np.arange(config.group_size)).ravel()

    def pick(columns: Sequence[Any]) -> Any:
        if isinstance(columns[0], np.ndarray):
            return np.concatenate(columns)[rows]
        together = list(itertools.chain(*columns))
        return [together[i] for i in rows]

    *columns, scores, decode_steps = zip(*parts, strict=True)
    fields = [*map(pick, columns), gather(scores, rows), sum(decode_steps)]
    return Rollout._make(fields)


def rollout_metrics(rollout: Rollout, config: RolloutConfig) -> Metrics:
    """Rewards and lengths of a rollout, by the names under which they are logged."""
    known = rollout.rewards[~np.isnan(rollout.rewards)]
    row = {
        "reward/mean": known_mean(rollout.rewards),
        "reward/std": float(known.std()) if len(known) else float("nan"),
        "completion/mean_length": float(rollout.lengths.mean()),
        "completion/max_length": float(rollout.lengths.max()),
        "completion/truncated_fraction": float(rollout.truncated.mean()),
        "completion/left_out_fraction": float((~rollout.valid).mean()),
        "rollout/decode_steps": float(rollout.decode_steps),
    }
    if config.group_size > 1:
        row["reward/zero_std_fraction"] = float((~has_signal(rollout, config.group_size)).mean())
    return row | {f"reward/{name}": known_mean(values) for name, values in rollout.scores.by_name.items()}


def resampling_metrics(parts: Sequence[Rollout], config: RolloutConfig) -> Metrics:
    """Of all that was sampled for a rollout, what was resampled included: failed calls; and with
    `max_resamples` the rewards, of which `rollout_metrics` has those that are kept."""
    scores = [part.scores for part in parts]
    row = {name: float(sum(each.counters[name] for each in scores)) for name in scores[0].counters}
    calls = sum(len(x) for each in scores for name, x in each.by_name.items() if name != "model")
    row["reward/failed_fraction"] = sum(row.values()) / max(1, calls)
    if config.max_resamples:
        signal = np.concatenate([has_signal(part, config.group_size) for part in parts])
        row["rollout/sampled_groups"] = float(len(signal))
        row["rollout/sampled_zero_std_fraction"] = float((~signal).mean())
        row["rollout/sampled_reward_mean"] = known_mean(np.concatenate([part.rewards for part in parts]))
    return row


def known_mean(rewards: np.ndarray) -> float:
    """The mean of the rewards that are not NaN; NaN where all are."""
    known = rewards[~np.isnan(rewards)]
    return float(known.mean()) if len(known) else float("nan")
