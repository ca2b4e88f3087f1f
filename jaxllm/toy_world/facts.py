"""What can be said and asked about an entity, in several wordings each: `english/facts.txt`."""

import random
from typing import NamedTuple

from jaxllm.toy_world.language import passages, spin
from jaxllm.toy_world.lexicon import Entity


class Fact(NamedTuple):
    """One true thing in words: `Where does Rosa live?`, `Oakford`, `Rosa lives in Oakford.`

    As templates these are about the entity `x`, and `{who}` is what the statement calls it.
    """

    question: str
    answer: str
    statement: str


# {"person": {"home": Fact(...), ...}, "town": ...}
_TEMPLATES: dict[str, dict[str, Fact]] = {}
for title, *lines in passages("facts"):
    entity_kind, relation = title.split(" ", maxsplit=1)
    _TEMPLATES.setdefault(entity_kind, {})[relation] = Fact(*lines)


def kind(entity: Entity) -> str:
    """`person`, `town`, `thing`, ...: what the texts about this entity are filed under."""
    return type(entity).__name__.lower()


def relations(entity: Entity) -> dict[str, Fact]:
    """The templates for everything that can be said about an entity of this kind, by name."""
    return _TEMPLATES[kind(entity)]


def fact(entity: Entity, relation: str, rng: random.Random) -> Fact:
    """A true question, answer and statement in one of their wordings."""
    return Fact(
        *(spin(template, rng, x=entity, who=entity.subject) for template in relations(entity)[relation])
    )


def answer(entity: Entity, relation: str) -> str:
    """Only the answer, which has one wording."""
    return relations(entity)[relation].answer.format(x=entity)


def statement(entity: Entity, relation: str, rng: random.Random, *, named: bool) -> str:
    """Only the sentence; about `she` or `it` where the entity has been named before."""
    who = entity.subject if named else entity.pronoun
    return spin(relations(entity)[relation].statement, rng, x=entity, who=who)
