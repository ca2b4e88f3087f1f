"""Facts about an entity as questions, answers and statements, in several wordings: `english/facts.txt`."""

import random
from typing import NamedTuple

from jaxllm.toy_world.language import passages, spin
from jaxllm.toy_world.lexicon import Entity


class Fact(NamedTuple):
    """A true fact in words: `Where does Rosa live?`, `Oakford`, `Rosa lives in Oakford.`

    In a template, `x` is the entity, and `{who}` its name or pronoun in the statement.
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
    """`person`, `town`, `thing`, ...: the first word of the titles of templates about this entity."""
    return type(entity).__name__.lower()


def relations(entity: Entity) -> dict[str, Fact]:
    """The templates of all facts about an entity of this kind, by name of the relation."""
    return _TEMPLATES[kind(entity)]


def fact(entity: Entity, relation: str, rng: random.Random) -> Fact:
    """A fact in one of its wordings."""
    return Fact(
        *(spin(template, rng, x=entity, who=entity.subject) for template in relations(entity)[relation])
    )


def answer(entity: Entity, relation: str) -> str:
    """Only the answer of a fact, which has one wording."""
    return relations(entity)[relation].answer.format(x=entity)


def statement(entity: Entity, relation: str, rng: random.Random, *, named: bool) -> str:
    """Only the statement of a fact; `named=False` calls the entity `she`, `he` or `it`."""
    who = entity.subject if named else entity.pronoun
    return spin(relations(entity)[relation].statement, rng, x=entity, who=who)
