"""Short stories with cause and effect: plots from `english/stories.txt`, with people of the world."""

import random

from jaxllm.toy_world.language import passages, spin
from jaxllm.toy_world.lexicon import ANIMALS, PETS, PORTABLE, THINGS, WORDS
from jaxllm.toy_world.world import World

_INTRO = (
    "[{hero} was a {hero.job} in {hero.town}.|In {hero.town} lived a {hero.job} called {hero}."
    "|There was once a {hero.job} named {hero}, who lived in {hero.town}."
    "|{hero} lived in {hero.town} and liked {hero.hobby.gerund}."
    "|{hero} was a {hero.job} with a {hero.pet} called {hero.pet_name}.]"
)
_OPENING = (
    "[one [sunny|cold|windy|grey|warm|bright|quiet|cool] [morning|afternoon|day][| in {season}]"
    "|on a [sunny|cold|windy|grey|warm|bright|quiet|cool] {weekday}[| in {season}]|last {weekday}]"
)
_BREAKERS = tuple(thing for thing in PORTABLE if thing.material.breaks)
_STURDY = tuple(thing for thing in PORTABLE if thing.material.name in ("wood", "iron", "rubber"))
_FLOATERS = tuple(thing for thing in PORTABLE if thing.material.name in ("wood", "straw", "rubber"))
_SINKERS = tuple(thing for thing in PORTABLE if not thing.material.floats)
_TOYS = tuple(thing for thing in THINGS if thing.kind == "toy")
_WILD = tuple(
    animal for animal in ANIMALS if 10 < animal.grams < 10_000 and animal.legs != "no" and animal not in PETS
)


def story(world: World, rng: random.Random) -> str:
    """A random story."""
    roles = cast(world, rng)
    return spin("\n".join(rng.choice(passages("stories"))), rng, **roles)


def cast(world: World, rng: random.Random) -> dict[str, object]:
    """People, things, times and places for the slots of any plot. No plot uses all of them."""
    hero, friend = rng.sample(world.people, 2)
    child, other_child = rng.sample([person for person in world.children if person not in (hero, friend)], 2)
    adult, other_adult = rng.sample([person for person in world.adults if person not in (hero, friend)], 2)
    light, heavy = sorted(rng.sample(PORTABLE, 2), key=lambda thing: thing.grams)
    weekday = rng.choice(WORDS["days"])
    return {
        "hero": hero,
        "friend": friend,
        "child": child,
        "other_child": other_child,
        "adult": adult,
        "other_adult": other_adult,
        "intro": spin(_INTRO, rng, hero=hero),
        "opening": spin(_OPENING, rng, weekday=weekday, season=rng.choice(WORDS["seasons"])),
        "weekday": weekday,
        "place": rng.choice(WORDS["places"]),
        "town": rng.choice([town for town in world.towns if town not in (hero.town, friend.town)]),
        "colour": rng.choice(WORDS["colours"]),
        "food": rng.choice(WORDS["foods"]),
        "thing": rng.choice(PORTABLE),
        "breaker": rng.choice(_BREAKERS),
        "sturdy": rng.choice(_STURDY),
        "floater": rng.choice(_FLOATERS),
        "sinker": rng.choice(_SINKERS),
        "toy": rng.choice(_TOYS),
        "vessel": rng.choice(("bottle", "jar", "vase", "cup")),
        "light": light,
        "heavy": heavy,
        "wild": rng.choice(_WILD),
        "pet": rng.choice(PETS),
    }
