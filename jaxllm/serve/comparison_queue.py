"""Which pair of answers each rater compares next, the choices made, and how far raters agree."""

import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, NamedTuple

from jaxllm.serve.preferences import Choice, PreferenceFile
from jaxllm.serve.raters import normalized

LEASE = 900.0  # seconds until a pair shown to a rater who made no choice goes to another

Messages = list[dict[str, str]]


@dataclass
class Comparison:
    """Two answers to one prompt, in the order in which they were generated."""

    prompt: Messages
    answers: list[str]
    seeds: list[int]
    checkpoints: list[dict[str, str]]  # path and hash of the checkpoint that generated each answer
    sampling: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    labels: dict[str, int | str] = field(default_factory=dict)  # by rater; an index is one of `answers`


@dataclass
class Offer:
    """A comparison as shown to a rater, the answers in random order."""

    comparison: Comparison
    rater: str
    order: tuple[int, int]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    time: float = field(default_factory=time.monotonic)

    @property
    def answers(self) -> list[str]:
        return [self.comparison.answers[i] for i in self.order]

    def row(self, choice: Choice) -> dict[str, Any]:
        """The row of the file; `answers`, `seeds` and `checkpoints` are in the order shown."""
        comparison = self.comparison
        return {
            "prompt": comparison.prompt,
            "answers": self.answers,
            "choice": choice,
            "rater": self.rater,
            "seeds": [comparison.seeds[i] for i in self.order],
            "sampling": comparison.sampling,
            "checkpoints": [comparison.checkpoints[i] for i in self.order],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "comparison": comparison.id,
            "id": self.id,
        }


class Agreement(NamedTuple):
    """How far raters agree on the comparisons that several of them judged."""

    comparisons: int  # judged by at least two raters
    share: float | None  # of equal choices between two raters, in [0, 1]
    kappa: float | None  # Fleiss' kappa: 0 as by chance, 1 always equal


class ChoiceError(Exception):
    """A choice that cannot be recorded or undone; the message is for the rater."""


class ComparisonQueue:
    """All comparisons with the choices that raters made, by their normalized names. Thread-safe."""

    def __init__(self, file: PreferenceFile, prompts: Iterable[Messages], raters_per_pair: int):
        """Resumes from the file: its prompts are not used again, and its comparisons wait for the raters
        they still need."""
        self.file, self.raters_per_pair = file, raters_per_pair
        self.comparisons: dict[str, Comparison] = {}
        self.offers: dict[str, Offer] = {}  # by rater: one open offer each
        self.lock = threading.RLock()
        for row in file.rows:
            comparison = self.comparisons.setdefault(row["comparison"], comparison_of(row))
            if not edited(comparison, row):
                comparison.labels[normalized(row["rater"])] = label(comparison, row)
        seen = {json.dumps(comparison.prompt) for comparison in self.comparisons.values()}
        self.prompts = [prompt for prompt in unique(prompts) if json.dumps(prompt) not in seen]
        self.in_progress = 0  # prompts whose answers are being generated

    def take_prompt(self) -> Messages | None:
        """The next prompt to generate answers to; followed by `add`, `put_back` or `skip`."""
        with self.lock:
            if not self.prompts:
                return None
            self.in_progress += 1
            return self.prompts.pop(0)

    def put_back(self, prompt: Messages) -> None:
        """Returns a taken prompt to the queue: generation failed and can be retried."""
        with self.lock:
            self.in_progress -= 1
            self.prompts.insert(0, prompt)

    def skip(self) -> None:
        """Drops a taken prompt: no two different answers could be generated."""
        with self.lock:
            self.in_progress -= 1

    def add(self, comparison: Comparison, *, from_prompts: bool = True) -> None:
        """Adds a comparison for a taken prompt or (not `from_prompts`) for one that a rater wrote."""
        with self.lock:
            self.in_progress -= from_prompts
            self.comparisons[comparison.id] = comparison

    def offer(self, rater: str, comparison: Comparison | None = None) -> Offer | None:
        """What this rater compares next: `comparison` if it is given, else their open offer, else the first
        comparison that needs another rater."""
        with self.lock:
            offer = self.offers.get(rater)
            if offer is None or comparison is not None:
                comparison = comparison or next(
                    (each for each in self.comparisons.values() if self._needs(each, rater)), None
                )
                if comparison is None:
                    return None
                offer = Offer(comparison, rater, random.choice([(0, 1), (1, 0)]))
            offer.time = time.monotonic()
            self.offers[rater] = offer
            return offer

    @property
    def unclaimed(self) -> int:
        """Comparisons that a new rater could be shown at once."""
        with self.lock:
            return sum(self._needs(comparison, "") for comparison in self.comparisons.values())

    def choose(self, id: str, rater: str, choice: Choice) -> None:
        """Records the choice for the offer `id`; returns when it is on disk. Repeating it has no effect."""
        with self.lock:
            offer = self.offers.get(rater)
            if offer is None or offer.id != id:
                row = next((row for row in reversed(self.file.rows) if row["id"] == id), None)
                if row is None:
                    raise ChoiceError("this comparison is no longer open; the next one is shown")
                if (normalized(row["rater"]), row["choice"]) != (rater, choice):
                    raise ChoiceError("another choice was already made here; use undo to change the last one")
                return
            row = offer.row(choice)
            self.file.append(row)
            offer.comparison.labels[rater] = label(offer.comparison, row)
            del self.offers[rater]

    def undo(self, rater: str) -> Offer:
        """Removes this rater's last choice and offers them the same comparison again, in the same order."""
        with self.lock:
            mine = (row for row in reversed(self.file.rows) if normalized(row["rater"]) == rater)
            row = next(mine, None)
            if row is None:
                raise ChoiceError("you have no choice to undo")
            comparison = self.comparisons[row["comparison"]]
            if edited(comparison, row):
                raise ChoiceError(
                    "your last choice cannot be undone: its row in the file was edited after it was written"
                )
            self.file.remove(row)
            comparison.labels.pop(rater, None)
            first = comparison.answers.index(row["answers"][0])
            self.offers[rater] = Offer(comparison, rater, (first, 1 - first))
            return self.offers[rater]

    @property
    def raters(self) -> set[str]:
        """Everybody who has made a choice."""
        with self.lock:
            return {normalized(row["rater"]) for row in self.file.rows}

    def progress(self, rater: str) -> dict[str, Any]:
        """Choices by this rater (`mine`), `done` of those wanted (`of`), rows in the file, and agreement."""
        with self.lock:
            comparisons = list(self.comparisons.values())
            wanted = self.raters_per_pair
            return {
                "mine": sum(rater in comparison.labels for comparison in comparisons),
                "done": sum(min(len(comparison.labels), wanted) for comparison in comparisons),
                "of": wanted * (len(comparisons) + len(self.prompts) + self.in_progress),
                "rows": len(self.file.rows),
                "agreement": agreement([comparison.labels for comparison in comparisons])._asdict(),
            }

    def _needs(self, comparison: Comparison, rater: str) -> bool:
        """Whether the comparison needs a choice by this rater."""
        missing = self.raters_per_pair - len(comparison.labels)
        if missing <= 0 or rater in comparison.labels:
            return False
        since = time.monotonic() - LEASE
        return missing > sum(
            offer.comparison is comparison and offer.time > since for offer in self.offers.values()
        )


def comparison_of(row: Mapping[str, Any]) -> Comparison:
    """The comparison of a row of the file, in the order shown to that rater."""
    fields = ("prompt", "answers", "seeds", "checkpoints", "sampling")
    return Comparison(**{name: row[name] for name in fields}, id=row["comparison"])


def edited(comparison: Comparison, row: Mapping[str, Any]) -> bool:
    """Whether somebody has changed an answer in the file."""
    return sorted(comparison.answers) != sorted(row["answers"])


def label(comparison: Comparison, row: Mapping[str, Any]) -> int | str:
    """The choice of a row as an index into `comparison.answers`, which differ from each other; or "tie" or
    "bad"."""
    choice = row["choice"]
    return choice if choice in ("tie", "bad") else comparison.answers.index(row["answers"][choice])


def unique(prompts: Iterable[Messages]) -> list[Messages]:
    """Each prompt once, in order."""
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


def agreement(labels: Sequence[Mapping[str, int | str]]) -> Agreement:
    """Agreement over comparisons, given the labels of each by rater; Fleiss (1971) for kappa."""
    judged = [list(each.values()) for each in labels if len(each) > 1]
    if not judged:
        return Agreement(0, None, None)
    equal = [[a == b for a, b in combinations(each, 2)] for each in judged]
    share = sum(sum(pairs) / len(pairs) for pairs in equal) / len(judged)
    counts = Counter(choice for each in judged for choice in each)
    chance = sum((count / counts.total()) ** 2 for count in counts.values())
    kappa = None if chance == 1 else (share - chance) / (1 - chance)
    return Agreement(len(judged), share, kappa)
