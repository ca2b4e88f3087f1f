"""Instruction data: conversations in the formats of public datasets, as token rows with a loss mask."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from jaxllm.data.chat_template import ChatTemplate, row_tools
from jaxllm.data.examples import Example, ExampleRows, Examples, Sequences, hold_out
from jaxllm.data.loss_mask import LOSS_ON
from jaxllm.data.messages import (
    Message,
    Messages,
    as_messages,
    continued,
    joined,
    message,
    system_message,
)
from jaxllm.data.packing import PackedRows, pack_rows
from jaxllm.data.records import Record
from jaxllm.data.row_cache import Encoder, read_sources
from jaxllm.data.rows import TOO_LONG, Dataset, RecordConfig, training_texts
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow, json_type
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError


@dataclass(frozen=True)
class ChatConfig(RecordConfig):
    """Which conversations to read, which of their tokens to train on, and how to pack them."""

    loss_on: str  # "assistant": every assistant turn, "last": the last one, "all": every token
    packing: bool  # several conversations per row, without attention between them; False: one per row
    overlong: str  # "drop" or "truncate" conversations longer than sequence_length

    def __post_init__(self):
        super().__post_init__()
        for field, choices in {"loss_on": LOSS_ON, "overlong": ("drop", "truncate")}.items():
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"data.{field}={getattr(self, field)!r}: choose one of {', '.join(choices)}"
                )


@dataclass(frozen=True)
class Completions(Sequence[tuple[list[int], list[int]]]):
    """The conversations of several sources, each as the ids of its prompt and of its last assistant turn."""

    sources: tuple[ExampleRows, ...]
    order: np.ndarray  # int64 [N, 2], source and row of each

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Completions(self.sources, self.order[i])
        source, row = self.order[i]
        return split_completion(self.sources[source][row])


@dataclass(frozen=True)
class ChatDataset(Dataset[PackedRows]):
    """Packed conversations, and the held-out ones as prompts to generate from."""

    held_out: Completions | tuple[()] = ()  # (prompt, completion) ids of each conversation


def completions_of(sources: Sequence[ExampleRows]) -> Completions:
    """The conversations, one of each source in turn; a plain text is none."""
    found = [
        (row, source) for source, rows in enumerate(sources) for row in np.flatnonzero(~rows.is_kind("text"))
    ]
    order = np.array(sorted(found), np.int64).reshape(-1, 2)[:, ::-1]
    return Completions(tuple(sources), order)


def conversation(record: Mapping[str, Any]) -> tuple[str, list[Message]]:
    """The format of a record, and its messages.

    The formats are: `messages` of role and content; ShareGPT's `conversations` of from and value; `prompt` (a
    text or messages) and `completion`; Alpaca's `instruction`, `input`, `output`, with LIMA's `history` of
    earlier exchanges. Each may have a `system` text too. Raises BadRow for anything else.
    """
    system = system_message(record)
    for key in ("messages", "conversations"):
        if key in record:
            return key, joined(system, [message(each) for each in list_of(record, key)])
    if "prompt" in record and "completion" in record:
        prompt = [*system, *as_messages(record["prompt"], "user")]
        return "prompt, completion", continued(prompt, as_messages(record["completion"], "assistant"))
    if "instruction" in record and "output" in record:
        completion = message({"role": "assistant", "content": record["output"]})
        return "instruction, input, output", [*system, *alpaca_prompt(record), completion]
    if "chosen" in record:
        raise BadRow(
            "unknown format",
            "a preference pair; to train on its chosen completion, set data.rename=chosen=completion",
        )
    raise BadRow(
        "unknown format", f"no completion among the keys {', '.join(record)}; set data.rename=THEIRS=OURS"
    )


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is a plain text. Some conversations have a `text` too, which repeats their content."""
    return "text" in record and not {"messages", "conversations", "completion", "output"} & record.keys()


def alpaca_prompt(record: Mapping[str, Any]) -> list[Message]:
    """Alpaca's `instruction`, with its `input` if there is one, after LIMA's `history` of exchanges."""
    history, context = record.get("history") or [], record.get("input") or ""
    if not isinstance(history, list) or not all(isinstance(x, list) and len(x) == 2 for x in history):
        raise BadRow("wrong type", "'history' must be a list of [question, answer] pairs")
    instruction = record["instruction"]
    if not isinstance(instruction, str) or not isinstance(context, str):
        raise BadRow("wrong type", "'instruction' and 'input' must be strings")
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    roles = itertools.cycle(("user", "assistant"))
    turns = zip(roles, [*itertools.chain.from_iterable(history), question], strict=False)
    return [message({"role": role, "content": content}) for role, content in turns]


def list_of(record: Mapping[str, Any], key: str) -> list[Any]:
    """The column `key`. Raises BadRow where it is no list."""
    if not isinstance(record[key], list):
        raise BadRow("wrong type", f"{key!r} is {json_type(record[key])}, not a list")
    return record[key]


def opening(messages: Messages) -> str:
    """The first user message, else the first message. Conversations that share it are held out together."""
    return next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])


def user_turns(messages: Messages) -> tuple[str, ...]:
    """The contents of the user messages."""
    return tuple(m["content"] for m in messages if m["role"] == "user")


def encoder(
    config: ChatConfig, tokenizer: BaseTokenizer, template: ChatTemplate
) -> Callable[[Mapping[str, Any]], Example]:
    """A function from records to Examples that fit into a row. A `text` is cut up, as in pretraining."""
    return functools.partial(encode_chat, config=config, tokenizer=tokenizer, template=template)


def encode_chat(
    record: Mapping[str, Any], *, config: ChatConfig, tokenizer: BaseTokenizer, template: ChatTemplate
) -> Example:
    """The conversation or the text of a record. Raises BadRow."""
    fits = config.sequence_length + 1  # the last token is only a target
    if is_text(record):
        return encode_text(record["text"], tokenizer, config.sequence_length)
    kind, messages = conversation(record)
    tools = row_tools(record, template)
    ids, loss_mask = template.encode(messages, loss_on=config.loss_on, tools=tools)
    by_assistant = loss_mask
    if config.loss_on == "all":
        by_assistant = template.encode(messages, loss_on="assistant", tools=tools).loss_mask
    weights = turn_weights(messages, by_assistant)
    if not weights.any():
        raise BadRow("no assistant turn of weight 1", fault=False)
    if len(ids) > fits and (config.overlong == "drop" or not weights[:fits].any()):
        raise BadRow(TOO_LONG, f"{len(ids)} tokens", fault=False)
    in_loss = np.where(by_assistant, weights, loss_mask)
    return Example(
        ids=(np.array(ids[:fits], np.int32),),
        loss_mask=(in_loss[:fits],),
        group=opening(messages),
        kind=kind,
        numbers=(last_span_start(by_assistant[:fits]),),
        turns=user_turns(messages),
    )


def turn_weights(messages: Messages, by_assistant: Sequence[bool]) -> np.ndarray:
    """bool [T], True in the assistant turns of weight 1. `by_assistant` [T]: in any turn of theirs, or in the
    last one."""
    found = np.array(by_assistant, bool)
    weights = [each.get("weight", 1) for each in messages if each["role"] == "assistant"]
    if not all(weights):
        turns = np.flatnonzero(np.diff(found, prepend=False, append=False)).reshape(-1, 2)
        for (start, end), weight in zip(turns[::-1], weights[::-1], strict=False):
            found[start:end] = weight
    return found


def encode_text(text: Any, tokenizer: BaseTokenizer, sequence_length: int) -> Example:
    """A document, cut into pieces of one row each; every token but the BOS is a target exactly once."""
    if not isinstance(text, str):
        raise BadRow("wrong type", f"'text' is {json_type(text)}, not a string")
    if not text.strip():
        raise BadRow("empty text")
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)
    starts = range(0, len(ids) - 1, sequence_length)
    pieces = tuple(ids[start : start + sequence_length + 1] for start in starts)
    return Example(pieces, tuple(np.ones(len(piece), bool) for piece in pieces), text, "text")


def chat_texts(config: ChatConfig, *, seed: int) -> Iterator[str]:
    """The texts of the training conversations, to train a tokenizer on."""

    def texts(record: Record) -> Iterator[str]:
        return contents([{"content": record["text"]}] if is_text(record) else conversation(record)[1])

    return training_texts(config, texts, seed=seed)


def contents(messages: Messages) -> Iterator[str]:
    """The contents of the messages, without those that are not texts."""
    return (m["content"] for m in messages if isinstance(m["content"], str))


def last_span_start(loss_mask: Sequence[bool]) -> int:
    """The index at which the last run of consecutive True begins."""
    end = len(loss_mask) - list(reversed(loss_mask)).index(True)
    return end - next((i for i, x in enumerate(reversed(loss_mask[:end])) if not x), end)


def load_chats(
    config: ChatConfig,
    tokenizer: BaseTokenizer,
    template: ChatTemplate,
    *,
    seed: int,
    run_folder: Path | None = None,
) -> ChatDataset:
    """Read and encode all sources, hold out rows to validate on, and pack the rest.

    Dropped rows are written to `bad_rows.jsonl` in `run_folder`. Raises DataError where no row is left.
    """
    encode = Encoder(encoder(config, tokenizer, template), tokenizer, template)
    parts = read_sources(config, encode, seed=seed, run_folder=run_folder)
    train, validation = hold_out(config, parts)

    def packed(rows: ExampleRows) -> PackedRows:
        return pack_rows(
            rows.sequences,
            sequence_length=config.sequence_length,
            pad_id=tokenizer.pad_id,
            packing=config.packing,
            seed=seed,
        )

    layout = (len(train), config.weights, config.held_out_fraction, config.sequence_length, config.packing)
    fingerprint = repr(([part.fingerprint for part in parts], layout, seed, tokenizer.pad_id))
    data = ChatDataset(
        tuple(map(packed, train)),
        config.weights,
        tuple(map(packed, validation)),
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        report="",
        held_out=completions_of(validation),
    )
    return replace(data, report=_report(config, parts, data, tokenizer, template))


def split_completion(row: Example) -> tuple[list[int], list[int]]:
    """The ids before the last assistant turn of a conversation, and the ids of that turn."""
    start = int(row.numbers[0])
    return row.ids[0][:start].tolist(), row.ids[0][start:].tolist()


def _report(
    config: ChatConfig,
    parts: list[Examples],
    data: ChatDataset,
    tokenizer: BaseTokenizer,
    template: ChatTemplate,
) -> str:
    lines = [part.describe() for part in parts]
    for split, sources in (("train", data.train), ("validation", data.validation)):
        if number := sum(map(len, sources)):
            tokens = sum(rows.num_tokens for rows in sources)
            targets = sum(cast("Sequences", rows.sequences).num_targets for rows in sources)
            padding = 1 - tokens / (number * config.sequence_length)
            lines.append(
                f"{split}: {tokens:,} tokens, {targets / max(1, tokens):.1%} of them in the loss, in "
                f"{number:,} rows of {config.sequence_length}, {padding:.1%} padding"
            )
    template_name = "Jinja" if template.source else "built-in"
    stops = ", ".join(tokenizer.pieces[i] for i in template.stop_ids)
    lines.append(f"chat template: {template_name}; stop tokens: {stops}")
    chats = (part.rows[np.argmin(text)] for part in parts if not (text := part.rows.is_kind("text")).all())
    example = next(chats, parts[0].rows[0])
    shown = show_mask(example.ids[0], example.loss_mask[0], tokenizer, color=sys.stdout.isatty())
    lines.append(f"example (tokens in ⟦ ⟧ are not in the loss): {shown}")
    return "\n".join(lines)
