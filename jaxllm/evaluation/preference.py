"""How well a reward model, or a policy's log-probs, predict the preferred completion: with standard errors,
and beside the baseline of choosing by length."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.batches import PairBatch
from jaxllm.losses import dpo_loss
from jaxllm.models import Params


class PairScores(NamedTuple):
    """Scores and lengths of N pairs, the chosen completion first."""

    scores: np.ndarray  # float64 [N, 2], rewards or log-probs
    completion_lengths: np.ndarray  # int [N, 2], tokens
    margin: np.ndarray  # [N]
    ref_log_probs: np.ndarray  # [N, 2]


def score_pairs(
    params: Params,
    batches: Iterable[PairBatch],
    score: Callable[[Params, PairBatch], jax.Array],
    check: Callable[[], None],
) -> PairScores:
    """Score every pair that has weight. `score(params, batch) -> [B, 2]`; `check` is called before every
    batch and may raise to end it early."""
    parts = []
    for batch in batches:
        check()
        lengths = batch.lengths - batch.prompt_lengths[:, None]
        columns = (score(params, batch), lengths, batch.margin, batch.ref_log_probs)
        *columns, weight = jax.device_get((*columns, batch.weight))
        parts.append(PairScores(*(column[weight > 0] for column in columns)))
    return PairScores(*(np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True)))


def fraction(hits: np.ndarray) -> tuple[float, float]:
    """The mean of independent zeros and ones, and its standard error; NaN where there are none."""
    if not len(hits):
        return float("nan"), float("nan")
    mean = float(hits.mean())
    return mean, float(np.sqrt(mean * (1 - mean) / len(hits)))


def mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values and its standard error; NaN where there are none."""
    if not len(values):
        return float("nan"), float("nan")
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean()), float(spread)


def reward_metrics(found: PairScores) -> dict[str, float]:
    """How well a reward model predicts preferences, `eval/NAME` and `eval/NAME_se`.

    `accuracy` (a tie is wrong), also where the chosen completion is the longer or the shorter one;
    `length_baseline`, the accuracy of always choosing the longer completion (a tie is a half); `margin`; and
    `reward_mean` and `reward_std` over all completions, by which a policy's rewards are standardized later.
    """
    right = found.scores[:, 0] > found.scores[:, 1]
    difference = found.completion_lengths[:, 0] - found.completion_lengths[:, 1]
    parts = {
        "accuracy": fraction(right),
        "accuracy_longer_chosen": fraction(right[difference > 0]),
        "accuracy_shorter_chosen": fraction(right[difference < 0]),
        "length_baseline": mean(np.heaviside(difference, 0.5)),
        "margin": mean(found.scores[:, 0] - found.scores[:, 1]),
        "loss": mean(np.logaddexp(0, found.margin - found.scores[:, 0] + found.scores[:, 1])),
    }
    spread = {"eval/reward_mean": float(found.scores.mean()), "eval/reward_std": float(found.scores.std())}
    return with_errors(parts) | spread


def dpo_metrics(
    found: PairScores, *, beta: float, variant: str, label_smoothing: float, length_normalized: bool
) -> dict[str, float]:
    """`eval/loss`, and the policy's implicit rewards beta (log-prob - reference's): `eval/rewards/NAME` and
    `..._se`."""
    lengths = dict(zip(("chosen_length", "rejected_length"), found.completion_lengths.T, strict=True))
    loss, _ = dpo_loss(
        *found.scores.T,
        *found.ref_log_probs.T,
        beta=beta,
        variant=variant,
        label_smoothing=label_smoothing,
        **(lengths if length_normalized else {}),
    )
    rewards = beta * (found.scores - found.ref_log_probs)
    parts = {
        "rewards/chosen": mean(rewards[:, 0]),
        "rewards/rejected": mean(rewards[:, 1]),
        "rewards/margins": mean(rewards[:, 0] - rewards[:, 1]),
        "rewards/accuracies": fraction(rewards[:, 0] > rewards[:, 1]),
    }
    return {"eval/loss": float(loss.mean)} | with_errors(parts)


def with_errors(parts: dict[str, tuple[float, float]]) -> dict[str, float]:
    """{name: (value, standard error)} as metrics `eval/NAME` and `eval/NAME_se`."""
    return {f"eval/{name}": value for name, (value, _) in parts.items()} | {
        f"eval/{name}_se": error for name, (_, error) in parts.items()
    }
