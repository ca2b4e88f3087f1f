"""Questions for chats, each with a reference answer and the facts needed to score any other answer.

Each kind of question is a function of (world, rng, split, turns) that returns exchanges about one subject:
questions after the first one may say `she`, `it` or `there`. The wordings are in `english/chats.txt`.
"""

import random
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from jaxllm.toy_world.facts import answer, fact, kind, relations, statement
from jaxllm.toy_world.language import choose, frame, passages, spin, table
from jaxllm.toy_world.lexicon import ANIMALS, JOBS, PORTABLE, THINGS, WORDS, Entity
from jaxllm.toy_world.problems import any_problem, problem_prompt, problem_solution
from jaxllm.toy_world.split import Split
from jaxllm.toy_world.stories import cast
from jaxllm.toy_world.world import World


class Exchange(NamedTuple):
    """A question and its reference answer."""

    question: str
    answer: str
    sentence: str  # the answer in one sentence; "" where it needs more
    key: str = ""  # the words that make an answer correct; "" where no single thing is correct
    rivals: tuple[str, ...] = ()  # words that would make it wrong; () for a number: any other number would


def conversation(world: World, rng: random.Random, split: Split) -> list[Exchange]:
    """One exchange with probability 3/4, else two or three about one subject."""
    turns = rng.choices((1, 2, 3), (6, 1, 1))[0]
    kinds = _SINGLE if turns == 1 else _LONG
    make = rng.choices(list(kinds), list(kinds.values()))[0]
    if turns == 1 or rng.random() < 0.8:
        return make(world, rng, split, turns)
    return [*make(world, rng, split, turns - 1), _parsed(frame("chat thanks", rng))]


# Facts. The relations below have answers in several wordings, all of them correct.
_MANY_WORDINGS = ("hobby", "pet", "definition")


def _person(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    return _facts(rng.choice(world.people), world, rng, turns)


def _town(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    return _facts(rng.choice(world.towns), world, rng, turns)


def _nature(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    return _facts(rng.choice(THINGS + ANIMALS + JOBS), world, rng, turns)


def _facts(entity: Entity, world: World, rng: random.Random, turns: int) -> list[Exchange]:
    first, *others = rng.sample(list(relations(entity)), turns)
    question, _, sentence = fact(entity, first, rng)
    exchanges = [_fact(entity, first, frame("chat fact", rng, question=question), sentence, world)]
    for relation in others:
        question = frame(f"follow {kind(entity)} {relation}", rng, x=entity)
        sentence = statement(entity, relation, rng, named=False)
        exchanges.append(
            _fact(entity, relation, frame("chat follow", rng, question=question), sentence, world)
        )
    return exchanges


def _fact(entity: Entity, relation: str, question: str, sentence: str, world: World) -> Exchange:
    if relation in _MANY_WORDINGS:
        return Exchange(question, sentence, sentence)
    key = _bare_answer(entity, relation)
    rivals = tuple(
        value for value in _values(world, kind(entity), relation) if value not in (key, entity.name)
    )
    return Exchange(question, sentence, sentence, key, _not_in(rivals, sentence))


def _bare_answer(entity: Entity, relation: str) -> str:
    """The answer without a leading `a`, `an` or `to`, which not every wording of the statement has."""
    return re.sub(r"^(an?|to) ", "", answer(entity, relation))


@cache
def _values(world: World, entity_kind: str, relation: str) -> tuple[str, ...]:
    """The bare answers of this relation for all entities of this kind."""
    entities = (*world.people, *world.towns, *THINGS, *ANIMALS, *JOBS)
    return tuple(
        dict.fromkeys(_bare_answer(entity, relation) for entity in entities if kind(entity) == entity_kind)
    )


def _not_in(rivals: tuple[str, ...], sentence: str) -> tuple[str, ...]:
    """The rivals that the reference answer does not happen to contain."""
    words = f" {re.sub('[.,]', ' ', sentence)} "
    return tuple(rival for rival in rivals if f" {rival} " not in words)


# Definitions and stories.


def _definition(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    """The definition of a concept, and then facts about it."""
    concept, *details = rng.choice(passages("computers" if rng.random() < 0.4 else "concepts"))
    term, definition = concept.split(": ")
    sentence = spin("{term} is {definition}.", rng, term=term, definition=choose(definition, rng))
    chosen = sorted(rng.sample(range(len(details)), turns))
    more = [spin(details[index], rng) for index in chosen]
    first = Exchange(frame("chat definition", rng, term=term), f"{sentence} {more[0]}", sentence)
    follow = (Exchange(frame("chat definition more", rng), detail, detail) for detail in more[1:])
    return [first, *follow]


def _tale(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    """A short story to summarize, with questions about it: `english/tales.txt`."""
    roles = cast(world, rng)
    story, summary, *lines = rng.choice(passages("tales"))
    story, summary = spin(story, rng, **roles), spin(summary, rng, **roles)
    sums_up = rng.random() < 0.6
    lines = rng.sample(lines, min(turns - sums_up, len(lines)))
    exchanges = [Exchange(frame("chat story", rng, story=story), summary, summary)] if sums_up else []
    for line in lines:
        question, key, sentence = (spin(cell, rng, **roles) for cell in line.split(" | "))
        title = "chat follow" if exchanges else "chat story question"
        question = frame(title, rng, story=story, question=question)
        key = key if key in sentence else key[0].lower() + key[1:]  # only names keep their capital
        rivals = _not_in(_same_category(key, world), sentence)
        exchanges.append(Exchange(question, sentence, sentence, key, rivals))
    return exchanges


def _same_category(word: str, world: World) -> tuple[str, ...]:
    """All words of the category of this word: names for a name, colors for a color."""
    animals, things = ([entity.name for entity in entities] for entities in (ANIMALS, PORTABLE))
    names = [person.name for person in world.people]
    categories = (names, WORDS["towns"], WORDS["colours"], WORDS["days"], WORDS["foods"], animals, things)
    return tuple(next(category for category in categories if word in category))


# Small tasks on sentences and lists.


def _rewriting(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    roles = cast(world, rng)
    hero, other = str(roles["hero"]), str(roles["adult"])
    past, present = (spin(cell, rng, **roles) for cell in rng.choice(table("sentences")))
    past, present = (words[0].lower() + words[1:] for words in (past, present))
    sentence = f"{hero} {past}."
    task = rng.choice(("present", "capitals", "names"))
    question = frame(f"chat {task}", rng, sentence=sentence, old=hero, new=other)
    if task == "present":
        return [_parsed(f"{question}\n{hero} {present}.", present, (past,))]
    if task == "capitals":
        return [_parsed(f"{question}\n{sentence.upper()}")]
    return [_parsed(f"{question}\n{other} {past}.", f"{other} {past}", (f"{hero} {past}",))]


def _list(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    task = rng.choice(("reverse", "sort"))
    if task == "reverse":
        words = rng.sample(rng.choice((WORDS["items"], WORDS["colours"], WORDS["days"])), rng.randint(3, 4))
        result = words[::-1]
    else:
        numbers = rng.sample(range(1, rng.choice((10, 100))), 3)
        if numbers == sorted(numbers):
            numbers.reverse()
        words, result = list(map(str, numbers)), list(map(str, sorted(numbers)))
    joined, key = ", ".join(words), ", ".join(result)
    shuffled = {", ".join(rng.sample(words, len(words))) for _ in range(3)} | {joined}
    question = frame(f"chat {task}", rng, words=joined)
    reply = frame(f"chat {task} answer", rng, result=key)
    return [_parsed(f"{question}\n{reply}", key, tuple(sorted(shuffled - {key})))]


def _counting(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    roles = cast(world, rng)
    past, _ = rng.choice(table("sentences"))
    sentence = spin(f"{{hero}} {past}.", rng, **roles)
    key = str(len(sentence.split()))
    question = frame("chat count", rng, sentence=sentence)
    return [_parsed(f"{question}\n{frame('chat count answer', rng, result=key)}", key)]


def _pattern(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    if rng.random() < 0.5:
        start, step = rng.randint(1, 20), rng.choice((1, 2, 3, 5, 10))
        words, title = [str(start + step * index) for index in range(5)], "chat next number"
        rivals: tuple[str, ...] = ()
    else:
        length = rng.choice((2, 2, 3))
        cycle = rng.sample(rng.choice((WORDS["items"], WORDS["colours"])), length)
        words, title = (cycle * 3)[: 2 * length + rng.randint(0, length - 1) + 1], "chat next word"
        rivals = tuple(cycle)
    *shown, key = words
    rivals = tuple(rival for rival in rivals if rival != key)
    question = frame(title, rng, words=", ".join(shown))
    return [_parsed(f"{question}\n{frame('chat next answer', rng, result=key)}", key, rivals)]


# Problems and small talk.


def _problem(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    problem = any_problem(world, rng, split)
    return [Exchange(problem_prompt(problem, rng), problem_solution(problem, rng), "", problem.answer)]


def _small_talk(world: World, rng: random.Random, split: Split, turns: int) -> list[Exchange]:
    roles = cast(world, rng)
    slots = roles | {"a": roles["hero"], "b": roles["friend"], "season": rng.choice(WORDS["seasons"])}
    return [_parsed(frame("chat small talk", rng, **slots))]


def _parsed(text: str, key: str = "", rivals: tuple[str, ...] = ()) -> Exchange:
    """The exchange of a text whose last line is the answer, and whose other lines are the question."""
    question, reply = text.rsplit("\n", maxsplit=1)
    is_sentence = not re.search(r"[.!?] ", reply)
    return Exchange(question, reply, reply if is_sentence else "", key, rivals)


Kind = Callable[[World, random.Random, Split, int], list[Exchange]]

# Percentage of single exchanges, and number in ten of longer conversations, of each kind.
_SINGLE: dict[Kind, int] = {
    _problem: 27,
    _person: 16,
    _town: 4,
    _nature: 12,
    _definition: 11,
    _tale: 12,
    _rewriting: 6,
    _list: 4,
    _counting: 1,
    _pattern: 3,
    _small_talk: 4,
}
_LONG: dict[Kind, int] = {_person: 5, _town: 2, _tale: 2, _definition: 1}
