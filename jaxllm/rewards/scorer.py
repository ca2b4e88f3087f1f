"""All rewards of a run: functions in processes beside it, and a reward model on its devices.

Completions are scored by functions as they finish, while others are still being generated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.data.show import printable
from jaxllm.errors import ConfigError
from jaxllm.parallel.global_arrays import gather as gather_arrays
from jaxllm.rewards.load import load_reward
from jaxllm.rewards.pool import Pending, RewardPool, Scores, check_json, gather
from jaxllm.rewards.reward_model import RewardModel

TRIAL = "<think>It is 1.</think>\n<answer>\\boxed{1}</answer>"  # what any function can read
TRIAL_ROWS = 4  # on which every function must fail to be refused


@dataclass(frozen=True)
class RewardConfig:
    """What completions are rewarded for."""

    functions: tuple[str, ...]  # modules of jaxllm.rewards, package.module.function, or FILE.py:FUNCTION
    weights: tuple[float, ...]  # one each; 0 logs the reward without adding it
    model: str | None  # a reward model's run folder, RUN/best or step folder
    model_weight: float
    normalize: bool  # standardize the model's reward by its mean and spread on held-out completions
    workers: int  # processes
    time_limit: float  # seconds for one call
    error_reward: float | None  # for a call that fails; None: its completion is left out
    overlong_buffer: int  # tokens before max_new_tokens over which a penalty falls to -1 (DAPO); 0: none
    missing_eos_penalty: float  # added to the reward of a completion without a stop token; 0 or less

    def __post_init__(self):
        if len(self.functions) != len(self.weights):
            raise ConfigError(
                f"reward.weights has {len(self.weights)} entries for {len(self.functions)} reward.functions: "
                f"give one each, such as {','.join(['1.0'] * len(self.functions)) or 'none at all'}"
            )
        if self.model == "":
            raise ConfigError("reward.model is empty: give a reward model's run folder, or none")
        if self.missing_eos_penalty > 0:
            raise ConfigError(
                f"reward.missing_eos_penalty={self.missing_eos_penalty} would reward a missing stop token: "
                f"use 0 or less"
            )
        if self.overlong_buffer < 0:
            raise ConfigError(f"reward.overlong_buffer={self.overlong_buffer} must not be negative")
        duplicates = {name for name in self.names if self.names.count(name) > 1}
        if duplicates:
            raise ConfigError(
                f"reward.functions has two of the name {duplicates.pop()!r}, under which metrics are logged"
            )
        for function in self.functions:
            load_reward(function)  # what cannot be loaded is found before anything is read or compiled

    @property
    def names(self) -> list[str]:
        """What metrics call the rewards."""
        names = [spec.rpartition(":")[2].rpartition(".")[2] for spec in self.functions]
        return names + ["model"] * (self.model is not None)


def total_failure(where: str, scores: Scores) -> ConfigError:
    """The error for functions that fail everywhere."""
    return ConfigError(
        f"reward.functions: every call failed, on {where}: {'; '.join(scores.messages)}; fix the function, "
        f"or rename the column that it reads (data.rename, --rename)"
    )


def gather_processes(own: Scores) -> Scores:
    """The scores of the samples of all processes, each of which has scored its own."""
    if jax.process_count() == 1:
        return own
    rewards = {f"reward {name}": values for name, values in own.by_name.items()}
    arrays = {"total": own.total, "applies": own.applies, "failed": own.failed, **rewards}
    parts = [
        Scores(
            found["total"],
            {name: found[f"reward {name}"] for name in own.by_name},
            found["applies"],
            found["failed"],
            *facts,
        )
        for found, facts in gather_arrays(arrays, (own.counters, own.messages, dict(own.failures)))
    ]
    return gather(parts, np.arange(sum(len(part.total) for part in parts)))


class RewardScorer:
    """All rewards of a run. A context: its processes end with it."""

    def __init__(self, config: RewardConfig, model: RewardModel | None):
        self.config, self.model = config, model
        self.names = config.names
        self.shown: set[str] = set()
        self.failing: set[str] = set()  # functions that have failed on all completions of a batch
        self.succeeded = False  # whether any function has been called without a failure
        self.pool = None
        if config.functions:
            named = dict(zip(self.names, config.functions, strict=False))
            self.pool = RewardPool(
                named,
                weights=dict(zip(named, config.weights, strict=True)),
                workers=config.workers,
                time_limit=config.time_limit,
                error_reward=config.error_reward,
            )

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.close()

    def warn(self, messages: Sequence[str]) -> None:
        """Print what went wrong in functions, each thing once."""
        for message in messages:
            if message not in self.shown:
                given = self.config.error_reward
                fate = "left out" if given is None else f"given reward.error_reward={given}"
                tqdm.write(printable(f"{message} ({fate})"))
                self.shown.add(message)

    def try_out(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Call every function on the first example, before anything is compiled, and print what fails.

        Raises ConfigError where all functions fail on the first few, and DataError for a row that JSON cannot
        hold; the processes have ended then.
        """
        examples = examples[:TRIAL_ROWS]
        try:
            check_json(examples[0])
            if self.pool is None:
                return
            for example in examples:
                scores = self.pool.submit([example], [TRIAL]).result()
                if not all(scores.failures.values()):
                    self.warn(scores.messages)
                    return
            raise total_failure(f"the first {len(examples)} rows", scores)
        except BaseException:
            self.close()
            raise

    def count_failures(self, scores: Scores) -> None:
        """Say which function failed on all of these completions. ConfigError where all did, and none has
        succeeded before."""
        number = len(scores.total)
        failing = [name for name, count in scores.failures.items() if count == number]
        self.succeeded |= len(failing) < len(scores.failures)
        if not self.succeeded:
            raise total_failure(f"all {number} completions", scores)
        new = [name for name in failing if name not in self.failing]
        for name in new:
            tqdm.write(printable(f"reward {name!r} failed on all {number} completions"))
        self.failing.update(new)

    def finish(self, scores: Scores, tokens: np.ndarray, lengths: np.ndarray) -> Scores:
        """The scores by the functions with those by the reward model, of prompts with their completions,
        tokens [N, T] and lengths [N]. Says what failed; of several processes, all have all N."""
        if self.pool is not None:
            self.warn(scores.messages)
            self.count_failures(scores)
        model = self.model
        if model is None:
            return scores
        rewards = model(tokens, lengths)
        total = scores.total + self.config.model_weight * model.normalized(rewards)
        return scores._replace(
            total=total.astype(np.float32),
            by_name=scores.by_name | {"model": rewards.astype(np.float32)},
            applies=scores.applies | (self.config.model_weight != 0),
        )

    def begin(self, examples: Sequence[Mapping[str, Any]]) -> "Scoring":
        """Begin to score completions of these examples."""
        return Scoring(self, examples)


class Scoring:
    """N completions of N examples, which arrive in any order."""

    def __init__(self, scorer: RewardScorer, examples: Sequence[Mapping[str, Any]]):
        self.scorer, self.examples = scorer, examples
        self.order: list[int] = []
        self.pending: list[Pending] = []

    def add(self, numbers: Sequence[int], texts: Sequence[str]) -> None:
        """Some completions, each with the number of its example."""
        self.order += numbers
        if self.scorer.pool is not None:
            self.pending.append(self.scorer.pool.submit([self.examples[i] for i in numbers], texts))

    def result(self, check: Callable[[], None]) -> Scores:
        """The scores of all N examples by the functions, once all completions have been added. `check` may
        raise to leave."""
        if self.scorer.pool is None:
            none = np.zeros(len(self.examples), bool)
            return Scores(np.zeros(len(none), np.float32), {}, none, none, {}, [])
        parts = [pending.result(check) for pending in self.pending or [self.scorer.pool.submit([], [])]]
        return gather(parts, np.argsort(self.order).astype(int))
