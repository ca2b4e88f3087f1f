"""Pairs of answers to learn preferences from: good ones, spoilt and adorned, and judged by `rubric`."""

import random
import re
from collections.abc import Callable, Iterator

from jaxllm.toy_world.chats import prompt_split, spoken
from jaxllm.toy_world.exchanges import Exchange, conversation
from jaxllm.toy_world.language import frame, tidy
from jaxllm.toy_world.rubric import is_kind, rubric
from jaxllm.toy_world.split import Split, check_split
from jaxllm.toy_world.world import World, build_world

_SMALLEST_GAP = 0.1  # in the rubric's points: answers closer than this are alike


def preferences(split: Split, *, count: int, seed: int, label_noise: float = 0.1) -> Iterator[dict]:
    """The first `count` rows `{"prompt": messages, "chosen": str, "rejected": str, "reference": dict}`.

    The answer that `rubric` finds better is chosen, but `label_noise` of the labels are flipped, so that no
    model can be right more often than 1 - label_noise. Length gives little away: the longer one is chosen in
    0.50 of the pairs, the shorter one in 0.45. A prompt that `chats` trains on is never held out here.

    `reference` is for `rubric` alone: a model that is trained on it has seen the answer.
    """
    if not 0 <= label_noise <= 0.5:
        raise ValueError(
            f"label_noise {label_noise} must be between 0 and 0.5, where labels are a coin's toss"
        )
    return (preference(split, index, seed=seed, label_noise=label_noise) for index in range(count))


def preference(split: Split, index: int, *, seed: int, label_noise: float = 0.1) -> dict:
    """One row, whichever others are ever written."""
    rng = random.Random(f"preference {seed} {split} {index}")
    prompt, reference, candidate = _asked(split, rng, seed)
    scores = [0.0, 0.0]
    while abs(scores[0] - scores[1]) < _SMALLEST_GAP:
        answers = [candidate() for _ in range(2)]
        scores = [rubric({"reference": reference}, answer) for answer in answers]
    chosen_is_first = (scores[0] > scores[1]) != (rng.random() < label_noise)
    chosen, rejected = answers if chosen_is_first else answers[::-1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "reference": reference}


def drafts(split: Split, *, count: int, seed: int) -> Iterator[dict]:
    """The first `count` rows `{"prompt": messages, "completion": str, "reference": dict}` of a split.

    Answers as nobody has chosen them yet: of the kind that the pairs of `preferences` consist of, good ones
    and flawed ones. A model that learns from them speaks as the pairs do, and has something to unlearn.
    """
    return (draft(split, index, seed=seed) for index in range(count))


def draft(split: Split, index: int, *, seed: int) -> dict:
    """One row, whichever others are ever written."""
    prompt, reference, candidate = _asked(split, random.Random(f"draft {seed} {split} {index}"), seed)
    return {"prompt": prompt, "completion": candidate(), "reference": reference}


def _asked(split: Split, rng: random.Random, seed: int) -> tuple[list[dict], dict, Callable[[], str]]:
    """A prompt of this split, what it takes to judge an answer to it, and a writer of answers."""
    check_split(split)
    world = build_world(seed)
    exchanges = conversation(world, rng, split)
    while prompt_split(exchanges) != split:
        exchanges = conversation(world, rng, split)
    last = exchanges[-1]
    reference = {"answer": last.answer, "key": last.key, "rivals": list(last.rivals)}
    prompt = spoken(exchanges, [exchange.answer for exchange in exchanges])[:-1]
    return prompt, reference, lambda: _candidate(last, world, rng, split)


def _candidate(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    """The good answer, often with one flaw, sometimes with kind words around it."""
    spoil = rng.choices(list(FLAWS), list(FLAWS.values()))[0]
    answer = spoil(exchange, world, rng, split)
    if spoil in (_rude, _cut_off) or is_kind(answer):
        return answer
    if rng.random() < 0.35:
        return f"{frame('kind opening', rng)} {answer}"
    return f"{answer} {frame('kind closing', rng)}" if rng.random() < 0.2 else answer


def as_it_is(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    return exchange.answer


def _wrong(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    """Another town, another number; the answer itself where there is nothing to get wrong."""
    if not exchange.key:
        return exchange.answer
    rival = rng.choice(exchange.rivals) if exchange.rivals else _near(int(exchange.key), rng)
    # An `an` becomes an `a`, which `tidy` mends if the rival wants it back.
    pattern = rf"(?:\b([Aa])n )?\b{re.escape(exchange.key)}\b"
    return tidy(re.sub(pattern, lambda found: f"{found[1]} {rival}" if found[1] else rival, exchange.answer))


def _near(number: int, rng: random.Random) -> str:
    slips = [number + slip for slip in (-10, -2, -1, 1, 2, 10)]
    return str(rng.choice([slip for slip in slips if slip > 0]))


def _rude(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    if rng.random() < 0.5:
        return f"{frame('rude opening', rng)} {exchange.answer}"
    return f"{exchange.answer} {frame('rude closing', rng)}"


def _rambling(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    sentences = dict.fromkeys(frame("rambling", rng) for _ in range(4))
    return " ".join([exchange.answer, *sentences])


def _evasive(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    return frame("evasion", rng)


def _off_topic(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    return conversation(world, rng, split)[0].answer


def _cut_off(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    words = exchange.answer.split()
    return " ".join(words[: max(1, rng.randint(len(words) // 3, len(words) - 1))])


Flaw = Callable[[Exchange, World, random.Random, Split], str]

# How often of a hundred. Flaws that lengthen an answer weigh up those that shorten it.
FLAWS: dict[Flaw, int] = {
    as_it_is: 25,
    _wrong: 20,
    _rude: 20,
    _rambling: 12,
    _evasive: 7,
    _off_topic: 10,
    _cut_off: 6,
}
