"""Preference data: pairs of completions of one prompt, in the formats of public datasets."""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash

from jaxllm.batches import PairBatch
from jaxllm.data.chat import alpaca_prompt, contents, last_span_start, opening, user_turns
from jaxllm.data.chat_template import ChatTemplate, Tools, row_tools
from jaxllm.data.examples import Example, ExampleRows, Examples, hold_out
from jaxllm.data.loss_mask import Encoded
from jaxllm.data.messages import (
    Message,
    Messages,
    as_messages,
    continued,
    is_transcript,
    system_message,
    transcript,
)
from jaxllm.data.records import Record
from jaxllm.data.row_cache import Encoder, read_sources
from jaxllm.data.rows import TOO_LONG, Dataset, RecordConfig, training_texts
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow, json_type
from jaxllm.data.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class PreferenceConfig(RecordConfig):
    """Which pairs to read."""


@dataclass(frozen=True)
class PairRows:
    """A sequence of `PairBatch` rows, one per pair."""

    pairs: Sequence[Example]  # ids: chosen, rejected; numbers: prompt length, margin, weight
    ref_log_probs: np.ndarray  # float32 [pairs, 2], as in PairBatch
    sequence_length: int  # T
    pad_id: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> PairBatch:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        pair = self.pairs[i]
        prompt_length, margin, weight = pair.numbers
        tokens = np.full((2, self.sequence_length), self.pad_id, np.int32)
        for row, ids in zip(tokens, pair.ids, strict=True):
            row[: len(ids)] = ids
        return PairBatch(
            tokens=tokens,
            prompt_lengths=np.int32(prompt_length),
            lengths=np.array([len(ids) for ids in pair.ids], np.int32),
            margin=np.float32(margin),
            weight=np.float32(weight),
            ref_log_probs=self.ref_log_probs[i],
        )

    def blank(self) -> PairBatch:
        """A pair of weight 0, to fill up a batch with."""
        return self[0]._replace(weight=np.float32(0))


class Pair(NamedTuple):
    """A preference in one form, whatever format it was read from."""

    kind: str  # the format
    prompt: list[Message]
    chosen: Message
    rejected: Message


def pair(record: Mapping[str, Any]) -> Pair:
    """The prompt of a record, its chosen and its rejected message.

    The formats are: `prompt` (a text or messages), or Alpaca's `instruction` and `input`, with `chosen` and
    `rejected` (texts, messages or whole conversations); `chosen` and `rejected` alone, as lists of messages
    or as transcripts of "Human:" and "Assistant:" turns, whose common start is the prompt; or `prompt`, two
    `answers` and a `choice` of 0 or 1. Each may have a `system` text too. Raises BadRow for anything else,
    for ties, and for identical completions.
    """
    kind, sides = _sides(record)
    if "prompt" in record:
        kind = kind or "prompt, chosen, rejected"
        prompt = as_messages(record["prompt"], "user")
    elif "instruction" in record:
        kind = "instruction, input, chosen, rejected"
        prompt = alpaca_prompt(record)
    else:
        kind = "transcripts" if isinstance(sides[0], str) else "messages"
        prompt = []
    before = [*system_message(record), *prompt]
    chosen, rejected = (continued(before, _turns(side, bool(prompt))) for side in sides)
    if chosen == rejected:
        raise BadRow("identical pair", fault=False)
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if not common:
        raise BadRow("no common prompt", "chosen and rejected differ from the first turn on")
    ends = chosen[common:], rejected[common:]
    if any(len(end) != 1 for end in ends):
        raise BadRow("completions of several turns", f"they differ from turn {common + 1} on", fault=False)
    if any(end[0].get("weight") == 0 for end in ends):
        raise BadRow("completion of weight 0", fault=False)
    return Pair(kind, chosen[:common], chosen[common], rejected[common])


def is_pair(record: Mapping[str, Any]) -> bool:
    """Whether a record compares two completions."""
    return bool({"chosen", "choice"} & record.keys())


def _sides(record: Mapping[str, Any]) -> tuple[str, tuple[Any, Any]]:
    """The format, where a `choice` among `answers` tells it, and the chosen and the rejected side."""
    if "chosen" in record or not {"choice", "answers"} & record.keys():
        if missing := [key for key in ("chosen", "rejected") if key not in record]:
            keys = ", ".join(record)
            raise BadRow("missing key", f"no {missing[0]!r} among {keys}; set data.rename=THEIRS=OURS")
        return "", (record["chosen"], record["rejected"])
    answers, choice = record.get("answers"), record.get("choice")
    if not isinstance(answers, list) or len(answers) != 2:
        raise BadRow("wrong type", "'answers' must be a list of two, because the row has a 'choice'")
    if choice is None:
        raise BadRow("no choice", fault=False)
    if choice in ("tie", "bad"):
        raise BadRow("tie", fault=False)
    if type(choice) is not int or choice not in (0, 1):
        raise BadRow("wrong type", f"'choice' is {choice!r}, not 0, 1, tie or bad")
    return "prompt, answers, choice", (answers[choice], answers[1 - choice])


def _turns(value: Any, after_prompt: bool) -> list[Message]:
    """The messages of `chosen` or `rejected`."""
    if isinstance(value, list):
        return as_messages(value, "assistant")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"a completion is {json_type(value)}, not a string or a list of messages")
    if after_prompt and not is_transcript(value):
        return as_messages(value, "assistant")
    return transcript(value)


def encoder(config: PreferenceConfig, template: ChatTemplate) -> Callable[[Mapping[str, Any]], Example]:
    """A function from records to Examples of two sequences, neither of them longer than a row."""
    return functools.partial(encode_pair, config=config, template=template)


def encode_pair(record: Mapping[str, Any], *, config: PreferenceConfig, template: ChatTemplate) -> Example:
    """The two sides of a record. Raises BadRow."""
    kind, prompt, *completions = pair(record)
    if prompt[-1]["role"] != "user" or any(turn["role"] != "assistant" for turn in completions):
        raise BadRow("wrong role order", "the completions must be assistant turns after a user turn")
    tools = row_tools(record, template)
    sides = [encode_completion(template, prompt, completion, tools) for completion in completions]
    longest = max(len(side.ids) for side in sides)
    if longest > config.sequence_length:
        raise BadRow(TOO_LONG, f"{longest} tokens", fault=False)
    if sides[0].ids == sides[1].ids:
        raise BadRow("identical pair", fault=False)
    start = last_span_start(sides[0].loss_mask)
    return Example(
        ids=tuple(np.array(side.ids, np.int32) for side in sides),
        loss_mask=tuple(np.array(side.loss_mask, bool) for side in sides),
        group=opening(prompt),
        kind=kind,
        numbers=(start, _number(record, "margin", 0.0), _number(record, "weight", 1.0)),
        turns=user_turns(prompt),
    )


def encode_completion(
    template: ChatTemplate, prompt: Messages, completion: Mapping[str, Any], tools: Tools | None = None
) -> Encoded:
    """A prompt and its completion up to the stop token, where a policy would stop too. Some templates write a
    newline after it."""
    ids, loss_mask = template.encode([*prompt, completion], loss_on="last", tools=tools)
    end = len(loss_mask) - loss_mask[::-1].index(True)
    return Encoded(ids[:end], loss_mask[:end])


def _number(record: Mapping[str, Any], key: str, default: float) -> float:
    value = default if record.get(key) is None else record[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadRow("wrong type", f"{key!r} is {value!r}, not a finite number of at least 0")
    return float(value)


def load_preferences(
    config: PreferenceConfig,
    tokenizer: BaseTokenizer,
    template: ChatTemplate,
    *,
    seed: int,
    run_folder: Path | None = None,
) -> Dataset[PairRows]:
    """Read and encode all sources, and hold out pairs to validate on, all pairs of a prompt together.

    Dropped rows are written to `bad_rows.jsonl` in `run_folder`. Raises DataError where no pair is left.
    """
    encode = Encoder(encoder(config, template), tokenizer, template)
    parts = read_sources(config, encode, seed=seed, run_folder=run_folder)
    train, validation = hold_out(config, parts)

    def as_rows(pairs: ExampleRows) -> PairRows:
        empty = np.zeros((len(pairs), 2), np.float32)
        return PairRows(pairs, empty, config.sequence_length, tokenizer.pad_id)

    layout = (len(train), config.weights, config.held_out_fraction)
    fingerprint = repr(([part.fingerprint for part in parts], layout, tokenizer.pad_id))
    data = Dataset(
        tuple(map(as_rows, train)),
        config.weights,
        tuple(map(as_rows, validation)),
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        report="",
    )
    return replace(data, report=_report(parts, data, tokenizer))


def _report(parts: list[Examples], data: Dataset[PairRows], tokenizer: BaseTokenizer) -> str:
    lines = [part.describe() for part in parts]
    for split, sources in (("train", data.train), ("validation", data.validation)):
        lengths = [cast("ExampleRows", rows.pairs).sequences.lengths for rows in sources]
        if sum(map(len, lengths)):
            chosen, rejected = np.concatenate(lengths).reshape(-1, 2).T
            lines.append(
                f"{split}: {len(chosen):,} pairs, mean length {chosen.mean():.0f} tokens (chosen) and "
                f"{rejected.mean():.0f} (rejected); the chosen completion is longer in "
                f"{(chosen > rejected).mean():.1%} of them, equally long in {(chosen == rejected).mean():.1%}"
            )
    first = parts[0].rows[0]
    for name, ids, loss_mask in zip(("chosen", "rejected"), first.ids, first.loss_mask, strict=True):
        shown = show_mask(ids, loss_mask, tokenizer, color=sys.stdout.isatty())
        lines.append(f"example, {name} (the prompt is in ⟦ ⟧): {shown}")
    return "\n".join(lines)


def preference_texts(config: PreferenceConfig, *, seed: int) -> Iterator[str]:
    """The texts of the training pairs, to train a tokenizer on."""

    def texts(record: Record) -> Iterator[str]:
        _, prompt, chosen, rejected = pair(record)
        return contents([*prompt, chosen, rejected])

    return training_texts(config, texts, seed=seed)
