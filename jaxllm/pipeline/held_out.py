"""The questions that a stage of a pipeline or a gate evaluates, so that no stage trains on them.

Each stage holds out questions of its own sources; another stage may have them in a source of its own, in
another spelling or with another fraction held out. WORKDIR/held_out.jsonl has them all, and is
`data.held_out` of every stage but pretraining, which reads documents.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.data.chat import ChatConfig, conversation, is_text, opening
from jaxllm.data.held_out import canonical, is_held_out
from jaxllm.data.messages import Messages
from jaxllm.data.preferences import PreferenceConfig, pair
from jaxllm.data.prompts import PromptConfig, question, question_messages
from jaxllm.data.records import Record, Rename
from jaxllm.data.rows import RecordConfig
from jaxllm.data.sources import BadRow, open_source
from jaxllm.files import write_file
from jaxllm.pipeline.completions import AS_IT_IS, HELD_OUT
from jaxllm.pipeline.config import PARENTS, PipelineConfig


def write_held_out(config: PipelineConfig, folder: Path) -> None:
    """Write a row {"prompt"} for each question into `folder`, which must exist. Raises DataError."""
    stages = [getattr(config, name).data for name in PARENTS if name != "pretrain"]
    asked = itertools.chain(gate_questions(config), evaluated(stages, config.seed))
    rows = [json.dumps({"prompt": text}) + "\n" for text in dict.fromkeys(asked)]
    write_file(folder / HELD_OUT, "".join(rows).encode())
    print(f"{len(rows):,} questions are held out of all stages (held_out.jsonl)", flush=True)


def gate_questions(config: PipelineConfig) -> Iterator[str]:
    """The first questions of the rows that the gates complete."""
    for name in config.gates.prompts:
        count = config.gates.rows_of_each_source
        source = open_source(name, split="validation", text_key=None, synthetic_rows=count, seed=config.seed)
        for row in itertools.islice(source.rows(), count):
            with contextlib.suppress(BadRow):
                yield from texts([opening_of(question_messages(Record(row.value or {}), AS_IT_IS)[1])])


def evaluated(stages: Sequence[RecordConfig], seed: int) -> Iterator[str]:
    """The questions of the rows that these stages hold out. What several stages read alike is read once."""
    parts: dict[tuple[Any, ...], RecordConfig] = {}
    for data in sorted(stages, key=lambda data: -data.synthetic_rows):  # fewer rows are the first of more
        reading = (
            isinstance(data, ChatConfig),
            getattr(data, "prompt_format", None),
            data.rename,
        )
        for name, split in data.splits:
            fraction = data.held_out_fraction if split == "train" else 1.0
            if fraction:
                parts.setdefault((name, split, fraction, *reading), data)
    for (name, split, fraction, *_), data in parts.items():
        rename = Rename(data.rename)
        for row in data.open(name, split, text_key=None, seed=seed).rows():
            with contextlib.suppress(BadRow):
                asked = texts(questions(data, Record(rename(row.value or {}))))
                if asked and is_held_out(canonical(asked[0]), fraction):
                    yield from asked


def questions(data: RecordConfig, record: Record) -> list[Any]:
    """By what a stage with this config holds the record out (`Example.group`), and what it asks if that is
    another text. Raises BadRow."""
    if isinstance(data, ChatConfig):
        return [record["text"] if is_text(record) else opening_of(conversation(record)[1])]
    if isinstance(data, PreferenceConfig):
        return [opening_of(pair(record).prompt)]
    assert isinstance(data, PromptConfig)
    messages = question_messages(record, data)[1]
    return [question(record, messages, data), opening_of(messages)]


def opening_of(messages: Messages) -> Any:
    """`opening`, or None where there is no message."""
    return opening(messages) if messages else None


def texts(values: list[Any]) -> list[str]:
    """Without what is malformed, which a stage reports."""
    return [value for value in values if isinstance(value, str) and value.strip()]
