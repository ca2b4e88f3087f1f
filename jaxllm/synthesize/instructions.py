"""Instructions: sampled from a chat model, grown from seed tasks, or read from a file."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax

from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError
from jaxllm.evaluation.completions import read_messages
from jaxllm.synthesize.config import InstructionsConfig
from jaxllm.synthesize.writers import Check, LocalWriter, Writer, Written

NEW_TASK = (
    "Here are some tasks for an assistant. Write one new task, unlike these. Reply with the task alone.\n\n"
)
GENERATED_SHARE = 4  # of the examples, one in so many was generated itself (Self-Instruct: 2 of 8)
# In the manner of Evol-Instruct (Xu et al. 2023, arXiv:2304.12244): deeper, or broader.
EVOLUTIONS = (
    "Rewrite the task below so that it is harder: add one condition or requirement.",
    "Rewrite the task below so that it asks about something more specific.",
    "Rewrite the task below so that an answer needs several steps of reasoning.",
    "Rewrite the task below so that it contains an example or some data to work on.",
    "Write a new task from the same field as the task below, but rarer.",
)
_LABEL = re.compile(r"^\s*(?:[Tt]ask|[Ii]nstruction)?\s*\d*\s*[:.)]\s*")  # before a task, as in "Task 3: ..."


class Instruction(NamedTuple):
    """An instruction to answer."""

    text: str
    problem: str | None = None  # why it is not answered
    made_from: tuple[str, ...] = ()  # the instruction that it was evolved from


Make = Callable[[range, Sequence[str], jax.Array, Check], list[Instruction]]


class SeedOptions(NamedTuple):
    """How rows of seeds are read: as `PromptOptions`."""

    rename: Sequence[str]
    prompt_format: str | None = None
    system: str | None = None


def read_seeds(config: InstructionsConfig, *, needed: int, most: int, seed: int) -> list[str]:
    """At most so many instructions of `seeds`, those without system message and earlier turns; ConfigError
    where there are fewer than needed."""

    def text(record: dict, messages: list[dict]) -> str:
        if len(messages) != 1:
            raise BadRow("more than one message", "a seed is a single instruction")
        return messages[0]["content"]

    found: list[str] = []
    for name in config.seeds:
        if len(found) >= most:
            break
        # Of built-in data a source has as many rows as are asked for, and not all are single instructions.
        found += read_messages(
            name, SeedOptions(config.rename), text, split="train", max_rows=4 * most, seed=seed
        )
    found = found[:most]
    if len(found) < needed:
        field = "rows" if config.source == "file" else "instructions.examples"
        raise ConfigError(f"instructions.seeds has {len(found)} instructions, too few for {field}={needed}")
    return found


def make_instructions(config: InstructionsConfig, writer: Writer, seeds: Sequence[str], seed: int) -> Make:
    """(rows, earlier instructions, a key for each row, check) -> the instruction of each row, none of which
    depends on anything else."""

    def checked(written: Written, text: str, made_from: tuple[str, ...] = ()) -> Instruction:
        low, high = config.length
        problem = None
        if not written.ended:
            problem = "instruction cut off"
        elif not low <= len(text) <= high:
            problem = "length outside instructions.length"
        return Instruction(text, problem, made_from)

    def magpie(rows: range, earlier: Sequence[str], keys: jax.Array, check: Check) -> list[Instruction]:
        local = cast(LocalWriter, writer)
        written = local.user_turns(sampling=config.sampling, keys=keys, check=check)
        return [checked(each, each.text) for each in written]

    def ask(prompts: Sequence[str], keys: jax.Array, check: Check) -> list[Written]:
        conversations = [[{"role": "user", "content": text}] for text in prompts]
        for messages in conversations:
            if problem := writer.problem(messages, config.sampling.max_new_tokens):
                raise ConfigError(
                    f"instructions.source={config.source}: a prompt is {problem}: lower "
                    "instructions.examples, instructions.length or instructions.sampling.max_new_tokens"
                )
        return writer.complete(conversations, group_size=1, sampling=config.sampling, keys=keys, check=check)

    def self_instruct(
        rows: range, earlier: Sequence[str], keys: jax.Array, check: Check
    ) -> list[Instruction]:
        written = ask(
            [self_instruct_prompt(seeds, earlier, config.examples, seed, i) for i in rows], keys, check
        )
        return [checked(each, first_task(each.text)) for each in written]

    def evolve(rows: range, earlier: Sequence[str], keys: jax.Array, check: Check) -> list[Instruction]:
        draws = [random.Random(f"evolve {seed} {i}") for i in rows]
        parents = [draw.choice([*seeds, *earlier]) for draw in draws]
        prompts = [
            f"{draw.choice(EVOLUTIONS)} Reply with the task alone.\n\nTask: {parent}"
            for draw, parent in zip(draws, parents, strict=True)
        ]
        written = ask(prompts, keys, check)
        return [
            checked(each, _LABEL.sub("", each.text), (parent,))
            for each, parent in zip(written, parents, strict=True)
        ]

    def from_file(rows: range, earlier: Sequence[str], keys: jax.Array, check: Check) -> list[Instruction]:
        return [checked(Written(seeds[i % len(seeds)], True), seeds[i % len(seeds)]) for i in rows]

    return {"magpie": magpie, "self_instruct": self_instruct, "evolve": evolve, "file": from_file}[
        config.source
    ]


def self_instruct_prompt(
    seeds: Sequence[str], earlier: Sequence[str], examples: int, seed: int, row: int
) -> str:
    """A request for a new task with examples, some of which were generated before (Wang et al. 2022,
    arXiv:2212.10560)."""
    draw = random.Random(f"self_instruct {seed} {row}")
    generated = draw.sample(earlier, min(len(earlier), examples // GENERATED_SHARE))
    shown = [*draw.sample(seeds, examples - len(generated)), *generated]
    draw.shuffle(shown)
    return NEW_TASK + "".join(f"Task: {text}\n" for text in shown) + "Task:"


def first_task(text: str) -> str:
    """The first line of a reply, without a label such as "Task 3:"."""
    lines = [_LABEL.sub("", line).strip() for line in text.splitlines()]
    return next((line for line in lines if line), "")
