"""Preference data: pairs of answers to one prompt, in the shapes that public datasets have."""

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxllm.batches import PairBatch
from jaxllm.data.chat import as_messages, check_rename, last_run, opening, question, renamed, texts
from jaxllm.data.chat_template import ChatTemplate, Encoded
from jaxllm.data.rows import TOO_LONG, DataConfig, Dataset, Example, Examples, read_sources
from jaxllm.data.show import show_mask
from jaxllm.data.sources import BadRow, json_type
from jaxllm.data.tokenizer import BaseTokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class PreferenceConfig(DataConfig):
    """Which pairs to read."""

    rename: tuple[str, ...]  # "theirs=ours" for columns that are called otherwise
    template: str | None  # a Jinja chat template; None: the tokenizer's own

    def __post_init__(self):
        super().__post_init__()
        check_rename(self.rename)


@dataclass(frozen=True)
class PairRows:
    """A sequence of `PairBatch` rows."""

    pairs: Sequence[Example]  # ids: chosen, rejected; numbers: prompt length, margin, weight
    ref_log_probs: np.ndarray  # float32 [pairs, 2]
    sequence_length: int  # T
    pad_id: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> PairBatch:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        prompt_length, margin, weight = self.pairs[i].numbers
        tokens = np.full((2, self.sequence_length), self.pad_id, np.int32)
        for row, ids in zip(tokens, self.pairs[i].ids, strict=True):
            row[: len(ids)] = ids
        return PairBatch(
            tokens=tokens,
            prompt_lengths=np.int32(prompt_length),
            lengths=np.array([len(ids) for ids in self.pairs[i].ids], np.int32),
            margin=np.float32(margin),
            weight=np.float32(weight),
            ref_log_probs=self.ref_log_probs[i],
        )

    def blank(self) -> PairBatch:
        """A pair without weight, to fill a batch with."""
        return self[0]._replace(weight=np.float32(0))


def pair(record: Mapping[str, Any], rename: Sequence[str] = ()) -> tuple[str, Messages, Any, Any]:
    """How a record says it, the prompt's messages, and the message chosen and the one rejected.

    `prompt` (a text or messages), or Alpaca's `instruction` and `input`, with `chosen` and `rejected` (texts
    or messages); these two alone, as message lists or as transcripts of "Human:" and "Assistant:" turns,
    whose common beginning is the prompt; or `prompt`, two `answers` and a `choice` of 0 or 1.
    Raises BadRow for anything else, for ties, and for answers that are the same.
    """
    record = renamed(record, rename)
    kind, record = _by_choice(record) if "choice" in record else ("", record)
    missing = [key for key in ("chosen", "rejected") if key not in record]
    if missing:
        raise BadRow("missing key", f"no {missing[0]!r} among {', '.join(record)}; data.rename=THEIRS=OURS")
    if "prompt" in record:
        kind = kind or "prompt, chosen, rejected"
        prompt = as_messages(record["prompt"], "user", rename)
    elif "instruction" in record:
        kind = "instruction, input, chosen, rejected"
        prompt = [{"role": "user", "content": question(record)}]
    else:
        kind = "transcripts" if isinstance(record["chosen"], str) else "messages"
        prompt = []
    sides = [prompt + _turns(record[key], bool(prompt), rename) for key in ("chosen", "rejected")]
    if prompt and all(side[len(prompt) :][: len(prompt)] == prompt for side in sides):
        sides = [side[len(prompt) :] for side in sides]  # the lists of messages repeat the prompt
    chosen, rejected = sides
    if chosen == rejected:
        raise BadRow("identical pair", fault=False)
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if not common:
        raise BadRow("no common prompt", "the two sides differ from the first turn on")
    ends = chosen[common:], rejected[common:]
    if any(len(end) != 1 for end in ends):
        raise BadRow("answers of several turns", f"they part at turn {common + 1}", fault=False)
    return kind, chosen[:common], *(end[0] for end in ends)


def is_pair(record: Mapping[str, Any], rename: Sequence[str] = ()) -> bool:
    """Whether a record compares two answers."""
    return bool({"chosen", "choice"} & renamed(record, rename).keys())


def _by_choice(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """{"prompt", "answers": [a, b], "choice"} as {"prompt", "chosen", "rejected"}."""
    answers, choice = record.get("answers"), record["choice"]
    if not isinstance(answers, list) or len(answers) != 2:
        raise BadRow("wrong type", "'answers' must be a list of two, since there is a 'choice'")
    if choice in ("tie", "bad", None):
        raise BadRow("tie", fault=False)
    if type(choice) is not int or choice not in (0, 1):
        raise BadRow("wrong type", f"'choice' is {choice!r}, not 0, 1, tie or bad")
    return "prompt, answers, choice", {**record, "chosen": answers[choice], "rejected": answers[1 - choice]}


def _turns(value: Any, after_prompt: bool, rename: Sequence[str]) -> Messages:
    """The messages of one side."""
    if isinstance(value, list):
        return as_messages(value, "assistant", rename)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"an answer is {json_type(value)}, neither a text nor a list of messages")
    return [{"role": "assistant", "content": value}] if after_prompt else transcript(value)


def transcript(text: str) -> Messages:
    r"""The messages of a text such as `\n\nHuman: Hello\n\nAssistant: Hi`."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        raise BadRow("no prompt", "a text without 'prompt' must be a transcript of Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": said.strip()}
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def encoder(config: PreferenceConfig, template: ChatTemplate) -> Callable[[Mapping[str, Any]], Example]:
    """From records to Examples of two sequences, of which neither is longer than a row."""

    def encode(record: Mapping[str, Any]) -> Example:
        record = renamed(record, config.rename)
        kind, prompt, *answers = pair(record, config.rename)
        if prompt[-1]["role"] != "user" or any(answer["role"] != "assistant" for answer in answers):
            raise BadRow("wrong role order", "the answers must be an assistant's, to a user")
        sides = [answered(template, prompt, answer) for answer in answers]
        longest = max(len(side.ids) for side in sides)
        if longest > config.sequence_length:
            raise BadRow(TOO_LONG, f"{longest} tokens", fault=False)
        if sides[0].ids == sides[1].ids:
            raise BadRow("identical pair", fault=False)
        start = last_run(sides[0].loss_mask)
        return Example(
            ids=tuple(np.array(side.ids, np.int32) for side in sides),
            loss_mask=tuple(np.array(side.loss_mask, bool) for side in sides),
            group=opening(prompt),
            kind=kind,
            numbers=(start, _number(record, "margin", 0.0), _number(record, "weight", 1.0)),
        )

    return encode


def answered(template: ChatTemplate, prompt: Messages, answer: Mapping[str, Any]) -> Encoded:
    """A prompt and its answer up to the token that ends it, where a policy would stop too; some templates
    write a newline after it."""
    ids, loss_mask = template.encode([*prompt, answer], loss_on="last")
    end = len(loss_mask) - loss_mask[::-1].index(True)
    return Encoded(ids[:end], loss_mask[:end])


def _number(record: Mapping[str, Any], key: str, default: float) -> float:
    value = default if record.get(key) is None else record[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadRow("wrong type", f"{key!r} is {value!r}, not a number from 0 on")
    return float(value)


def load_preferences(
    config: PreferenceConfig,
    tokenizer: BaseTokenizer,
    template: ChatTemplate,
    *,
    seed: int,
    run_folder: Path | None = None,
) -> Dataset:
    """Read, encode and hold out what to validate on; all pairs of a prompt are on one side.

    Rows that were left out are written to `bad_rows.jsonl` in `run_folder`.
    """
    parts = read_sources(config, encoder(config, template), seed=seed, run_folder=run_folder)
    train, validation = config.hold_out(parts)

    def lay_out(pairs: list[Example]) -> PairRows:
        empty = np.zeros((len(pairs), 2), np.float32)
        return PairRows(pairs, empty, config.sequence_length, tokenizer.pad_id)

    layout = (len(train), config.weights, config.held_out_fraction)
    fingerprint = repr(([part.fingerprint for part in parts], layout, tokenizer.pad_id))
    data = Dataset(
        tuple(map(lay_out, train)),
        config.weights,
        tuple(map(lay_out, validation)),
        xxhash.xxh3_128_hexdigest(fingerprint.encode()),
        report="",
        template=template,
    )
    return replace(data, report=_report(parts, data, tokenizer))


def _report(parts: list[Examples], data: Dataset, tokenizer: BaseTokenizer) -> str:
    lines = [part.describe() for part in parts]
    for role, sources in (("train", data.train), ("validation", data.validation)):
        if pairs := [each for rows in sources for each in rows.pairs]:
            chosen, rejected = np.array([[len(ids) for ids in each.ids] for each in pairs]).T
            lines.append(
                f"{role}: {len(pairs):,} pairs, {chosen.mean():.0f} tokens the chosen and "
                f"{rejected.mean():.0f} the rejected; the longer one is chosen in "
                f"{(chosen > rejected).mean():.1%} of them, {(chosen == rejected).mean():.1%} are as long"
            )
    first = parts[0].rows[0]
    for name, ids, loss_mask in zip(("chosen", "rejected"), first.ids, first.loss_mask, strict=True):
        shown = show_mask(ids, loss_mask, tokenizer, colour=sys.stdout.isatty())
        lines.append(f"example, {name} (the prompt in ⟦ ⟧): {shown}")
    return "\n".join(lines)


def preference_texts(config: PreferenceConfig, *, seed: int) -> Iterator[str]:
    """What is said in the pairs to learn from: what a tokenizer is trained on."""
    for name in config.train:
        for row in config.open(name, "train", text_key=None, seed=seed).rows():
            with contextlib.suppress(BadRow):
                _, prompt, *answers = pair(row.value or {}, config.rename)
                yield from texts([*prompt, *answers])
