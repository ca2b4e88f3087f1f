"""The nouns of the small world: what is true of things, animals and work in every world.

The words themselves are in `english/`: tables with a row for each entity and a column for each field.
"""

from dataclasses import dataclass

from jaxllm.toy_world.language import passages, table


class Entity:
    """What a text can be about, equal only to itself.

    `subject` is how a sentence names it, `pronoun` how the next one does.
    """

    name: str
    pronoun = "it"

    @property
    def subject(self) -> str:
        return f"a {self.name}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Material(Entity):
    name: str
    origin: str
    floats: bool
    breaks: bool

    @property
    def subject(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Thing(Entity):
    name: str
    kind: str
    material: Material
    use: str
    room: str
    grams: int


@dataclass(frozen=True, eq=False)
class Animal(Entity):
    name: str
    kind: str
    food: str
    home: str
    legs: str
    skill: str
    grams: int


@dataclass(frozen=True, eq=False)
class Job(Entity):
    name: str
    workplace: str
    duty: str
    tool: str

    @property
    def pronoun(self) -> str:
        return self.subject  # neither "it" nor "she"


@dataclass(frozen=True, eq=False)
class Hobby:
    verb: str
    gerund: str


_MATERIALS = {
    name: Material(name, origin, floats == "floats", breaks == "breaks")
    for name, origin, floats, breaks in table("materials")
}
MATERIALS = tuple(_MATERIALS.values())
THINGS = tuple(
    Thing(name, kind, _MATERIALS[material], use, room, int(grams))
    for name, kind, material, use, room, grams in table("things")
)
PORTABLE = tuple(thing for thing in THINGS if thing.grams <= 3000)
ANIMALS = tuple(Animal(*row, int(grams)) for *row, grams in table("animals"))
HOBBIES = tuple(Hobby(*row) for row in table("hobbies"))
JOBS = tuple(Job(*row) for row in table("jobs"))
PUPIL = Job("pupil", "in a school", "learns to read and write", "pencil")  # what every child is

WORDS = {title: tuple(", ".join(lines).split(", ")) for title, *lines in passages("words")}
PETS = tuple(animal for animal in ANIMALS if animal.name in WORDS["pets"])
