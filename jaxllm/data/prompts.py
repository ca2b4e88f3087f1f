"""Prompts to answer, each with the row it came from, which is what its rewards are given."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jaxllm.data.chat import as_messages, check_rename, message, opening, renamed, texts
from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.preferences import is_pair, pair
from jaxllm.data.rows import TOO_LONG, DataConfig, Dataset, Example, read_sources
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class PromptConfig(DataConfig):
    """Which prompts to read."""

    rename: tuple[str, ...]  # "theirs=ours" for columns that are called otherwise
    template: str | None  # a Jinja chat template; None: the tokenizer's own
    prompt_format: str | None  # a text with {column}s to fill in; None: the row has `prompt` or `messages`
    system: str | None  # a system message before every prompt

    def __post_init__(self):
        super().__post_init__()
        check_rename(self.rename)


class Prompt(NamedTuple):
    """What is asked, and what the answer is judged by."""

    ids: list[int]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Prompts:
    """A sequence of `Prompt`s."""

    rows: Sequence[Example]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Prompt:
        return Prompt(self.rows[i].ids[0].tolist(), self.rows[i].row)


def question_messages(record: Mapping[str, Any], config: PromptConfig) -> tuple[str, list[dict[str, Any]]]:
    """How a record says it, and the messages that end with what is asked. Raises BadRow."""
    system = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt_format is not None:
        try:
            text = config.prompt_format.format_map(record)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise BadRow("missing key", f"data.prompt_format with {', '.join(record)}: {error!r}") from None
        return "data.prompt_format", [*system, {"role": "user", "content": text}]
    if "prompt" in record:
        return "prompt", system + as_messages(record["prompt"], "user", config.rename)
    if "messages" in record and isinstance(record["messages"], list):
        messages = [message(each, config.rename) for each in record["messages"]]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()  # a row of SFT: its last answer is the model's to give now
        return "messages", system + messages
    if is_pair(record, config.rename):
        kind, prompt, *_ = pair(record, config.rename)
        return kind, system + prompt
    raise BadRow(
        "missing key", f"no 'prompt' or 'messages' among {', '.join(record)}; data.rename=THEIRS=OURS"
    )


def encoder(
    config: PromptConfig, template: ChatTemplate, max_new_tokens: int
) -> Callable[[Mapping[str, Any]], Example]:
    """From records to Examples of one sequence that leaves room for an answer."""
    longest = config.sequence_length - max_new_tokens
    too_long = f"{TOO_LONG} - rollout.sampling.max_new_tokens = {longest}"

    def encode(record: Mapping[str, Any]) -> Example:
        record = renamed(record, config.rename)
        kind, messages = question_messages(record, config)
        ids = np.array(template.prompt(messages), np.int32)
        if len(ids) > longest:
            raise BadRow(too_long, f"{len(ids)} tokens", fault=False)
        return Example((ids,), (np.zeros(len(ids), bool),), opening(messages), kind, row=record)

    return encode


def load_prompts(
    config: PromptConfig,
    tokenizer: BaseTokenizer,
    template: ChatTemplate,
    *,
    seed: int,
    max_new_tokens: int,
    run_folder: Path | None = None,
) -> Dataset:
    """Read, encode and hold out what to evaluate on. `Dataset.train` and `.validation` hold `Prompts`."""
    parts = read_sources(config, encoder(config, template, max_new_tokens), seed=seed, run_folder=run_folder)
    train, validation = config.hold_out(parts)
    fingerprint = repr(([part.fingerprint for part in parts], config.weights, config.held_out_fraction))
    first = parts[0].rows[0]
    lines = [part.describe() for part in parts]
    lines.append(f"train: {sum(map(len, train)):,} prompts; held out: {sum(map(len, validation)):,}")
    lines.append(f"example: {show_mask(first.ids[0], [True] * len(first.ids[0]), tokenizer)}")
    return Dataset(
        tuple(map(Prompts, train)),
        config.weights,
        tuple(map(Prompts, validation)),
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        "\n".join(lines),
        template=template,
    )


def prompt_texts(config: PromptConfig, *, seed: int) -> Iterator[str]:
    """What is asked in the prompts to learn from: what a tokenizer is trained on."""
    for name in config.train:
        for row in config.open(name, "train", text_key=None, seed=seed).rows():
            with contextlib.suppress(BadRow):
                _, messages = question_messages(renamed(row.value or {}, config.rename), config)
                yield from texts(messages)
