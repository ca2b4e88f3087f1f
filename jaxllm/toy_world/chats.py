"""Conversations for instruction fine-tuning: questions about the world, small tasks, worked-out sums."""

import random
from collections.abc import Callable, Iterator, Sequence

from jaxllm.toy_world.exchanges import Exchange, conversation
from jaxllm.toy_world.language import spin
from jaxllm.toy_world.split import Split, check_split, split_of
from jaxllm.toy_world.world import build_world

Message = dict[str, str]


def chats(split: Split, *, count: int, seed: int) -> Iterator[dict]:
    """The first `count` rows `{"messages": [{"role", "content"}, ...]}` of a split of the world of this seed.

    One in four has several turns. One in six has a system message, which changes the answers in a way that
    can be checked. Training and validation share no combination of system message and first question, and no
    equation.
    """
    return (chat(split, index, seed=seed) for index in range(count))


def chat(split: Split, index: int, *, seed: int) -> dict:
    """One row, independent of all others."""
    check_split(split)
    world = build_world(seed)
    rng = random.Random(f"chat {seed} {split} {index}")
    instruction = rng.choice(list(_INSTRUCTIONS)) if rng.random() < 1 / 6 else ""
    while True:
        exchanges = conversation(world, rng, split)
        answers = [exchange.answer for exchange in exchanges]
        system, child = "", rng.choice(world.children).name
        if instruction:
            system = spin(instruction, rng, child=child)
            answers = [_INSTRUCTIONS[instruction](exchange, child) for exchange in exchanges]
        # An answer is empty where the instruction cannot be followed.
        if all(answers) and prompt_split(exchanges, system) == split:
            messages = as_messages(exchanges, answers)
            return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def prompt_split(exchanges: list[Exchange], system: str = "") -> Split:
    """The split of a conversation, by its system message and first question."""
    return split_of(f"{system}\n{exchanges[0].question}")


def as_messages(exchanges: list[Exchange], answers: Sequence[str]) -> list[Message]:
    """The questions and answers as alternating user and assistant messages."""
    return [
        {"role": role, "content": content}
        for exchange, answer in zip(exchanges, answers, strict=True)
        for role, content in (("user", exchange.question), ("assistant", answer))
    ]


def _in_one_word(exchange: Exchange, child: str) -> str:
    is_word = exchange.sentence and exchange.key and " " not in exchange.key
    return exchange.key[0].upper() + exchange.key[1:] + "." if is_word else ""


def _to_the_child(exchange: Exchange, child: str) -> str:
    return "" if child in exchange.question else f"{child}, here is my answer. {exchange.answer}"


# System messages, each with the function that makes an answer follow it.
_INSTRUCTIONS: dict[str, Callable[[Exchange, str], str]] = {
    "[answer|reply|always answer] in one word.": _in_one_word,
    "[answer|reply|always answer] in one sentence.": lambda exchange, child: exchange.sentence,
    "[answer|reply|write your answers] in capital letters.": lambda exchange, child: exchange.answer.upper(),
    "you talk to {child}, [a child|who is a child]. [Always begin|Begin] with this name.": _to_the_child,
    "[end|always end] with the words: Have a nice day!": lambda exchange, child: (
        f"{exchange.answer} Have a nice day!"
    ),
}
