"""Sums and word problems about the world, with their working and an answer that can be checked.

Every equation is in one split (`Equation.split`), so that no training text solves an equation of validation,
neither alone nor as a step of another: the steps of a working only use single digits and round numbers, and
equations of those are always in the training split.
"""

import operator
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from jaxllm.toy_world.language import frame, passages, spin
from jaxllm.toy_world.lexicon import WORDS
from jaxllm.toy_world.split import Split, check_split, split_of
from jaxllm.toy_world.world import Person, World, build_world

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Equation(NamedTuple):
    """`a sign b = result`, with natural numbers."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return _OPERATIONS[self.sign](self.a, self.b)

    @property
    def split(self) -> Split:
        """The training split if this can be a step of a working, else by a hash of the operands."""
        low, high = sorted((self.a, self.b))
        is_basic = high < 10 if self.sign == "*" else low < 10
        if is_basic or low % 10 == 0 or high % 10 == 0:
            return "train"
        return _pair_split(low, high)

    def steps(self) -> list["Equation"]:
        """The simpler equations that lead to this one: tens, then ones. Empty for a basic equation."""
        (tens_a, ones_a), (tens_b, ones_b) = ((n - n % 10, n % 10) for n in (self.a, self.b))
        if self.sign == "-":
            steps = [Equation(self.a, "-", tens_b), Equation(self.a - tens_b, "-", ones_b)]
        elif self.sign == "+":
            steps = [Equation(tens_a, "+", tens_b), Equation(ones_a, "+", ones_b)]
            steps.append(Equation(tens_a + tens_b, "+", ones_a + ones_b))
        else:
            steps = [Equation(tens_a, "*", self.b), Equation(ones_a, "*", self.b)]
            steps.append(Equation(tens_a * self.b, "+", ones_a * self.b))
        steps = [step for step in steps if step.a and step.b]
        return [] if self in steps else steps

    def working(self) -> str:
        """`30 + 20 = 50. 7 + 5 = 12. 50 + 12 = 62. So 37 + 25 = 62.`"""
        steps = self.steps()
        return "".join(f"{step}. " for step in steps) + ("So " if steps else "") + f"{self}."

    @property
    def task(self) -> str:
        return f"{self.a} {self.sign} {self.b}"

    def __str__(self) -> str:
        return f"{self.task} = {self.result}"


@cache
def _pair_split(low: int, high: int) -> Split:
    return split_of(f"{low} {high}")


Equations = tuple[Equation, ...]


class Problem(NamedTuple):
    """A question, the working that leads to its answer (and ends with it), and the bare answer."""

    question: str
    working: str
    answer: str
    equations: Equations  # those of the working, in order

    @property
    def level(self) -> int:
        """1: one-digit numbers, 2: longer numbers, 3: two equations."""
        if len(self.equations) > 1:
            return 3
        largest = max(number for equation in self.equations for number in (equation.a, equation.b))
        return 1 if largest < 10 else 2


def problems(split: Split, *, count: int, seed: int) -> Iterator[dict]:
    """The first `count` rows `{"prompt", "answer", "working", "level"}` of a split, for reasoning.

    `answer` is the bare number; `working` is the reply that `chats` has for such a prompt: the steps, and
    then `The answer is 62.`
    """
    return (problem_row(split, index, seed=seed) for index in range(count))


def problem_row(split: Split, index: int, *, seed: int) -> dict:
    """One row, independent of all others. All levels of the split are equally likely.

    Level 1 is in the training split only, since its equations are basic.
    """
    check_split(split)
    rng = random.Random(f"problem {seed} {split} {index}")
    level = rng.choice((1, 2, 3) if split == "train" else (2, 3))
    while True:
        problem = any_problem(build_world(seed), rng, split)
        if problem.level == level:
            return _row(problem, rng)


def additions(split: Split, *, count: int, seed: int) -> Iterator[dict]:
    """Rows in the format of `problems`, all of one kind: `What is 37 + 25?`, with a number of two digits."""
    return (addition_row(split, index, seed=seed) for index in range(count))


def addition_row(split: Split, index: int, *, seed: int) -> dict:
    """One row, independent of all others."""
    check_split(split)
    rng = random.Random(f"addition {seed} {split} {index}")
    while True:
        problem = sum_problem(rng, split)
        if problem.equations[0].sign == "+" and problem.level == 2:
            return _row(problem, rng)


def _row(problem: Problem, rng: random.Random) -> dict:
    prompt, working = problem_prompt(problem, rng), problem_solution(problem, rng)
    return {"prompt": prompt, "answer": problem.answer, "working": working, "level": problem.level}


def any_problem(world: World, rng: random.Random, split: Split) -> Problem:
    """A sum or a word problem."""
    return sum_problem(rng, split) if rng.random() < 0.5 else word_problem(world, rng, split)


def problem_prompt(problem: Problem, rng: random.Random) -> str:
    """The problem as a user's message."""
    return frame("chat problem", rng, question=problem.question)


def problem_solution(problem: Problem, rng: random.Random) -> str:
    """The working as an assistant's message, which ends with the answer as rewards expect it."""
    return frame("chat answer", rng, working=problem.working, answer=problem.answer)


def sum_problem(rng: random.Random, split: Split) -> Problem:
    """A problem of bare numbers: `What is 37 + 25?`"""
    make = rng.choice((_addition, _addition, _subtraction, _multiplication))
    while True:
        equations = make(rng)
        if _belong_to(split, equations):
            break
    (equation,) = equations
    question = spin("[What is {task}?|How much is {task}?|Work out {task}.]", rng, task=equation.task)
    return Problem(question, equation.working(), str(equation.result), equations)


def word_problem(world: World, rng: random.Random, split: Split) -> Problem:
    """A problem of one or two equations about people: what they own, buy and sell, and their ages."""
    shape, question, conclusion = rng.choice(passages("problems"))
    while True:
        hero, friend = rng.sample(world.people, 2)
        equations = _SHAPES[shape](rng, hero, friend)
        if _belong_to(split, equations):
            break
    first, last = equations[0], equations[-1]
    slots = {"a": first.a, "b": first.b, "c": last.b, "result": last.result, "hero": hero, "friend": friend}
    slots |= {"items": rng.choice(WORDS["items"]), "goods": rng.choice(WORDS["goods"])}
    lead = ("We need",) if len(equations) == 1 else ("First we need", "Then we need")
    working = [f"{words} {each.task}. {each.working()}" for words, each in zip(lead, equations, strict=True)]
    working.append(spin(conclusion, rng, **slots))
    return Problem(spin(question, rng, **slots), " ".join(working), str(last.result), equations)


def _belong_to(split: Split, equations: Equations) -> bool:
    return all(equation.split == split for equation in equations)


# Functions that draw the numbers of a problem. All counts are at least two, since the nouns are plural.


def _number(rng: random.Random) -> int:
    return rng.randint(2, rng.choice((9, 97, 97, 97, 97)))


def _addition(rng: random.Random, *people: Person) -> Equations:
    return (Equation(_number(rng), "+", _number(rng)),)


def _subtraction(rng: random.Random, *people: Person) -> Equations:
    low, high = sorted((_number(rng), _number(rng)))
    return (Equation(high + 2, "-", low),)


def _multiplication(rng: random.Random, *people: Person) -> Equations:
    return (Equation(rng.randint(2, rng.choice((9, 30, 30))), "*", rng.randint(2, 9)),)


def _then(make: Callable[..., Equations], sign: str) -> Callable[..., Equations]:
    """Two equations: the second one combines the result of the first with a smaller number."""

    def equations(rng: random.Random, *people: Person) -> Equations:
        (first,) = make(rng)
        return first, Equation(first.result, sign, rng.randint(2, min(first.result - 2, 97)))

    return equations


def _age_later(rng: random.Random, hero: Person, friend: Person) -> Equations:
    return (Equation(hero.age, "+", rng.randint(2, 40)),)


def _age_gap(rng: random.Random, hero: Person, friend: Person) -> Equations:
    low, high = sorted((hero.age, friend.age))
    return (Equation(high, "-", low),)


_SHAPES: dict[str, Callable[..., Equations]] = {
    "a + b": _addition,
    "a - b": _subtraction,
    "a * b": _multiplication,
    "a + b - c": _then(_addition, "-"),
    "a * b + c": _then(_multiplication, "+"),
    "a * b - c": _then(_multiplication, "-"),
    "age + b": _age_later,
    "age - age": _age_gap,
}
