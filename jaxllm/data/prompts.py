"""Prompts to generate completions of. Each comes with its row, which the reward functions receive."""

import functools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from jaxllm.data.chat import contents, list_of, opening, user_turns
from jaxllm.data.chat_template import ChatTemplate, Tools, row_tools
from jaxllm.data.examples import Example, hold_out
from jaxllm.data.messages import (
    Message,
    Messages,
    as_messages,
    joined,
    message,
    system_message,
)
from jaxllm.data.preferences import is_pair, pair
from jaxllm.data.records import Record
from jaxllm.data.row_cache import Encoder, read_sources
from jaxllm.data.rows import TOO_LONG, Dataset, RecordConfig, training_texts
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer


class PromptOptions(Protocol):
    """How rows become prompts: the fields of a PromptConfig, or the flags of a script."""

    @property
    def rename(self) -> Sequence[str]: ...

    @property
    def prompt_format(self) -> str | None: ...

    @property
    def system(self) -> str | None: ...


@dataclass(frozen=True)
class PromptConfig(RecordConfig):
    """Which prompts to read."""

    prompt_format: str | None  # a text with {COLUMN}s to fill in; None: rows have `prompt` or `messages`
    system: str | None  # a system message to put before every prompt


class Prompt(NamedTuple):
    """A prompt and the row that it was made from."""

    ids: list[int]
    row: Mapping[str, Any]  # the record, with the columns that its rewards read


@dataclass(frozen=True)
class Prompts:
    """A sequence of `Prompt`s."""

    rows: Sequence[Example]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Prompt:
        row = self.rows[i]
        return Prompt(row.ids[0].tolist(), row.row or {})


def question_messages(record: Mapping[str, Any], config: PromptOptions) -> tuple[str, list[Message]]:
    """The format of a record, and the messages of its prompt, which end with the question. Raises BadRow."""
    system = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt_format is not None:
        try:
            text = config.prompt_format.format_map(record)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise BadRow("missing key", f"data.prompt_format with {', '.join(record)}: {error!r}") from None
        return "data.prompt_format", [*system, {"role": "user", "content": text}]
    if "prompt" in record:
        return "prompt", joined(system, system_message(record), as_messages(record["prompt"], "user"))
    if "messages" in record:
        messages = [message(each) for each in list_of(record, "messages")]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()  # an SFT row: the model generates the last assistant turn
        return "messages", joined(system, system_message(record), messages)
    if is_pair(record):
        kind, prompt, *_ = pair(record)
        return kind, joined(system, prompt)
    raise BadRow(
        "missing key", f"no 'prompt' or 'messages' among {', '.join(record)}; set data.rename=THEIRS=OURS"
    )


def question_tools(record: Mapping[str, Any], config: PromptOptions, template: ChatTemplate) -> Tools | None:
    """The tools that a prompt offers; none where `prompt_format` says all that is read."""
    return None if config.prompt_format is not None else row_tools(record, template)


def question(record: Mapping[str, Any], messages: Messages, config: PromptOptions) -> str:
    """What a prompt asks, by which it is held out: the columns that `prompt_format` fills in, since the text
    around them makes no other question of it; else the first user message."""
    fields = string.Formatter().parse(config.prompt_format or "")
    names = dict.fromkeys(name for _, name, _, _ in fields if name)
    return "\n".join(f"{{{name}}}".format_map(record) for name in names) or opening(messages)


def encoder(config: PromptConfig, template: ChatTemplate, max_new_tokens: int) -> Callable[[Record], Example]:
    """A function from records to Examples of one sequence, which leaves room for `max_new_tokens`."""
    longest = config.sequence_length - max_new_tokens
    return functools.partial(encode_prompt, config=config, template=template, longest=longest)


def encode_prompt(record: Record, *, config: PromptConfig, template: ChatTemplate, longest: int) -> Example:
    """The prompt of a record, of at most so many tokens. Raises BadRow."""
    kind, messages = question_messages(record, config)
    ids = np.array(template.prompt(messages, tools=question_tools(record, config, template)), np.int32)
    if len(ids) > longest:
        too_long = f"{TOO_LONG} - rollout.sampling.max_new_tokens = {longest}"
        raise BadRow(too_long, f"{len(ids)} tokens", fault=False)
    group, turns = question(record, messages, config), user_turns(messages)
    return Example((ids,), (np.zeros(len(ids), bool),), group, kind, row=record.row, turns=turns)


def load_prompts(
    config: PromptConfig,
    tokenizer: BaseTokenizer,
    template: ChatTemplate,
    *,
    seed: int,
    max_new_tokens: int,
    run_folder: Path | None = None,
) -> Dataset[Prompts]:
    """Read and encode all sources, and hold out prompts to evaluate on.

    Dropped rows are written to `bad_rows.jsonl` in `run_folder`. Raises DataError where no prompt is left.
    """
    encode = Encoder(encoder(config, template, max_new_tokens), tokenizer, template, max_new_tokens)
    parts = read_sources(config, encode, seed=seed, run_folder=run_folder)
    train, validation = hold_out(config, parts)
    fingerprint = repr(([part.fingerprint for part in parts], config.weights, config.held_out_fraction))
    first = parts[0].rows[0]
    lines = [part.describe() for part in parts]
    lines.append(
        f"train: {sum(map(len, train)):,} prompts; validation: {sum(map(len, validation)):,} prompts"
    )
    lines.append(f"example: {show_mask(first.ids[0], [True] * len(first.ids[0]), tokenizer)}")
    return Dataset(
        tuple(map(Prompts, train)),
        config.weights,
        tuple(map(Prompts, validation)),
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        "\n".join(lines),
    )


def prompt_texts(config: PromptConfig, *, seed: int) -> Iterator[str]:
    """The texts of the training prompts, to train a tokenizer on."""
    return training_texts(config, lambda record: contents(question_messages(record, config)[1]), seed=seed)
