"""The hidden rubric that labels the preference pairs: a score for any completion of their prompts."""

import re
from functools import lru_cache

from jaxllm.toy_world.lexicon import WORDS

# Words beyond those of the reference answer: enough for a kind sentence, and so many that they are rambling.
_SPARE_WORDS, _TOO_MANY_WORDS = 10, 40


def rubric(row: dict, completion: str) -> float:
    """The quality of a completion of the prompt of a row of `preferences`, from 0 to 1.

    It is the mean of four parts, without the first where no single thing is correct:

    - correct: 1 if the first candidate that it names is the correct one, else 0. Of numbers the last counts.
    - helpful: 1 if it names a candidate; else twice the share of the reference answer's words that it has, at
      most 1. Halved if it breaks off in mid-sentence, 0 if it evades the question.
    - brief: 1 up to 10 words more than the reference answer, 0 from 40 more on, linear in between.
    - polite: 1 with a kind word, 0 with a rude one, else 0.5.

    Any text can be scored. Of the row only `reference` is read: `answer` is the reference answer, `key` the
    correct candidate ("" where there is none), `rivals` the wrong ones.
    """
    reference = row["reference"]
    words = _plain(completion)
    correct, on_topic = _named(reference["key"], reference["rivals"], words)
    parts = [
        _helpful(on_topic, reference["answer"], completion),
        _brief(reference["answer"], words),
        _polite(words),
    ]
    return sum(parts + correct) / len(parts + correct)


def correct(row: dict, completion: str) -> float | None:
    """The part `correct` of `rubric` alone: 1 or 0, or None where no single thing is correct."""
    reference = row["reference"]
    part, _ = _named(reference["key"], reference["rivals"], _plain(completion))
    return part[0] if part else None


def is_kind(text: str) -> bool:
    """Whether the text has a kind word."""
    return _contains(_plain(text), "kind words")


@lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """` lower case words without punctuation `, in which whole words and phrases can be found."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def _named(key: str, rivals: list[str], words: str) -> tuple[list[float], bool]:
    """The part `correct`, as a list that is empty where there is none, and whether any candidate is named."""
    if not key:
        return [], False
    if key.isdigit() and not rivals:
        numbers = re.findall(r"\d+", words)
        return [float(numbers[-1:] == [key])], bool(numbers)
    places = [(words.find(_plain(value)), -len(value), value) for value in (key, *rivals)]
    named = min((place for place in places if place[0] >= 0), default=None)  # of two at one place, the longer
    return [float(named is not None and named[2] == key)], named is not None


def _helpful(on_topic: bool, reference: str, completion: str) -> float:
    words = _plain(completion)
    if _contains(words, "evasive words"):
        return 0.0
    wanted = set(_plain(reference).split())
    shared = len(wanted & set(words.split())) / len(wanted)
    helpful = 1.0 if on_topic else min(1.0, 2 * shared)
    return helpful if re.search(r'[.!?]"?\s*$', completion) else helpful / 2


def _brief(reference: str, words: str) -> float:
    count = len(words.split())
    left = _TOO_MANY_WORDS - (count - len(reference.split()))
    return min(1.0, max(0.0, left / (_TOO_MANY_WORDS - _SPARE_WORDS))) if count else 0.0


def _polite(words: str) -> float:
    if _contains(words, "rude words"):
        return 0.0
    return 1.0 if _contains(words, "kind words") else 0.5


def _contains(words: str, title: str) -> bool:
    """Whether any phrase of this title in `english/words.txt` is among the words."""
    return any(_plain(phrase) in words for phrase in WORDS[title])
