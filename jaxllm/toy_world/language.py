"""Templates with choices, the rules that turn them into correct English, and the files that hold them."""

import random
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib import resources
from typing import TypeAlias

_MARKS = re.compile(r"([\[|\]])")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|LLM)(?!use|one)")
# A sentence starts the text or a line, follows a full stop, or is quoted after a colon.
_SENTENCE_START = re.compile(r'(^"?|\n"?|[.!?] "?|: ")([a-z])')


# A list of alternatives, each a list of strings and of further alternatives.
Alternatives: TypeAlias = "list[list[str | Alternatives]]"


def spin(template: str, rng: random.Random, **slots: object) -> str:
    """Replace every `[this|that|]` by one of its alternatives, fill in the `{slots}`, and `tidy` the text.

    >>> spin("[he|he] ate a {food}. it was [good|good].", random.Random(0), food="egg")
    'He ate an egg. It was good.'
    """
    return tidy(choose(template, rng).format_map(slots))


def choose(template: str, rng: random.Random) -> str:
    """Only replace the choices."""
    return _choose(_parse(template), rng) if "[" in template else template


def _choose(alternatives: Alternatives, rng: random.Random) -> str:
    parts = rng.choice(alternatives) if len(alternatives) > 1 else alternatives[0]
    return "".join([part if isinstance(part, str) else _choose(part, rng) for part in parts])


@lru_cache(maxsize=4096)
def _parse(template: str) -> Alternatives:
    return _alternatives(iter(_MARKS.split(template)))


def _alternatives(tokens: Iterator[str]) -> Alternatives:
    """The alternatives up to the closing bracket."""
    alternatives: Alternatives = [[]]
    for token in tokens:
        if token == "[":
            alternatives[-1].append(_alternatives(tokens))
        elif token == "|":
            alternatives.append([])
        elif token == "]":
            break
        else:
            alternatives[-1].append(token)
    return alternatives


def tidy(text: str) -> str:
    """Put `an` before vowel sounds, and a capital at the start of every sentence."""
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE_START.sub(lambda start: start[1] + start[2].upper(), text)


@cache
def passages(name: str) -> tuple[tuple[str, ...], ...]:
    """The passages of `english/NAME.txt`, each a tuple of lines. Blank lines separate them."""
    text = resources.files("jaxllm.toy_world").joinpath("english", f"{name}.txt").read_text(encoding="ascii")
    return tuple(tuple(block.splitlines()) for block in text.strip().split("\n\n"))


def frame(title: str, rng: random.Random, **slots: object) -> str:
    """A random passage of `english/frames.txt` or `chats.txt` with this title, filled in."""
    return spin(rng.choice(frames()[title]), rng, **slots)


@cache
def frames() -> dict[str, list[str]]:
    """The passages of both files by title."""
    titled: dict[str, list[str]] = {}
    for title, *lines in passages("frames") + passages("chats"):
        titled.setdefault(title, []).append("\n".join(lines))
    return titled


@cache
def table(name: str) -> tuple[tuple[str, ...], ...]:
    """The rows of `english/NAME.txt`, whose cells are separated by `|`."""
    (lines,) = passages(name)
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in lines)
