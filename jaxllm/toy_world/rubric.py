"""What makes an answer good, written down: the hidden taste behind the preferences of the small world."""

import re
from functools import lru_cache

from jaxllm.toy_world.lexicon import WORDS

# Words beyond those of the good answer: room for a kind sentence, and nothing but rambling.
_SPARE_WORDS, _TOO_MANY_WORDS = 10, 40


def rubric(row: dict, answer: str) -> float:
    """How good `answer` is as a reply to the prompt of a row of `preferences`, from 0 to 1.

    The mean of four parts, without the first where no one thing is right:

    - correct: of all that could be the answer, it names the right one first. Of numbers, the last one counts.
    - helpful: it names something of the kind that was asked for, or else shares half of the words of the good
      answer (in proportion below that); half as much if it breaks off; nothing if it evades the question.
    - brief: up to 10 words more than the good answer has are 1, 40 more are 0, in proportion between.
    - polite: a kind word is 1, none is a half, a rude one is 0.

    Any text can be judged, and only the row's `reference` is needed: `answer` is a good one, `key` what a
    right one says, `rivals` what a wrong one says in its place.
    """
    reference = row["reference"]
    said = _plain(answer)
    correct, on_topic = _named(reference["key"], reference["rivals"], said)
    parts = [
        _helpful(on_topic, reference["answer"], answer),
        _brief(reference["answer"], said),
        _polite(said),
    ]
    return sum(parts + correct) / len(parts + correct)


def correct(row: dict, answer: str) -> float | None:
    """The first part of `rubric` alone: 1 if the right one is named first, 0 if not, None where no one thing
    is right."""
    reference = row["reference"]
    part, _ = _named(reference["key"], reference["rivals"], _plain(answer))
    return part[0] if part else None


def is_kind(text: str) -> bool:
    """Whether there is a kind word in it."""
    return _contains(_plain(text), "kind words")


@lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """` lower case words without marks `, in which whole words and phrases can be looked for."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def _named(key: str, rivals: list[str], said: str) -> tuple[list[float], bool]:
    """The part `correct`, in a list that is empty where there is none, and whether any candidate is named."""
    if not key:
        return [], False
    if key.isdigit() and not rivals:
        numbers = re.findall(r"\d+", said)
        return [float(numbers[-1:] == [key])], bool(numbers)
    places = [(said.find(_plain(value)), -len(value), value) for value in (key, *rivals)]
    named = min((place for place in places if place[0] >= 0), default=None)  # of two at one place the longer
    return [float(named is not None and named[2] == key)], named is not None


def _helpful(on_topic: bool, good_answer: str, answer: str) -> float:
    said = _plain(answer)
    if _contains(said, "evasive words"):
        return 0.0
    good_words = set(_plain(good_answer).split())
    shared = len(good_words & set(said.split())) / len(good_words)
    helpful = 1.0 if on_topic else min(1.0, 2 * shared)
    return helpful if re.search(r'[.!?]"?\s*$', answer) else helpful / 2


def _brief(good_answer: str, said: str) -> float:
    count = len(said.split())
    left = _TOO_MANY_WORDS - (count - len(good_answer.split()))
    return min(1.0, max(0.0, left / (_TOO_MANY_WORDS - _SPARE_WORDS))) if count else 0.0


def _polite(said: str) -> float:
    if _contains(said, "rude words"):
        return 0.0
    return 1.0 if _contains(said, "kind words") else 0.5


def _contains(said: str, title: str) -> bool:
    return any(_plain(phrase) in said for phrase in WORDS[title])
