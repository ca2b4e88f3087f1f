"""Do a reward model, a judge and people prefer the same of two answers? Agreement beyond chance, with
intervals."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.messages import Message, as_messages
from jaxllm.data.sources import open_source
from jaxllm.evaluation.preference import fraction
from jaxllm.evaluation.suite_model import SuiteModel
from jaxllm.evaluation.suites import Question, Suite

RESAMPLES = 2000
FEWEST = 10  # comparisons with an interval: resampling fewer makes it too narrow

Label = int | str  # 0 or 1: the index of the better answer; or "tie", "bad"


class Kappa(NamedTuple):
    """Cohen's kappa (1960) of two raters: 0 as by chance, 1 always equal; NaN where chance always agrees."""

    value: float
    low: float  # the 95% interval, by resampling the comparisons; NaN of fewer than FEWEST
    high: float
    share: float  # of equal labels
    comparisons: int


def cohen_kappa(first: Sequence[Label], second: Sequence[Label], groups: Sequence[int]) -> Kappa:
    """The agreement of two raters' labels of the same things; those of one group are resampled together.

    >>> cohen_kappa([0, 0, 1, 1], [0, 1, 1, 1], range(4))[0]
    0.5
    """
    names = sorted({*first, *second}, key=str)
    table = np.zeros((len(set(groups)), len(names), len(names)))  # counts in each group
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    for a, b, group in zip(first, second, groups, strict=True):
        table[number[group], names.index(a), names.index(b)] += 1
    total = table.sum(0)
    value, share = float(kappas(total[None])[0]), float(np.trace(total) / total.sum())
    if len(table) < FEWEST or np.isnan(value):
        return Kappa(value, np.nan, np.nan, share, len(table))
    draws = np.random.default_rng(0).multinomial(len(table), np.full(len(table), 1 / len(table)), RESAMPLES)
    low, high = np.nanquantile(kappas(np.tensordot(draws, table, axes=1)), (0.025, 0.975))
    return Kappa(value, float(low), float(high), share, len(table))


def kappas(tables: np.ndarray) -> np.ndarray:
    """Kappa of each table of counts [N, labels, labels]: (observed - chance) / (1 - chance)."""
    tables = tables / tables.sum((1, 2), keepdims=True)
    observed = np.trace(tables, axis1=1, axis2=2)
    chance = (tables.sum(1) * tables.sum(2)).sum(1)
    certain = np.isclose(chance, 1)
    return np.where(certain, np.nan, (observed - chance) / np.where(certain, 1, 1 - chance))


def agreements(
    people: Sequence[Mapping[str, Label]], models: Mapping[str, Sequence[int]]
) -> dict[str, Kappa]:
    """Kappa of people with each other, of each model with people, and of models with each other.

    Args:
      people: of each comparison the labels by rater.
      models: of each model its label of each comparison, 0 or 1. It is compared with the people who chose one
        of the two answers.
    """

    def kappa(labels: Callable[[int], Sequence[tuple[Label, Label]]]) -> Kappa | None:
        found = [(*pair, i) for i in range(len(people)) for pair in labels(i)]
        return cohen_kappa(*zip(*found, strict=True)) if found else None

    def both_orders(labels: Sequence[Label]) -> list[tuple[Label, Label]]:
        return list(itertools.permutations(labels, 2))  # which of two people is the first says nothing

    found = {"people and people": kappa(lambda i: both_orders(list(people[i].values())))}
    for name, own in models.items():
        found[f"{name} and people"] = kappa(
            lambda i, own=own: [(own[i], label) for label in people[i].values() if label in (0, 1)]
        )
    for (a, first), (b, second) in itertools.combinations(models.items(), 2):
        found[f"{a} and {b}"] = kappa(lambda i, x=first, y=second: [(x[i], y[i])])
    return {name: each for name, each in found.items() if each is not None}


class Comparison(NamedTuple):
    """Two answers to one prompt, and what people chose."""

    prompt: Sequence[Message]
    answers: tuple[str, str]
    labels: dict[str, Label]  # by rater


def read_comparisons(source: str) -> list[Comparison]:
    """The comparisons in a file of the comparison page (`prompt`, two `answers`, `choice`, `rater`); rows of
    other formats are passed over."""
    found: dict[str, Comparison] = {}
    for row in open_source(source, split="validation", text_key=None, synthetic_rows=1, seed=0).rows():
        record = row.value or {}
        answers, choice = record.get("answers"), record.get("choice")
        if not isinstance(answers, list) or len(answers) != 2 or choice not in (0, 1, "tie", "bad"):
            continue
        messages = as_messages(record["prompt"], "user")
        key = str(record.get("comparison") or json.dumps([messages, sorted(answers)]))
        comparison = found.setdefault(key, Comparison(messages, (answers[0], answers[1]), {}))
        if sorted(answers) == sorted(comparison.answers):  # else somebody has edited the row
            label = choice if isinstance(choice, str) else comparison.answers.index(answers[choice])
            comparison.labels[str(record.get("rater", "people"))] = label
    return list(found.values())


class Verdicts(NamedTuple):
    """What a judge that sees both answers prefers."""

    labels: list[int]  # the index of the better answer, by the two orders together
    first_preferred: tuple[float, float]  # share of questions whose first answer it prefers, standard error
    same_in_both_orders: tuple[float, float]  # share of comparisons


def judge(model: SuiteModel, comparisons: Sequence[Comparison]) -> Verdicts:
    """Ask a model which of two answers is better, A or B, in both orders; it prefers the likelier letter."""
    questions = [
        Question(
            id=f"{i}-{order}",
            where=f"comparison {i + 1}",
            row={},
            messages=[{"role": "user", "content": question_text(comparison, order)}],
            choices=("A", "B"),
        )
        for i, comparison in enumerate(comparisons)
        for order in (0, 1)
    ]
    results = model.measure(Suite("judge", "choices", questions))
    log_probs = np.array([result.details["log_probs"] for result in results])
    margins = (log_probs[:, 0] - log_probs[:, 1]).reshape(-1, 2)  # of A, which is answer 0, then answer 1
    first, groups = (margins > 0).ravel(), np.repeat(np.arange(len(margins)), 2)
    return Verdicts(
        labels=[int(a < b) for a, b in margins.tolist()],
        first_preferred=fraction(first, groups),
        same_in_both_orders=fraction((margins > 0).sum(1) == 1),
    )


def question_text(comparison: Comparison, order: int) -> str:
    """The question to a judge, with answer `order` as A."""
    prompt = "\n".join(f"{message['role']}: {message['content']}" for message in comparison.prompt)
    a, b = comparison.answers[order], comparison.answers[1 - order]
    return f"{prompt}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\nWhich answer is better? Reply with A or B."


def describe(found: Mapping[str, Kappa]) -> list[str]:
    """A line for each two raters."""

    def agreement(kappa: Kappa) -> str:
        if np.isnan(kappa.value):
            return "no kappa, as all labels are the same"
        if np.isnan(kappa.low):
            return f"kappa {kappa.value:.2f}, no interval from fewer than {FEWEST} comparisons"
        return f"kappa {kappa.value:.2f} [{kappa.low:.2f}, {kappa.high:.2f}]"

    return [
        f"{name}: {agreement(kappa)}; {kappa.share:.1%} equal, {kappa.comparisons} comparisons"
        for name, kappa in found.items()
    ]
