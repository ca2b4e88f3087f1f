"""Instructions: sampled from a chat model, grown from seed tasks, or read from a file."""

import random
import re
from collections.abc import Sequence
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
    made_from: str | None = None  # the instruction that it was evolved from


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
            name,
            SeedOptions(config.rename),
            text,
            split="train",
            max_rows=4 * most,
            seed=seed,
            rename_field="instructions.rename",
        )
    found = found[:most]
    if len(found) < needed:
        field = "rows" if config.source == "file" else "instructions.examples"
        raise ConfigError(f"instructions.seeds has {len(found)} instructions, too few for {field}={needed}")
    return found


class Instructor:
    """Makes the instruction of each row."""

    def __init__(self, config: InstructionsConfig, writer: Writer | None, seeds: Sequence[str], seed: int):
        """`writer` is not needed where instructions come from a file."""
        self.config, self.writer, self.seeds, self.seed = config, writer, seeds, seed

    def __call__(
        self, rows: range, earlier: Sequence[str], keys: jax.Array, check: Check
    ) -> list[Instruction]:
        """Those of these rows, with a key each. Only grown ones depend on those of earlier blocks."""
        if self.config.source == "file":
            texts = [self.seeds[i % len(self.seeds)] for i in rows]  # beyond the last row, a block goes on
            return [self.checked(text) for text in texts]
        if self.config.source == "magpie":
            local = cast(LocalWriter, self.writer)
            written = local.user_turns(sampling=self.config.sampling, keys=keys, check=check)
            return [self.checked(each.text, each.ended) for each in written]
        if self.config.source == "evolve":
            return self.evolve(rows, earlier, keys, check)
        prompts = [
            self_instruct_prompt(self.seeds, earlier, self.config.examples, self.seed, i) for i in rows
        ]
        return [self.checked(first_task(each.text), each.ended) for each in self.ask(prompts, keys, check)]

    def evolve(self, rows: range, earlier: Sequence[str], keys: jax.Array, check: Check) -> list[Instruction]:
        """A version of a seed, or of an earlier instruction, for each row."""
        draws = [random.Random(f"evolve {self.seed} {i}") for i in rows]
        parents = [draw.choice([*self.seeds, *earlier]) for draw in draws]
        prompts = [
            f"{draw.choice(EVOLUTIONS)} Reply with the task alone.\n\nTask: {parent}"
            for draw, parent in zip(draws, parents, strict=True)
        ]
        written = self.ask(prompts, keys, check)
        return [
            self.checked(_LABEL.sub("", each.text), each.ended)._replace(made_from=parent)
            for each, parent in zip(written, parents, strict=True)
        ]

    def ask(self, prompts: Sequence[str], keys: jax.Array, check: Check) -> list[Written]:
        """The reply to each prompt. ConfigError where one does not fit."""
        assert self.writer is not None
        sampling = self.config.sampling
        conversations = [[{"role": "user", "content": text}] for text in prompts]
        for messages in conversations:
            if problem := self.writer.problem(messages, sampling.max_new_tokens):
                raise ConfigError(
                    f"instructions.source={self.config.source}: a prompt is {problem}: lower "
                    "instructions.examples, instructions.length or instructions.sampling.max_new_tokens"
                )
        return self.writer.complete(conversations, group_size=1, sampling=sampling, keys=keys, check=check)

    def checked(self, text: str, ended: bool = True) -> Instruction:
        """With what keeps it from being answered."""
        low, high = self.config.length
        if not ended:
            return Instruction(text, "instruction cut off")
        fits = low <= len(text) <= high
        return Instruction(text, None if fits else "length outside instructions.length")


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
