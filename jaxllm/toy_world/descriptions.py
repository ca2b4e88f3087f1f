"""Factual texts: people, towns and things described, compared, explained and asked about."""

import random

from jaxllm.toy_world.facts import answer, fact, kind, relations, statement
from jaxllm.toy_world.language import choose, frame, passages, spin
from jaxllm.toy_world.lexicon import ANIMALS, JOBS, PORTABLE, THINGS, WORDS, Entity
from jaxllm.toy_world.world import World

_MEASURES = {"person": "age", "animal": "grams", "thing": "grams", "town": "thousands"}


def person(world: World, rng: random.Random) -> str:
    """A person, and then the best friend or somebody from the same town."""
    subject = rng.choice(world.people)
    others = [other for other in world.people if other is not subject]
    other = rng.choice(
        [other for other in others if other.town is subject.town or other.name == subject.friend]
    )
    link = frame("townspeople" if other.town is subject.town else "friends", rng, a=subject, b=other)
    return " ".join([_describe(subject, 5, rng), link, _describe(other, 3, rng, without=("home", "friend"))])


def town(world: World, rng: random.Random) -> str:
    """A town and some of the people who live there."""
    subject = rng.choice(world.towns)
    a, b = rng.sample([resident for resident in world.people if resident.town is subject], 2)
    link = frame("residents", rng, a=a, b=b, town=subject)
    people = (_describe(resident, 3, rng, without=("home",)) for resident in (a, b))
    return " ".join([_describe(subject, 5, rng), link, *people])


def nature(world: World, rng: random.Random) -> str:
    """Two things, animals or jobs described, each with a person who has to do with it."""
    paragraphs = []
    for subject in rng.sample(THINGS + ANIMALS + JOBS, 2):
        slots = _circumstances(world, rng) | {"x": subject}
        if subject in JOBS:
            slots["worker"] = rng.choice([adult for adult in world.adults if adult.job is subject])
        paragraphs.append(f"{_describe(subject, 5, rng)} {frame(kind(subject), rng, **slots)}")
    return "\n".join(paragraphs)


def comparison(world: World, rng: random.Random) -> str:
    """Two entities of one kind: what they share, how they differ, and which is older, heavier or bigger."""
    a, b = rng.sample(rng.choice((world.people, world.towns, THINGS, ANIMALS)), 2)
    sentences = [frame("compare opening", rng, a=a.subject, b=b.subject, somebody=rng.choice(world.people))]
    for name in rng.sample([name for name in relations(a) if name != "definition"], 4):
        first, second = (statement(entity, name, rng, named=True).rstrip(".") for entity in (a, b))
        if b.subject.startswith("a "):
            second = second[0].lower() + second[1:]
        alike = answer(a, name) == answer(b, name)
        sentences.append(f"{first}, and {second} too." if alike else f"{first}, but {second}.")
    low, high = sorted((a, b), key=lambda entity: getattr(entity, _MEASURES[kind(entity)]))
    if getattr(low, _MEASURES[kind(low)]) < getattr(high, _MEASURES[kind(high)]):
        sentences.append(frame(f"compare {kind(low)}", rng, low=low, high=high))
    return " ".join(sentences)


def questions(world: World, rng: random.Random) -> str:
    """Short questions about the world with their answers, as a list or as a dialogue."""
    a, b, c, *people = rng.sample(world.people, 7)
    subjects: list[Entity] = [*people, *rng.sample(world.towns, 2), *rng.sample(THINGS + ANIMALS + JOBS, 2)]
    talk = rng.random() < 0.5
    facts = [
        fact(subject, rng.choice(list(relations(subject))), rng)
        for subject in rng.sample(subjects, rng.randint(3, 5) if talk else rng.randint(5, 8))
    ]
    if talk:
        lines = [
            frame("ask", rng, a=a, b=b, question=each.question, statement=each.statement.rstrip("."))
            for each in facts
        ]
        return "\n".join([*lines, frame("ask end", rng, a=a, b=b, c=c)])
    return "\n".join(f"{each.question} {rng.choice((each.statement, f'{each.answer}.'))}" for each in facts)


def explanation(world: World, rng: random.Random) -> str:
    """The definition of a concept and facts about it: a bridge, a mistake, a language model."""
    concepts = passages("computers" if rng.random() < 0.3 else "concepts")
    if rng.random() < 0.5:
        two = [_explain("explain", concept, world, rng) for concept in rng.sample(concepts, 2)]
        return "\n".join([*two, frame("explain end", rng, **_circumstances(world, rng))])
    return _explain("explain talk", rng.choice(concepts), world, rng)


def instructions(world: World, rng: random.Random) -> str:
    """How to do something, step by step: as prose, as a list or as a dialogue."""
    slots = _circumstances(world, rng)
    slots["thing"] = rng.choice(PORTABLE)
    task, *steps = (choose(line, rng) for line in rng.choice(passages("procedures")))
    if rng.random() < 0.3:
        numbered = "\n".join(f"{number}. {step}." for number, step in enumerate(steps, start=1))
        listed = spin(f"How to {task}:\n{numbered}", rng, **slots)
        return listed + "\n" + frame("instructions end", rng, **slots)
    joined = " ".join(f"{word} {step}." for word, step in zip(_order(len(steps), rng), steps, strict=True))
    told = {"task": task.format_map(slots), "steps": spin(joined, rng, **slots)}
    if rng.random() < 0.5:
        return frame("instructions talk", rng, **slots, **told)
    return frame("instructions", rng, **slots, **told) + " " + frame("instructions end", rng, **slots)


def _order(count: int, rng: random.Random) -> list[str]:
    """`first, ... then ... finally, ...`: one word per step."""
    middle = rng.sample(("then", "next,", "after that,", "now"), 4) * count
    return ["first,", *middle[: count - 2], "finally,"]


def _explain(title: str, concept: tuple[str, ...], world: World, rng: random.Random) -> str:
    term, definition = concept[0].split(": ")
    chosen = sorted(rng.sample(range(1, len(concept)), min(len(concept) - 1, rng.randint(3, 5))))
    facts = " ".join(choose(concept[index], rng) for index in chosen)
    slots = {"term": term, "definition": choose(definition, rng), "facts": facts}
    return frame(title, rng, **_circumstances(world, rng), **slots)


def _describe(
    entity: Entity, count: int, rng: random.Random, *, without: tuple[str, ...] = ("definition",)
) -> str:
    """Up to `count` facts in random order. The first one names the entity, the others mostly do not."""
    names = [name for name in relations(entity) if name not in without]
    names = rng.sample(names, min(count, len(names)))
    return " ".join(
        statement(entity, name, rng, named=index == 0 or rng.random() < 0.2)
        for index, name in enumerate(names)
    )


def _circumstances(world: World, rng: random.Random) -> dict[str, object]:
    """Three people, and a place and time, for the slots of frames."""
    a, b, c = rng.sample(world.people, 3)
    words = {"colour": "colours", "place": "places", "weekday": "days", "season": "seasons"}
    slots = {slot: rng.choice(WORDS[title]) for slot, title in words.items()}
    return {"a": a, "b": b, "c": c, "town": rng.choice(world.towns), **slots}
