"""Who compares what: pairs of answers, the raters they are shown to, and how far these agree."""

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
from typing import Any

from jaxllm.serve.preferences import PreferenceFile

LEASE = 900.0  # seconds after which a rater who was shown a pair has left

Messages = list[dict[str, str]]


@dataclass
class Comparison:
    """Two answers to one prompt, in the order they were made in."""

    prompt: Messages
    answers: list[str]
    seeds: list[int]
    checkpoints: list[dict[str, str]]  # path and hash, of each answer
    sampling: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    labels: dict[str, Any] = field(default_factory=dict)  # of each rater: which answer, or "tie" or "bad"


@dataclass
class Offer:
    """A comparison as a rater sees it. The answers stand in a random order."""

    comparison: Comparison
    rater: str
    order: tuple[int, int]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    time: float = field(default_factory=time.monotonic)

    @property
    def answers(self) -> list[str]:
        return [self.comparison.answers[i] for i in self.order]

    def row(self, choice: Any) -> dict[str, Any]:
        """The line of the file; `answers`, `seeds` and `checkpoints` in the order shown."""
        made = self.comparison
        return {
            "prompt": made.prompt,
            "answers": self.answers,
            "choice": choice,
            "rater": self.rater,
            "seeds": [made.seeds[i] for i in self.order],
            "sampling": made.sampling,
            "checkpoints": [made.checkpoints[i] for i in self.order],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "comparison": made.id,
            "id": self.id,
        }


class Refused(Exception):
    """A choice that cannot be taken, or taken back; the message is for the rater."""


class ComparisonQueue:
    """All comparisons, and what raters have said about them. Any thread may call it."""

    def __init__(self, file: PreferenceFile, prompts: Iterable[Messages], raters_per_pair: int):
        """Goes on where the file ends: its prompts are not asked again, its comparisons wait for raters who
        are missing."""
        self.file, self.raters_per_pair = file, raters_per_pair
        self.comparisons: dict[str, Comparison] = {}
        self.offers: dict[str, Offer] = {}  # by rater: one at a time
        self.lock = threading.RLock()
        for row in file.rows:
            made = self.comparisons.setdefault(row["comparison"], comparison_of(row))
            if not edited(made, row):
                made.labels[row["rater"]] = label(made, row)
        seen = {json.dumps(made.prompt) for made in self.comparisons.values()}
        self.prompts = [prompt for prompt in unique(prompts) if json.dumps(prompt) not in seen]
        self.in_hand = 0  # prompts that are being answered

    def take_prompt(self) -> Messages | None:
        """The next prompt to be answered, if there is one; then `add`, `put_back` or `skip`."""
        with self.lock:
            if not self.prompts:
                return None
            self.in_hand += 1
            return self.prompts.pop(0)

    def put_back(self, prompt: Messages) -> None:
        """It could not be answered now."""
        with self.lock:
            self.in_hand -= 1
            self.prompts.insert(0, prompt)

    def skip(self) -> None:
        """It cannot be answered, or not in two ways."""
        with self.lock:
            self.in_hand -= 1

    def add(self, comparison: Comparison, *, from_prompts: bool = True) -> None:
        """Two answers to a prompt that was taken, or to one that a rater has written."""
        with self.lock:
            self.in_hand -= from_prompts
            self.comparisons[comparison.id] = comparison

    def offer(self, rater: str, comparison: Comparison | None = None) -> Offer | None:
        """What this rater is to judge: what they were shown already, else this comparison, else the first
        that too few have judged or have before them."""
        with self.lock:
            offer = self.offers.get(rater)
            if offer is None or comparison is not None:
                made = comparison or next(
                    (x for x in self.comparisons.values() if self._open(x, rater)), None
                )
                offer = None if made is None else Offer(made, rater, random.choice([(0, 1), (1, 0)]))
            if offer is not None:
                offer.time = time.monotonic()
                self.offers[rater] = offer
            return offer

    @property
    def unclaimed(self) -> int:
        """Comparisons that the next rater could be shown at once."""
        with self.lock:
            return sum(self._open(made, "") for made in self.comparisons.values())

    def choose(self, id: str, rater: str, choice: Any) -> None:
        """Returns when the choice is on disk. An id is taken once; saying it again is no harm."""
        with self.lock:
            offer = self.offers.get(rater)
            if offer is None or offer.id != id:
                row = next((row for row in reversed(self.file.rows) if row["id"] == id), None)
                if row is None:
                    raise Refused("this comparison is not open any more: here is the next")
                if (row["rater"], row["choice"]) != (rater, choice):
                    raise Refused("another choice was made here already; undo takes the last one back")
                return
            row = offer.row(choice)
            self.file.append(row)
            offer.comparison.labels[rater] = label(offer.comparison, row)
            del self.offers[rater]

    def undo(self, rater: str) -> Offer:
        """Take back this rater's last choice, and offer the comparison to them again, as it was shown."""
        with self.lock:
            row = next((row for row in reversed(self.file.rows) if row["rater"] == rater), None)
            if row is None:
                raise Refused("there is no choice of yours to take back")
            made = self.comparisons[row["comparison"]]
            if edited(made, row):
                raise Refused("an answer of your last choice was edited by hand: its row stays in the file")
            self.file.remove(row)
            made.labels.pop(rater, None)
            first = made.answers.index(row["answers"][0])
            self.offers[rater] = Offer(made, rater, (first, 1 - first))
            return self.offers[rater]

    def progress(self, rater: str) -> dict[str, Any]:
        """Choices made, by this rater and by all, of how many; and how far raters agree."""
        with self.lock:
            pairs = list(self.comparisons.values())
            wanted = self.raters_per_pair
            return {
                "mine": sum(rater in made.labels for made in pairs),
                "done": sum(min(len(made.labels), wanted) for made in pairs),
                "of": wanted * (len(pairs) + len(self.prompts) + self.in_hand),
                "rows": len(self.file.rows),
                "agreement": agreement([made.labels for made in pairs]),
            }

    def _open(self, made: Comparison, rater: str) -> bool:
        """Whether this rater is one of those who are still to judge it."""
        missing = self.raters_per_pair - len(made.labels)
        if missing <= 0 or rater in made.labels:
            return False
        since = time.monotonic() - LEASE
        holders = [x for x in self.offers.values() if x.comparison is made and x.time > since]
        return missing > len(holders)


def comparison_of(row: Mapping[str, Any]) -> Comparison:
    """As the first rater saw it."""
    fields = ("prompt", "answers", "seeds", "checkpoints", "sampling")
    return Comparison(**{name: row[name] for name in fields}, id=row["comparison"])


def edited(made: Comparison, row: Mapping[str, Any]) -> bool:
    """Whether somebody has changed an answer in the file."""
    return sorted(made.answers) != sorted(row["answers"])


def label(made: Comparison, row: Mapping[str, Any]) -> Any:
    """Which answer was chosen, whatever order it was shown in. (The two are never the same.)"""
    choice = row["choice"]
    return choice if choice in ("tie", "bad") else made.answers.index(row["answers"][choice])


def unique(prompts: Iterable[Messages]) -> list[Messages]:
    """Each prompt once, in order."""
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


def agreement(labels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over comparisons that several raters have judged: how many, the share of equal choices between two
    raters, and Fleiss' kappa, which is 0 for choices made by chance and 1 for equal ones."""
    judged = [list(each.values()) for each in labels if len(each) > 1]
    if not judged:
        return {"comparisons": 0, "share": None, "kappa": None}
    equal = [[a == b for a, b in combinations(each, 2)] for each in judged]
    share = sum(sum(pairs) / len(pairs) for pairs in equal) / len(judged)
    counts = Counter(choice for each in judged for choice in each)
    chance = sum((count / counts.total()) ** 2 for count in counts.values())
    kappa = None if chance == 1 else (share - chance) / (1 - chance)
    return {"comparisons": len(judged), "share": share, "kappa": kappa}
