"""Things, animals, materials, jobs and hobbies, the same for every seed.

They are read from `english/`: tables with a row per entity and a column per field.
"""

from dataclasses import dataclass

from jaxllm.toy_world.language import passages, table


class Entity:
    """Something that a text can be about. An entity is equal only to itself.

    `subject` is its name in a sentence, `pronoun` its name in the next one.
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
ANIMALS = tuple(
    Animal(name, kind, food, home, legs, skill, int(grams))
    for name, kind, food, home, legs, skill, grams in table("animals")
)
HOBBIES = tuple(Hobby(*row) for row in table("hobbies"))
JOBS = tuple(Job(*row) for row in table("jobs"))
PUPIL = Job("pupil", "in a school", "learns to read and write", "pencil")  # the job of every child

WORDS = {title: tuple(", ".join(lines).split(", ")) for title, *lines in passages("words")}
PETS = tuple(animal for animal in ANIMALS if animal.name in WORDS["pets"])
