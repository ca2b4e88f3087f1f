"""How well a reward model, or a policy's log-probs, predict the preferred completion: with standard errors,
and beside the baseline of choosing by length."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeGuard

import jax
import numpy as np

from jaxllm.batches import PairBatch
from jaxllm.losses import dpo_loss
from jaxllm.models import Params
from jaxllm.parallel.global_arrays import to_host


class PairScores(NamedTuple):
    """Scores and lengths of N pairs, the chosen completion first."""

    scores: np.ndarray  # float64 [N, 2], rewards or log-probs
    completion_lengths: np.ndarray  # int [N, 2], tokens
    margin: np.ndarray  # [N]
    ref_log_probs: np.ndarray  # [N, 2]
    prompts: np.ndarray | None = None  # int [N], the same number for the same prompt; None: all differ


def score_pairs(
    params: Params,
    batches: Iterable[PairBatch],
    score: Callable[[Params, PairBatch], jax.Array],
    check: Callable[[], None],
) -> PairScores:
    """Score every pair that has weight. `score(params, batch) -> [B, 2]`; `check` is called before every
    batch and may raise to end it early."""
    parts, prompts = [], []
    for batch in batches:
        check()
        lengths = batch.lengths - batch.prompt_lengths[:, None]
        columns = (score(params, batch), lengths, batch.margin, batch.ref_log_probs)
        *columns, weight, tokens, starts = to_host(
            (*columns, batch.weight, batch.tokens, batch.prompt_lengths)
        )
        counted = weight > 0
        parts.append([column[counted] for column in columns])
        rows = zip(tokens[counted, 0], starts[counted], strict=True)
        prompts += [row[:start].tobytes() for row, start in rows]
    found = PairScores(*(np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True)))
    return found._replace(prompts=numbered(prompts))


def numbered(keys: Iterable[Hashable]) -> np.ndarray:
    """Int [N], the same number for equal keys: the groups of `mean`."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], int)


def fraction(hits: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The mean of zeros and ones, and its standard error; groups as in `mean`; NaN where there are none."""
    if not len(hits) or is_grouped(groups):
        return mean(hits.astype(np.float64), groups)
    share = float(hits.mean())
    return share, float(np.sqrt(share * (1 - share) / len(hits)))


def mean(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The mean of values and its standard error; NaN where there are none.

    Values are independent where their `groups`, int [N], differ. The values of a group count once in the
    standard error: it is that of G groups with sums s_g of deviations from the mean,
    sqrt(G / (G - 1) sum_g s_g^2) / N.
    """
    if not len(values):
        return float("nan"), float("nan")
    deviations = values - values.mean()
    if is_grouped(groups):
        deviations = np.bincount(np.unique(groups, return_inverse=True)[1], deviations)
        count = len(deviations)
        spread = np.sqrt(count / (count - 1) * (deviations**2).sum()) / len(values) if count > 1 else np.nan
    else:
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(spread)


def is_grouped(groups: np.ndarray | None) -> TypeGuard[np.ndarray]:
    """Whether any two values are of one group."""
    return groups is not None and len(np.unique(groups)) < len(groups)


def reward_metrics(found: PairScores) -> dict[str, float]:
    """How well a reward model predicts preferences, `eval/NAME` and `eval/NAME_se`.

    `accuracy` (a tie is wrong), also where the chosen completion is the longer or the shorter one;
    `length_baseline`, the accuracy of always choosing the longer completion (a tie is a half);
    `longer_preferred`, how often the longer completion has the higher reward; `margin`; and
    `reward_mean` and `reward_std` over all completions, by which a policy's rewards are standardized later.
    """
    right, prompts = found.scores[:, 0] > found.scores[:, 1], found.prompts
    difference = found.completion_lengths[:, 0] - found.completion_lengths[:, 1]

    def accuracy(pairs: np.ndarray) -> tuple[float, float]:
        return fraction(right[pairs], None if prompts is None else prompts[pairs])

    parts = {
        "accuracy": fraction(right, prompts),
        "accuracy_longer_chosen": accuracy(difference > 0),
        "accuracy_shorter_chosen": accuracy(difference < 0),
        "length_baseline": mean(np.heaviside(difference, 0.5), prompts),
        "longer_preferred": longer_preferred(found.scores, difference, prompts),
        "margin": mean(found.scores[:, 0] - found.scores[:, 1], prompts),
        "loss": mean(np.logaddexp(0, found.margin - found.scores[:, 0] + found.scores[:, 1]), prompts),
    }
    spread = {"eval/reward_mean": float(found.scores.mean()), "eval/reward_std": float(found.scores.std())}
    return with_errors(parts) | spread


def longer_preferred(
    scores: np.ndarray, difference: np.ndarray, prompts: np.ndarray | None
) -> tuple[float, float]:
    """How often the longer of two completions has the higher score, where lengths differ, with the standard
    error; equal scores are a half. `difference` [N] of the lengths, `scores` [N, 2]."""
    unequal = difference != 0
    preferred = np.heaviside((scores[:, 0] - scores[:, 1]) * np.sign(difference), 0.5)
    return mean(preferred[unequal], None if prompts is None else prompts[unequal])


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
        "rewards/chosen": mean(rewards[:, 0], found.prompts),
        "rewards/rejected": mean(rewards[:, 1], found.prompts),
        "rewards/margins": mean(rewards[:, 0] - rewards[:, 1], found.prompts),
        "rewards/accuracies": fraction(rewards[:, 0] > rewards[:, 1], found.prompts),
    }
    return {"eval/loss": float(loss.mean)} | with_errors(parts)


def with_errors(parts: dict[str, tuple[float, float]]) -> dict[str, float]:
    """{name: (value, standard error)} as metrics `eval/NAME` and `eval/NAME_se`."""
    return {f"eval/{name}": value for name, (value, _) in parts.items()} | {
        f"eval/{name}_se": error for name, (_, error) in parts.items()
    }
