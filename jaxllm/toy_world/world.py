"""The people and towns of the world of a seed: what is true in every text generated from it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from jaxllm.toy_world.lexicon import HOBBIES, JOBS, PETS, PUPIL, WORDS, Animal, Entity, Hobby, Job

NUM_CHILDREN = 12  # of the 48 people

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Town(Entity):
    name: str
    setting: str
    landmark: str
    product: str
    market_day: str
    thousands: int  # of people

    @property
    def subject(self) -> str:
        return self.name

    @property
    def the_landmark(self) -> str:
        return "the " + self.landmark.split(" ", maxsplit=1)[1]


@dataclass(frozen=True, eq=False)
class Person(Entity):
    name: str
    woman: bool
    friend: str  # name of the best friend, whose best friend is this person
    age: int
    job: Job
    town: Town
    hobby: Hobby
    food: str
    colour: str
    pet: Animal
    pet_name: str

    @property
    def subject(self) -> str:
        return self.name

    @property
    def pronoun(self) -> str:
        return self.he

    # For use in templates: `{hero.He} lost {hero.his} hat.`
    @property
    def he(self) -> str:
        return "she" if self.woman else "he"

    @property
    def He(self) -> str:
        return "She" if self.woman else "He"

    @property
    def him(self) -> str:
        return "her" if self.woman else "him"

    @property
    def his(self) -> str:
        return "her" if self.woman else "his"


@dataclass(frozen=True, eq=False)
class World:
    """The facts about people and towns, the same in training and in validation data."""

    towns: tuple[Town, ...]
    people: tuple[Person, ...]
    children: tuple[Person, ...]
    adults: tuple[Person, ...]


@cache
def build_world(seed: int) -> World:
    """The world of this seed. All worlds have the same names, but other facts about them."""
    rng = random.Random(f"world {seed}")
    num_towns = len(WORDS["towns"])
    columns = [_deal(WORDS[field], num_towns, rng) for field in ("settings", "landmarks", "products", "days")]
    sizes = rng.sample(range(2, 60), num_towns)
    towns = tuple(Town(*facts) for facts in zip(WORDS["towns"], *columns, sizes, strict=True))

    names = [(name, True) for name in WORDS["women"]] + [(name, False) for name in WORDS["men"]]
    rng.shuffle(names)
    num_adults = len(names) - NUM_CHILDREN
    # Adjacent people are best friends; the children come first, so that friends are of similar age.
    friends = [names[index ^ 1][0] for index in range(len(names))]
    ages = [rng.randint(6, 13) for _ in range(NUM_CHILDREN)] + [
        rng.randint(20, 69) for _ in range(num_adults)
    ]
    jobs = [PUPIL] * NUM_CHILDREN + _deal(JOBS, num_adults, rng)
    columns = [towns, HOBBIES, WORDS["foods"], WORDS["colours"], PETS, WORDS["pet names"]]
    columns = [friends, ages, jobs] + [_deal(column, len(names), rng) for column in columns]
    people = tuple(Person(name, woman, *facts) for (name, woman), *facts in zip(names, *columns, strict=True))
    return World(towns, people, people[:NUM_CHILDREN], people[NUM_CHILDREN:])


def _deal(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` items in random order, in which the counts of any two items differ by at most one."""
    rounds, rest = divmod(count, len(items))
    dealt = list(items) * rounds + rng.sample(items, rest)
    rng.shuffle(dealt)
    return dealt
