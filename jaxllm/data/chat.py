"""Instruction data: conversations in the shapes that public datasets have, as token rows with a loss mask."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxllm.data.chat_template import ChatTemplate, Messages
from jaxllm.data.packing import PackedRows, pack_rows
from jaxllm.data.rows import TOO_LONG, DataConfig, Dataset, Example, Examples, read_sources
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow, json_type
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class ChatConfig(DataConfig):
    """Which conversations to read, what of them to learn, and how to lay them out."""

    rename: tuple[str, ...]  # "theirs=ours" for columns that are called otherwise
    template: str | None  # a Jinja chat template; None: the tokenizer's own
    loss_on: str  # "assistant": its every turn, "last": its last turn, "all": every token
    packing: bool  # several conversations a row, which do not see each other; False: one a row
    overlong: str  # what does not fit into a row: "drop" it, or "truncate" it

    def __post_init__(self):
        super().__post_init__()
        check_rename(self.rename)
        for field, choices in {"loss_on": ("assistant", "last", "all"), "overlong": ("drop", "truncate")}.items():
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"data.{field}={getattr(self, field)!r}: choose one of {', '.join(choices)}"
                )


@dataclass(frozen=True)
class ChatDataset(Dataset):
    """Conversations ready to be batched."""

    held_out: tuple[tuple[list[int], list[int]], ...] = ()  # prompt and answer of each held-out conversation


def check_rename(rename: Sequence[str]) -> None:
    """ConfigError where an entry is not "theirs=ours"."""
    for entry in rename:
        theirs, equals, ours = entry.partition("=")
        if not (theirs and equals and ours):
            raise ConfigError(f"data.rename has {entry!r}: write THEIRS=OURS, such as question=prompt")


def renamed(record: Mapping[str, Any], rename: Sequence[str]) -> dict[str, Any]:
    """The record with columns called as this module calls them."""
    names = dict(entry.split("=", 1) for entry in rename)
    return {names.get(key, key): value for key, value in record.items()}


def conversation(record: Mapping[str, Any], rename: Sequence[str] = ()) -> tuple[str, list[dict[str, Any]]]:
    """How a record says it, and the messages it holds.

    `messages` of role and content; ShareGPT's `conversations` of from and value; `prompt` (a text or
    messages) and `completion`; Alpaca's `instruction`, `input`, `output`, with LIMA's `history` of earlier
    exchanges. All may have a `system` text besides. Raises BadRow for anything else.
    """
    record = renamed(record, rename)
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for key in ("messages", "conversations"):
        if key in record:
            return key, system + [message(each, rename) for each in _list(record, key)]
    if "prompt" in record and "completion" in record:
        prompt = as_messages(record["prompt"], "user", rename)
        return "prompt, completion", system + prompt + as_messages(record["completion"], "assistant", rename)
    if "instruction" in record and "output" in record:
        history = record.get("history") or []
        if not isinstance(history, list) or not all(isinstance(x, list) and len(x) == 2 for x in history):
            raise BadRow("wrong type", "'history' must be a list of questions with their answers")
        turns = itertools.chain.from_iterable(
            exchange(*pair) for pair in [*history, (question(record), record["output"])]
        )
        return "instruction, input, output", [*system, *turns]
    if "chosen" in record:
        raise BadRow(
            "unknown format",
            "pairs of answers are for reward models and DPO; here set data.rename=chosen=completion",
        )
    raise BadRow(
        "unknown format", f"no answer among the keys {', '.join(record)}; set data.rename=THEIRS=OURS"
    )


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is a plain text. Some conversations have a `text` too, which says them once more."""
    return "text" in record and not {"messages", "conversations", "completion", "output"} & record.keys()


def question(record: Mapping[str, Any]) -> str:
    """Alpaca's `instruction`, and its `input` below it if there is one."""
    instruction, context = record["instruction"], record.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(context, str):
        raise BadRow("wrong type", "'instruction' and 'input' must be strings")
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    """A user's turn and the answer to it."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_messages(value: Any, role: str, rename: Sequence[str]) -> list[dict[str, Any]]:
    """A list of messages as it is, a text as one message of this role."""
    if isinstance(value, list):
        return [message(each, rename) for each in value]
    return [{"role": role, "content": value}]


def message(value: Any, rename: Sequence[str]) -> dict[str, Any]:
    """{"role", "content"} of a message in that form or in ShareGPT's (from, value)."""
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"a message is {json_type(value)}, not an object")
    value = renamed(value, rename)
    role, content = (
        value.get(ours, value.get(theirs)) for ours, theirs in (("role", "from"), ("content", "value"))
    )
    for unread in ("tool_calls", "reasoning_content"):
        if value.get(unread):
            raise BadRow("part of a message that is not read", unread)
    if role is None:
        raise BadRow("missing key", f"a message has keys {', '.join(value)}, but no role")
    if not isinstance(role, str):
        raise BadRow("wrong type", f"a message's role is {json_type(role)}, not a string")
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise BadRow("wrong type", f"{key!r} is {json_type(record[key])}, not a list")
    return record[key]


def opening(messages: Messages) -> str:
    """What a conversation begins with: those that share it are held out together."""
    return next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])


def encoder(
    config: ChatConfig, tokenizer: BaseTokenizer, template: ChatTemplate
) -> Callable[[Mapping[str, Any]], Example]:
    """From records to Examples whose sequences fit into a row; a `text` is cut up, as in pretraining."""
    fits = config.sequence_length + 1  # the last token is only a target

    def encode(record: Mapping[str, Any]) -> Example:
        record = renamed(record, config.rename)
        if is_text(record):
            return encode_text(record["text"], tokenizer, config.sequence_length)
        kind, messages = conversation(record, config.rename)
        ids, loss_mask = template.encode(messages, loss_on=config.loss_on)
        answers = loss_mask if config.loss_on != "all" else template.encode(messages, loss_on="assistant").loss_mask
        if len(ids) > fits and (config.overlong == "drop" or not any(answers[:fits])):
            raise BadRow(TOO_LONG, f"{len(ids)} tokens", fault=False)
        row = np.array(ids[:fits], np.int32), np.array(loss_mask[:fits], bool)
        return Example(*zip(row), group=opening(messages), kind=kind, numbers=(last_run(answers[:fits]),))

    return encode


def encode_text(text: Any, tokenizer: BaseTokenizer, sequence_length: int) -> Example:
    """A document, cut into pieces that fill a row; every token is a target exactly once."""
    if not isinstance(text, str):
        raise BadRow("wrong type", f"'text' is {json_type(text)}, not a string")
    if not text.strip():
        raise BadRow("empty text")
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)
    starts = range(0, len(ids) - 1, sequence_length)
    pieces = tuple(ids[start : start + sequence_length + 1] for start in starts)
    return Example(pieces, tuple(np.ones(len(piece), bool) for piece in pieces), text, "text")


def chat_texts(config: ChatConfig, *, seed: int) -> Iterator[str]:
    """What is said in the conversations to learn from: what a tokenizer is trained on."""
    for name in config.train:
        for row in config.open(name, "train", text_key=None, seed=seed).rows():
            with contextlib.suppress(BadRow):
                record = renamed(row.value or {}, config.rename)
                if is_text(record):
                    yield from texts([{"content": record["text"]}])
                else:
                    yield from texts(conversation(record, config.rename)[1])


def texts(messages: Messages) -> Iterator[str]:
    """The contents that are texts."""
    return (m["content"] for m in messages if isinstance(m["content"], str))


def last_run(loss_mask: Sequence[bool]) -> int:
    """Where the last stretch of True begins."""
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
    """Read, encode, hold out what to validate on, and lay out in rows.

    Rows that were left out are written to `bad_rows.jsonl` in `run_folder`. Raises DataError where no token
    would be learnt.
    """
    parts = read_sources(config, encoder(config, tokenizer, template), seed=seed, run_folder=run_folder)
    train, validation = config.hold_out(parts)

    def lay_out(rows: list[Example]) -> PackedRows:
        texts = [text for row in rows for text in zip(row.ids, row.loss_mask, strict=True)]
        return pack_rows(
            texts,
            sequence_length=config.sequence_length,
            pad_id=tokenizer.pad_id,
            packing=config.packing,
            seed=seed,
        )

    layout = (len(train), config.weights, config.held_out_fraction, config.sequence_length, config.packing)
    fingerprint = repr(([part.fingerprint for part in parts], layout, seed, tokenizer.pad_id))
    data = ChatDataset(
        tuple(map(lay_out, train)),
        config.weights,
        tuple(map(lay_out, validation)),
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        report="",
        template=template,
        held_out=tuple(answered(row) for rows in validation for row in rows if row.kind != "text"),
    )
    return replace(data, report=_report(config, parts, data, tokenizer))


def answered(row: Example) -> tuple[list[int], list[int]]:
    """The tokens before a conversation's last answer, and those of the answer."""
    start = int(row.numbers[0])
    return row.ids[0][:start].tolist(), row.ids[0][start:].tolist()


def _report(config: ChatConfig, parts: list[Examples], data: ChatDataset, tokenizer: BaseTokenizer) -> str:
    lines = [part.describe() for part in parts]
    for role, sources in (("train", data.train), ("validation", data.validation)):
        if number := sum(map(len, sources)):
            tokens = sum(rows.num_tokens for rows in sources)
            loss_mask = sum(int(mask[1:].sum()) for rows in sources for _, mask in rows.texts)
            padding = 1 - tokens / (number * config.sequence_length)
            lines.append(
                f"{role}: {tokens:,} tokens, {loss_mask / max(1, tokens):.1%} of them learnt, in "
                f"{number:,} rows of {config.sequence_length}, {padding:.1%} padding"
            )
    template_name = "Jinja" if data.template.source else "built in"
    stops = ", ".join(tokenizer.pieces[i] for i in data.template.stop_ids)
    lines.append(f"chat template: {template_name}; answers end at {stops}")
    rows = [row for part in parts for row in part.rows]
    example = next((row for row in rows if row.kind != "text"), rows[0])
    shown = show_mask(example.ids[0], example.loss_mask[0], tokenizer, colour=sys.stdout.isatty())
    lines.append(f"example (what is in ⟦ ⟧ is read but not learnt): {shown}")
    return "\n".join(lines)
