"""Preference pairs: completions made from reference answers by adding flaws, labeled by `rubric`."""

import random
import re
from collections.abc import Callable, Iterator

from jaxllm.toy_world.chats import Message, as_messages, prompt_split
from jaxllm.toy_world.exchanges import Exchange, conversation
from jaxllm.toy_world.language import frame, tidy
from jaxllm.toy_world.rubric import is_kind, rubric
from jaxllm.toy_world.split import Split, check_split
from jaxllm.toy_world.world import World, build_world

_SMALLEST_GAP = 0.1  # between the scores of a pair; closer ones count as equally good


def preferences(split: Split, *, count: int, seed: int, label_noise: float = 0.1) -> Iterator[dict]:
    """The first `count` rows `{"prompt": messages, "chosen": str, "rejected": str, "reference": dict}`.

    The completion with the higher `rubric` score is chosen, but a fraction `label_noise` of the labels is
    flipped, so no model can exceed an accuracy of 1 - label_noise. Length tells little: the longer completion
    is chosen in 50% of the pairs, the shorter one in 45%. No prompt of the validation split is in the
    training split of `chats`, but a question of it may be there after a system message: a run leaves these
    chats out with `data.held_out`.

    `reference` is for `rubric` alone: it has the reference answer.
    """
    if not 0 <= label_noise <= 0.5:
        raise ValueError(f"label_noise={label_noise} must be between 0 and 0.5, at which labels are random")
    return (preference(split, index, seed=seed, label_noise=label_noise) for index in range(count))


def preference(split: Split, index: int, *, seed: int, label_noise: float = 0.1) -> dict:
    """One row, independent of all others."""
    rng = random.Random(f"preference {seed} {split} {index}")
    prompt, reference, completion = _task(split, rng, seed)
    while True:
        completions = [completion() for _ in range(2)]
        scores = [rubric({"reference": reference}, each) for each in completions]
        if abs(scores[0] - scores[1]) >= _SMALLEST_GAP:
            break
    chosen_is_first = (scores[0] > scores[1]) != (rng.random() < label_noise)
    chosen, rejected = completions if chosen_is_first else completions[::-1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "reference": reference}


def drafts(split: Split, *, count: int, seed: int) -> Iterator[dict]:
    """The first `count` rows `{"prompt": messages, "completion": str, "reference": dict}` of a split.

    The completions have the distribution of those in the pairs of `preferences`, with and without flaws. A
    model fine-tuned on them generates such completions too, which preference training can improve.
    """
    return (draft(split, index, seed=seed) for index in range(count))


def draft(split: Split, index: int, *, seed: int) -> dict:
    """One row, independent of all others."""
    prompt, reference, completion = _task(split, random.Random(f"draft {seed} {split} {index}"), seed)
    return {"prompt": prompt, "completion": completion(), "reference": reference}


def _task(split: Split, rng: random.Random, seed: int) -> tuple[list[Message], dict, Callable[[], str]]:
    """A prompt of this split, the `reference` for `rubric`, and a function that draws completions."""
    check_split(split)
    world = build_world(seed)
    exchanges = conversation(world, rng, split)
    while prompt_split(exchanges) != split:
        exchanges = conversation(world, rng, split)
    last = exchanges[-1]
    reference = {"answer": last.answer, "key": last.key, "rivals": list(last.rivals)}
    prompt = as_messages(exchanges, [exchange.answer for exchange in exchanges])[:-1]
    return prompt, reference, lambda: _completion(last, world, rng, split)


def _completion(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    """The reference answer, often with one flaw, sometimes with kind words before or after it."""
    flaw = rng.choices(list(FLAWS), list(FLAWS.values()))[0]
    answer = flaw(exchange, world, rng, split)
    if flaw in (_rude, _cut_off) or is_kind(answer):
        return answer
    if rng.random() < 0.35:
        return f"{frame('kind opening', rng)} {answer}"
    return f"{answer} {frame('kind closing', rng)}" if rng.random() < 0.2 else answer


def no_flaw(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    return exchange.answer


def _wrong(exchange: Exchange, world: World, rng: random.Random, split: Split) -> str:
    """Another town, another number; the unchanged answer where it has no key."""
    if not exchange.key:
        return exchange.answer
    rival = rng.choice(exchange.rivals) if exchange.rivals else _near(int(exchange.key), rng)
    # `an` becomes `a`, which `tidy` turns back into `an` where the rival needs it.
    pattern = rf"(?:\b([Aa])n )?\b{re.escape(exchange.key)}\b"
    return tidy(re.sub(pattern, lambda found: f"{found[1]} {rival}" if found[1] else rival, exchange.answer))


def _near(number: int, rng: random.Random) -> str:
    """A positive number that a small mistake could lead to."""
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

# Percentage of completions with each flaw. Flaws that lengthen an answer balance those that shorten it.
FLAWS: dict[Flaw, int] = {
    no_flaw: 25,
    _wrong: 20,
    _rude: 20,
    _rambling: 12,
    _evasive: 7,
    _off_topic: 10,
    _cut_off: 6,
}
