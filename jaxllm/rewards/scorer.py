"""What answers are paid: functions in processes beside the run, and a reward model on its devices."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.show import printable
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.rewards.load import load_reward
from jaxllm.rewards.pool import Pending, RewardPool, Scores, gather
from jaxllm.parallel.sharding import batch_sharding
from jaxllm.training.checkpoint import checkpoint_hash


@dataclass(frozen=True)
class RewardConfig:
    """What answers are paid."""

    functions: tuple[str, ...]  # modules of jaxllm.rewards, package.module.function, or FILE.py:FUNCTION
    weights: tuple[float, ...]  # one each; 0 measures without paying
    model: str | None  # a reward model's run folder, RUN/best or step folder
    model_weight: float
    normalize: bool  # count the model's reward in standard deviations from its mean on held-out answers
    workers: int  # processes
    time_limit: float  # seconds for one call
    error_reward: float  # for a call that fails
    overlong_buffer: int  # tokens before max_new_tokens from which on length is penalised, down to -1; 0: not
    missing_eos_penalty: float  # added to the reward of an answer that did not end; 0 or less

    def __post_init__(self):
        if len(self.functions) != len(self.weights):
            raise ConfigError(
                f"reward.weights has {len(self.weights)} entries for {len(self.functions)} reward.functions: "
                f"give one each, such as {','.join(['1.0'] * len(self.functions)) or 'none at all'}"
            )
        if self.model == "":
            raise ConfigError("reward.model is empty: give a reward model's run folder, or none")
        if self.missing_eos_penalty > 0:
            raise ConfigError(f"reward.missing_eos_penalty={self.missing_eos_penalty} must not pay for going on: 0 or less")
        if self.overlong_buffer < 0:
            raise ConfigError(f"reward.overlong_buffer={self.overlong_buffer} must not be negative")
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ConfigError(
                f"reward.functions has two of the name {twice.pop()!r}, under which metrics are logged"
            )
        for function in self.functions:
            load_reward(function)  # what cannot be loaded is found before anything is read or compiled

    @property
    def names(self) -> list[str]:
        """What metrics call the functions."""
        names = [spec.rpartition(":")[2].rpartition(".")[2] for spec in self.functions]
        return names + ["model"] * (self.model is not None)


class InBatches:
    """A function of parameters and any number of rows: so many at a time, so that it is compiled once."""

    def __init__(self, function: Callable[..., jax.Array], rows: int, mesh: Mesh):
        self.function, self.rows, self.sharding = jax.jit(function), rows, batch_sharding(mesh)

    def __call__(self, params: Any, *columns: np.ndarray) -> np.ndarray:
        """The function of every row, on the host."""
        number, parts = len(columns[0]), []
        for first in range(0, number, self.rows):
            rows = np.minimum(np.arange(first, first + self.rows), number - 1)  # the last row fills it up
            batch = jax.device_put([column[rows] for column in columns], self.sharding)
            parts.append(self.function(params, *batch))
        return np.concatenate(jax.device_get(parts))[:number]


def statistics(config: RewardConfig, folder: Path) -> tuple[float, float]:
    """Mean and spread by which the rewards of a reward model's checkpoint are normalised."""
    if not config.normalize:
        return 0.0, 1.0
    known = json.loads((folder / "metadata.json").read_bytes())["metrics"] or {}
    if not known.get("eval/reward_std"):
        raise ConfigError(
            f"reward.model={config.model} was saved without an evaluation, so that its mean and spread are "
            f"unknown: give a step that has one (RUN/best), or set reward.normalize=False"
        )
    return known["eval/reward_mean"], known["eval/reward_std"]


def critic_scale(config: RewardConfig, folder: Path) -> float:
    """What turns the reward model's differences into those that answers are paid."""
    return config.model_weight / statistics(config, folder)[1]


class RewardModel:
    """A trained reward model, laid out over the devices."""

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: BaseTokenizer,
        template: ChatTemplate,
        *,
        rows: int,
        length: int,
        mesh: Mesh,
    ):
        """To read `rows` sequences of `length` tokens at a time, written with this tokenizer and template."""
        name = f"reward.model={config.model}"
        try:
            loaded = load_checkpoint(config.model, mesh)
        except CheckpointError as error:
            raise ConfigError(f"{name}: {error}") from None
        if loaded.stage != "reward_model":
            raise ConfigError(f"{name} is of stage {loaded.stage}, not a reward model")
        if loaded.tokenizer.hash != tokenizer.hash:
            raise ConfigError(f"{name} has another tokenizer than the policy: train it from the same model")
        if checkpoint_template(loaded).source != template.source:
            raise ConfigError(
                f"{name} has another chat template than the policy: train it from the same model"
            )
        if length > loaded.model.config.max_length:
            raise ConfigError(
                f"{name} reads {loaded.model.config.max_length} tokens at most: lower "
                f"data.sequence_length={length}"
            )
        self.mean, self.std = statistics(config, loaded.folder)
        self.hash = checkpoint_hash(loaded.folder)
        self.params = loaded.params
        self.rewards = InBatches(loaded.model.rewards, rows, mesh)

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Float32 [N] for tokens [N, T], not normalised."""
        return self.rewards(self.params, tokens, lengths)

    def normalised(self, rewards: np.ndarray) -> np.ndarray:
        return (rewards - self.mean) / self.std


class RewardScorer:
    """All rewards of a run. A context: its processes end with it."""

    def __init__(self, config: RewardConfig, model: RewardModel | None):
        self.config, self.model = config, model
        self.names = config.names
        self.told: set[str] = set()
        self.pool = None
        if config.functions:
            named = dict(zip(self.names, config.functions, strict=False))
            self.pool = RewardPool(
                named,
                weights=dict(zip(named, config.weights, strict=True)),
                workers=config.workers,
                time_limit=config.time_limit,
                default=config.error_reward,
            )

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.close()

    def tell(self, messages: Sequence[str]) -> None:
        """What went wrong in functions, each thing once."""
        for message in messages:
            if message not in self.told:
                tqdm.write(printable(f"{message} (paid reward.error_reward={self.config.error_reward})"))
                self.told.add(message)

    def judging(self, examples: Sequence[Mapping[str, Any]]) -> "Judging":
        """Begin to judge answers to these."""
        return Judging(self, examples)


class Judging:
    """Answers are scored by functions as they are finished, while others are still being said."""

    def __init__(self, judge: RewardScorer, examples: Sequence[Mapping[str, Any]]):
        self.judge, self.examples = judge, examples
        self.order: list[int] = []
        self.pending: list[Pending] = []

    def add(self, numbers: Sequence[int], texts: Sequence[str]) -> None:
        """Some answers, each with the number of its example."""
        self.order += numbers
        if self.judge.pool is not None:
            self.pending.append(self.judge.pool.submit([self.examples[i] for i in numbers], texts))

    def result(self, tokens: np.ndarray, lengths: np.ndarray, check: Callable[[], None]) -> Scores:
        """The scores of all N examples, when all have been added.

        tokens [N, T] and lengths [N] are the prompts with their answers. `check` may raise to leave.
        """
        number = len(self.examples)
        scores = Scores(np.zeros(number, np.float32), {}, {}, [])
        if self.pending:
            parts = [pending.result(check) for pending in self.pending]
            scores = gather(parts, np.argsort(self.order))
            self.judge.tell(scores.messages)
        model = self.judge.model
        if model is None:
            return scores
        found = model(tokens, lengths)
        total = scores.total + self.judge.config.model_weight * model.normalised(found)
        return scores._replace(
            total=total.astype(np.float32), by_name=scores.by_name | {"model": found.astype(np.float32)}
        )
