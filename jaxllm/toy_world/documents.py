"""Documents for pretraining, each a function of (seed, split, index) alone."""

import random
from collections.abc import Callable, Iterator

from jaxllm.toy_world import descriptions
from jaxllm.toy_world.language import frame
from jaxllm.toy_world.problems import Problem, sum_problem, word_problem
from jaxllm.toy_world.split import Split, check_split, split_of
from jaxllm.toy_world.stories import story
from jaxllm.toy_world.world import World, build_world


def documents(split: Split, *, count: int, seed: int) -> Iterator[str]:
    """The first `count` documents of a split, about the world of this seed."""
    return (document(split, index, seed=seed) for index in range(count))


def document(split: Split, index: int, *, seed: int) -> str:
    """One document, independent of all others.

    Training and validation are about the same world, but share no document and no equation that a problem
    asks for: a text whose hash is in the other split is discarded and another one generated.
    """
    check_split(split)
    world = build_world(seed)
    rng = random.Random(f"document {seed} {split} {index}")
    kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    while True:
        text = write(kind, world, rng, split)
        if split_of(text) == split:
            return text


def write(kind: str, world: World, rng: random.Random, split: Split) -> str:
    """A text of one kind of `MIXTURE`. Its problems use numbers of the split."""
    if kind in _NUMBERS:
        return _NUMBERS[kind](world, rng, split)
    return _WORDS[kind](world, rng)


def _sums(world: World, rng: random.Random, split: Split) -> str:
    """A list of sums, each with its working, or a dialogue in which a child works two of them out."""
    if rng.random() < 0.4:
        return "\n".join(_lesson(sum_problem(rng, split), world, rng) for _ in range(2))
    problems = [sum_problem(rng, split) for _ in range(rng.randint(4, 6))]
    if rng.random() < 0.5:
        return "\n".join(f"{problem.question} {problem.working}" for problem in problems)
    return "\n".join(f"{problem.equations[0].task}: {problem.working}" for problem in problems)


def _word_problems(world: World, rng: random.Random, split: Split) -> str:
    """Word problems about people of the world, with their working or as a dialogue."""
    if rng.random() < 0.4:
        return "\n".join(_lesson(word_problem(world, rng, split), world, rng) for _ in range(2))
    problems = [word_problem(world, rng, split) for _ in range(rng.randint(2, 3))]
    return "\n".join(f"{problem.question} {problem.working}" for problem in problems)


def _lesson(problem: Problem, world: World, rng: random.Random) -> str:
    a, b = rng.choice(world.children), rng.choice(world.adults)
    return frame("lesson", rng, a=a, b=b, **problem._asdict())


_NUMBERS: dict[str, Callable[[World, random.Random, Split], str]] = {
    "sums": _sums,
    "word problems": _word_problems,
}
_WORDS: dict[str, Callable[[World, random.Random], str]] = {
    "story": story,
    "explanation": descriptions.explanation,
    "questions": descriptions.questions,
    "person": descriptions.person,
    "town": descriptions.town,
    "nature": descriptions.nature,
    "comparison": descriptions.comparison,
    "instructions": descriptions.instructions,
}

# Percentage of the documents of each kind.
MIXTURE = {
    "story": 30,
    "sums": 12,
    "word problems": 12,
    "explanation": 12,
    "questions": 8,
    "person": 8,
    "nature": 6,
    "comparison": 5,
    "instructions": 5,
    "town": 2,
}
