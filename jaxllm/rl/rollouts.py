"""Rollouts: prompts answered by the policy, judged, and made into the batches of its next few updates.

An iteration is a rollout and rollout.epochs x rollout.num_minibatches updates on it. What it samples is a
function of the seed, the iteration and the parameters it begins with, and checkpoints lie between iterations,
so that a run killed anywhere says, scores and learns the same again.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.evaluation.completions import Answering, Answers
from jaxllm.runs.program import Program
from jaxllm.rewards.scorer import InBatches, RewardScorer, RewardModel
from jaxllm.rl.config import RolloutConfig, RolloutTrainConfig
from jaxllm.runs.train import load_run_template
from jaxllm.runs.weights import InitialWeights
from jaxllm.batches import RolloutBatch
from jaxllm.data.loader import shuffled_rows
from jaxllm.data.prompts import Prompt, load_prompts, prompt_texts
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import NumericsError
from jaxllm.losses import truncated_importance_weights
from jaxllm.models import Model, build_model
from jaxllm.rollout.score import next_token_log_probs
from jaxllm.rewards.pool import Scores, gather
from jaxllm.rollout.collect import collect
from jaxllm.rollout.generate import Completions
from jaxllm.rl.health import Health
from jaxllm.parallel.sharding import whole
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import StopRequested

RATIO_LIMIT = 0.01  # from 1, of the first update's mean ratio; float32 has 1e-6, bfloat16 1e-3


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


def load_run_prompts(program: Program, tokenizer: BaseTokenizer, folder: RunFolder, start: InitialWeights) -> Dataset:
    """Prompts to learn from and to be tested on."""
    config = program.config
    return load_prompts(
        config.data,
        tokenizer,
        load_run_template(config.data.template, tokenizer, folder, start),
        seed=config.seed,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        run_folder=folder.path,
    )


def batch_shapes(config: RolloutTrainConfig) -> RolloutBatch:
    """Shape and dtype of what every batch of rollouts has."""
    shape = (config.data.batch_size, config.data.sequence_length)
    floats = jax.ShapeDtypeStruct(shape, np.float32)
    return RolloutBatch(
        tokens=jax.ShapeDtypeStruct(shape, np.int32),
        mask=jax.ShapeDtypeStruct(shape, bool),
        old_log_probs=floats,
        advantages=floats,
        importance_weights=floats if config.rollout.importance_sampling else None,
    )


def tokenizer_text(config: RolloutTrainConfig) -> Iterator[str]:
    """What is asked."""
    return prompt_texts(config.data, seed=config.seed)


def make_judge(program: Program, tokenizer: BaseTokenizer, data: Dataset) -> RewardScorer:
    """All rewards of a run."""
    config, model = program.config, None
    if config.reward.model is not None:
        model = RewardModel(
            config.reward,
            tokenizer,
            data.template,
            rows=program.rows_at_a_time,
            length=config.data.sequence_length,
            mesh=program.mesh,
        )
    return RewardScorer(config.reward, model)


class Sampler:
    """The policy as it speaks: perhaps in another dtype than it learns in, perhaps laid out otherwise."""

    def __init__(self, program: Program, model: Model, params: Any):
        """`params` has the shapes of the policy's."""
        config = program.config.rollout
        self.model, self.max_rows, self.place = model, config.max_rows, None
        if config.dtype is not None:
            self.model = build_model(
                replace(program.config.model, compute_dtype=config.dtype, param_dtype=config.dtype)
            )
        if config.dtype is not None or config.replicate_params:
            self.place = jax.jit(
                lambda params: jax.tree.map(lambda x: x.astype(config.dtype or x.dtype), params),
                out_shardings=whole(params, program.mesh) if config.replicate_params else None,
            )

    def __call__(self, params: Any, prompts: Sequence[Sequence[int]], **options: Any) -> Completions:
        """`collect` with these parameters and options."""
        if self.place is not None:
            params = self.place(params)
        return collect(self.model, params, prompts, max_rows=self.max_rows, **options)


class Rollouts(BatchSource):
    """The batches of PPO and GRPO, which say what an answer is worth and which of the parameters speak."""

    def __init__(
        self,
        program: Program,
        model: Model,
        data: Dataset,
        tokenizer: BaseTokenizer,
        judge: RewardScorer,
        reference: Any | None,
    ):
        """`reference` is the parameters of the frozen policy; None: no KL is wanted."""
        self.program, self.data, self.judge = program, data, judge
        self.model, self.reference = model, reference
        self.config = config = program.config.rollout
        self.prompts = shuffled_rows(data.train, data.weights, program.config.seed)
        self.answer = Answering(
            sample=Sampler(program, model, self.policy(program.abstract_state.params)),
            tokenizer=tokenizer,
            stop_ids=data.template.stop_ids,
            judge=judge,
            length=program.config.data.sequence_length,
        )
        self.log_probs = InBatches(
            lambda params, tokens: next_token_log_probs(
                params, tokens, model=model, temperature=config.sampling.temperature
            )[0],
            program.rows_at_a_time,
            program.mesh,
        )
        self.consumed = 0  # prompts, since the run began
        self.health = Health(config.log_prob_difference_limit)
        self.rows: dict[int, dict[str, float]] = {}  # by the last step of an iteration, until asked for
        self.last: tuple[Rollout, np.ndarray] | None = None  # with advantages, [N] or [N, T]
        self.fingerprints = {} if judge.model is None else {"reward model": judge.model.hash}

    def policy(self, params: Any) -> Any:
        """The parameters that speak."""
        return params

    def worth(self, state: TrainState, rollout: Rollout) -> tuple[RolloutBatch, dict[str, float]]:
        """Fields [N, ...] of the batches to learn from, and metrics."""
        raise NotImplementedError

    def observe(self, state: TrainState) -> None:
        self.state = state

    def may_stop(self, step: int) -> bool:
        return step % self.config.steps == 0

    def metadata(self) -> dict[str, Any]:
        return {"prompts_consumed": self.consumed, "health": self.health.first}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        self.consumed = metadata.get("prompts_consumed", 0)
        self.health.first = metadata.get("health", {})

    def close(self) -> None:
        self.judge.close()

    def complete(self, step: int, row: dict[str, float]) -> dict[str, float]:
        if (step - 1) % self.config.steps == 0:
            check_first_update(row)
        if step not in self.rows:
            return row
        row = row | self.updated(step)
        del self.rows[step]
        for line in self.health.lines(row):
            tqdm.write(f"step {step}: {line}")
        return row

    def updated(self, step: int) -> dict[str, float]:
        """The row of a step that is over, with the time that updating took."""
        row = self.rows[step]
        row.setdefault("time/update", time.perf_counter() - self.updating)
        return row

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[RolloutBatch]:
        self.state, self.check = state, check
        for iteration in itertools.count(int(state.step) // self.config.steps):
            last_step = (iteration + 1) * self.config.steps
            before = self.metadata()
            try:
                rollout, row = self.roll_out(self.state, iteration)
                began = time.perf_counter()
                fields, worth_row = self.worth(self.state, rollout)
            except StopRequested:
                self.restore(before)  # this rollout is made anew when the run goes on
                raise
            self.last = rollout, fields.advantages
            self.updating = time.perf_counter()
            self.rows[last_step] = row | worth_row | {"time/score": self.updating - began}
            for epoch in range(self.config.epochs):
                draw = np.random.default_rng((self.program.config.seed, iteration, epoch))
                for rows in np.split(draw.permutation(self.config.rows), self.config.num_minibatches):
                    batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], fields)
                    yield jax.device_put(batch, self.program.batch_sharding)
            if last_step in self.rows:
                jax.block_until_ready(self.state.step)
                self.updated(last_step)

    def roll_out(self, state: TrainState, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Answers with rewards; groups without signal replaced as often as the config allows."""
        config = self.config
        params = self.policy(state.params)
        began = time.perf_counter()
        kept: list[Rollout] = []
        waited, wanted = 0.0, config.prompts
        for attempt in range(config.max_resamples + 1):
            prompts = [self.prompts[self.consumed + i] for i in range(wanted)]
            self.consumed += wanted
            key = jax.random.key(self.program.config.seed)
            for number in (iteration, attempt):
                key = jax.random.fold_in(key, number)
            answers = self.answer(
                params,
                prompts,
                group_size=config.group_size,
                sampling=config.sampling,
                keys=jax.random.split(key, wanted * config.group_size),
                check=self.check,
            )
            waited += answers.seconds
            kept.append(self.rollout(prompts, answers))
            wanted = config.prompts - sum(int(has_signal(each, config.group_size).sum()) for each in kept)
            if wanted <= 0:
                break
        rollout = join(kept, config)
        timing = {"time/rollout": time.perf_counter() - began - waited, "time/reward": waited}
        return rollout, timing | rollout_metrics(rollout, config)

    def rollout(self, prompts: Sequence[Prompt], answers: Answers) -> Rollout:
        """Answers as something to learn from."""
        positions = np.arange(answers.tokens.shape[1])
        starts = answers.prompt_lengths[:, None] - 1
        mask = (positions >= starts) & (positions < starts + answers.lengths[:, None])
        log_probs = np.zeros(mask.shape, np.float32)
        log_probs[mask] = np.concatenate(answers.said.log_probs)
        if self.config.mask_truncated:
            mask = mask & ~answers.truncated[:, None]
        return Rollout(
            prompts=[prompt for prompt in prompts for _ in range(self.config.group_size)],
            tokens=answers.tokens,
            mask=mask,
            sampler_log_probs=log_probs,
            lengths=answers.lengths,
            truncated=answers.truncated,
            texts=answers.texts,
            rewards=answers.rewards,
            scores=answers.scores,
            decode_steps=answers.said.steps,
        )

    def old_log_probs(self, params: Any, rollout: Rollout) -> tuple[np.ndarray, dict[str, float]]:
        """The policy's log-probs [N, T] before it learns from a rollout; how far off the sampler's were.

        Without `rescore` the sampler's are taken, and compared with the trainer's in the first rollout alone.
        """
        if not self.config.recompute_log_probs and int(self.state.step) > 0:
            return rollout.sampler_log_probs, {}
        found = self.log_probs(params, rollout.tokens)
        gaps = np.abs(found - rollout.sampler_log_probs)[rollout.mask]
        return found if self.config.recompute_log_probs else rollout.sampler_log_probs, {
            "sampler/log_prob_difference_mean": float(gaps.mean()) if gaps.size else 0.0,
            "sampler/log_prob_difference_max": float(gaps.max()) if gaps.size else 0.0,
        }

    def kl(self, old_log_probs: np.ndarray, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """The reference's log-probs and the k1 estimate of the KL to it of each token, [N, T] both."""
        ref_log_probs = self.log_probs(self.reference, rollout.tokens)
        kl = np.where(rollout.mask, old_log_probs - ref_log_probs, 0)
        if int(self.state.step) == 0 and self.config.recompute_log_probs and kl.any():
            raise NumericsError(
                f"before the first update the policy is its own reference, but one token's KL to it is "
                f"{np.abs(kl).max():.3g}, which must be 0: scoring the same weights twice does not agree"
            )
        return ref_log_probs, kl

    def importance_weights(self, old_log_probs: np.ndarray, rollout: Rollout) -> np.ndarray | None:
        """What makes up for a sampler that is not quite the policy."""
        if self.config.importance_sampling is None:
            return None
        weights = truncated_importance_weights(
            old_log_probs,
            rollout.sampler_log_probs,
            rollout.mask,
            level=self.config.importance_sampling,
            maximum=self.config.importance_sampling_cap,
        )
        return np.asarray(weights)


def check_first_update(row: Mapping[str, float]) -> None:
    """NumericsError where the train step and the scoring before it disagree: nothing has been learnt from a
    rollout at its first update, so that the policy's ratio must be 1 (it is 0 where no token counts)."""
    ratio = row["policy/ratio"]
    if ratio and abs(ratio - 1) > RATIO_LIMIT:  # NaN is the step's to skip and count
        raise NumericsError(
            f"the first update of a rollout has policy/ratio={ratio:.4g}, which must be 1: the train step "
            f"and the scoring before it disagree; try model.compute_dtype=float32"
        )


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

    *columns, scores, decode_steps = zip(*parts, strict=True)
    return Rollout(*map(pick, columns), gather(scores, rows), sum(decode_steps))


def rollout_metrics(rollout: Rollout, config: RolloutConfig) -> dict[str, float]:
    """What a rollout was like, by the names of its area."""
    row = {
        "reward/mean": float(rollout.rewards.mean()),
        "reward/std": float(rollout.rewards.std()),
        "completion/mean_length": float(rollout.lengths.mean()),
        "completion/max_length": float(rollout.lengths.max()),
        "completion/truncated_fraction": float(rollout.truncated.mean()),
        "rollout/decode_steps": float(rollout.decode_steps),
    }
    if config.group_size > 1:
        row["reward/zero_std_fraction"] = float((~has_signal(rollout, config.group_size)).mean())
    for name, values in rollout.scores.by_name.items():
        row[f"reward/{name}"] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    counters = {name: float(count) for name, count in rollout.scores.counters.items()}
    calls = max(1, len(rollout.rewards) * len(rollout.scores.by_name))
    return row | counters | {"reward/failed_fraction": sum(counters.values()) / calls}


def kl_metrics(kl: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How far the policy is from its reference: nats an answer, and nats a token."""
    return {
        "kl/reference": float(kl.sum() / max(1, mask.any(1).sum())),
        "kl/reference_token": float(kl.sum() / max(1, mask.sum())),
    }
