"""A trained reward model as the reward of completions."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.jinja_template import without_defaults
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder
from jaxllm.rollout.score import InBatches
from jaxllm.runs.checkpoints import (
    OnMesh,
    check_scores,
    checkpoint_template,
    load_folder,
    read_kind,
    read_metadata,
)
from jaxllm.runs.sampling_weights import in_compute_dtype
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint


class RewardStatistics(NamedTuple):
    """Of a reward model's rewards of held-out completions, by which its rewards are standardized."""

    mean: float
    std: float


def read_statistics(checkpoint: str, folder: Path, normalize: bool) -> RewardStatistics:
    """Those of a step folder, `checkpoint` to the user; (0, 1) where `normalize` is off."""
    if not normalize:
        return RewardStatistics(0.0, 1.0)
    metadata = read_metadata(folder)
    metrics = metadata.get("metrics") or {}
    if not metrics.get("eval/reward_std"):
        found = "was saved without an evaluation: give a step that has one (RUN/best), or set"
        if is_hf_folder(folder) or "from" in metadata:  # imported
            found = "comes from Hugging Face, whose checkpoints record no mean and spread of rewards: set"
        raise ConfigError(
            f"reward.normalize needs the mean and spread of rewards, but reward.model={checkpoint} {found} "
            f"reward.normalize=false"
        )
    return RewardStatistics(metrics["eval/reward_mean"], metrics["eval/reward_std"])


def check_reward_model(checkpoint: str) -> Path:
    """The step folder of a reward model; ConfigError where there is none, or another kind of model."""
    name = f"reward.model={checkpoint}"
    try:
        folder = find_checkpoint(checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"{name}: {error}") from None
    check_scores(read_kind(folder), name)
    return folder


class RewardModel:
    """A trained reward model, sharded over the devices."""

    def __init__(
        self,
        checkpoint: str,
        tokenizer: BaseTokenizer,
        template: ChatTemplate,
        *,
        normalize: bool,
        rows: int,
        length: int,
        mesh: OnMesh,
        dtype: str | None = None,
    ):
        """To read `rows` sequences of `length` tokens at a time, written with this tokenizer and template.
        `mesh` and `dtype` are as in `load_checkpoint`."""
        name = f"reward.model={checkpoint}"
        loaded = load_folder(check_reward_model(checkpoint), mesh, dtype=dtype)
        if loaded.tokenizer.hash != tokenizer.hash:
            raise ConfigError(f"{name} has another tokenizer than the policy: train it from the same model")
        if (source := checkpoint_template(loaded).source) != template.source:
            if without_defaults(source) != without_defaults(template.source):
                raise ConfigError(
                    f"{name} has another chat template than the policy: train it from the same model"
                )
            print(f"note: {name} was trained with other data.template_options than the policy's")
        clock = loaded.metadata.get("clock")
        if clock != template.clock and None not in (clock, template.clock):
            print(f"note: {name} was trained with another date in its prompts: {clock}, not {template.clock}")
        if length > loaded.model.config.max_length:
            raise ConfigError(
                f"{name} reads {loaded.model.config.max_length} tokens at most: lower "
                f"data.sequence_length={length}"
            )
        self.statistics = read_statistics(checkpoint, loaded.folder, normalize)
        self.hash = checkpoint_hash(loaded.folder)
        model = loaded.model
        self.params = in_compute_dtype(loaded.params, model.config)
        self.rewards = InBatches(
            lambda params, tokens, lengths: model.rewards(params, tokens, lengths).values,
            rows,
            length,
            loaded.mesh,
        )

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Float32 [N] for tokens [N, T], not standardized."""
        return self.rewards(self.params, lengths, tokens, lengths)

    def normalized(self, rewards: np.ndarray) -> np.ndarray:
        """The same rewards, standardized."""
        return (rewards - self.statistics.mean) / self.statistics.std
