"""Rewards of completions that are given, by a reward model: for experiments/score.py."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.data.chat import conversation, last_span_start
from jaxllm.data.chat_template import ChatTemplate, row_tools
from jaxllm.data.preferences import encode_completion, is_pair, pair
from jaxllm.data.records import Record, Rename
from jaxllm.data.sources import BadRow, open_source
from jaxllm.errors import DataError
from jaxllm.evaluation.agreement import Comparison, agreements, describe, judge
from jaxllm.evaluation.left_out import print_left_out
from jaxllm.evaluation.preference import PairScores, mean, numbered, reward_metrics
from jaxllm.evaluation.suite_model import SuiteModel, suite_template
from jaxllm.files import naming
from jaxllm.rewards.pool import json_value
from jaxllm.rollout.collect import bucket
from jaxllm.runs.checkpoints import (
    LoadedModel,
    check_generates,
    checkpoint_template,
    inference_dtype,
    load_checkpoint,
    local_mesh,
)

BATCH = 16  # sequences scored at a time


class Row(NamedTuple):
    """A row with one completion, or the two of a pair."""

    record: dict[str, Any]
    sequences: list[list[int]]  # token ids of prompt and completion
    prompt_length: int  # tokens


def read_rows(
    name: str, template: ChatTemplate, *, longest: int, rename: Sequence[str]
) -> tuple[list[Row], int]:
    """The rows of a source with at most `longest` tokens, and the number left out, which stderr names."""
    rename_row = Rename(rename, "--rename")
    rows: list[Row] = []
    left_out: list[tuple[str, BadRow]] = []
    source = open_source(name, split="validation", text_key=None, synthetic_rows=1000, seed=0)
    for row in source.rows():
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail)
            encoded = encode(Record(rename_row(row.value)), row.value, template)
            length = max(map(len, encoded.sequences))
            if length > longest:
                raise BadRow("longer than model.max_length", f"{length} tokens")
            rows.append(encoded)
        except BadRow as error:
            left_out.append((row.where, rename_row.named(error)))
    print_left_out(left_out)
    rename_row.check()
    if not rows:
        raise DataError(f"--input={name}: no row can be scored")
    return rows, len(left_out)


def encode(record: Record, row: dict[str, Any], template: ChatTemplate) -> Row:
    """The last assistant turn of a conversation, or both completions of a pair. Raises BadRow."""
    if is_pair(record):
        _, prompt, *completions = pair(record)
    else:
        *prompt, completion = conversation(record)[1]
        completions = [completion]
    tools = row_tools(record, template)
    encoded = [encode_completion(template, prompt, completion, tools) for completion in completions]
    return Row(row, [each.ids for each in encoded], last_span_start(encoded[0].loss_mask))


def score(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """A reward for each, float32 [N]. Sequences of similar length share a batch."""
    model = loaded.model
    rewards = jax.jit(lambda params, tokens, lengths: model.rewards(params, tokens, lengths).values)
    found = np.zeros(len(sequences), np.float32)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        tokens = np.zeros((BATCH, bucket(len(sequences[rows[-1]]))), np.int32)
        lengths = np.ones(BATCH, np.int32)
        for row, i in enumerate(rows):
            tokens[row, : len(sequences[i])], lengths[row] = sequences[i], len(sequences[i])
        found[rows] = np.asarray(rewards(loaded.params, tokens, lengths))[: len(rows)]
    return found


def load_judge(checkpoint: str, *, dtype: str | None) -> SuiteModel:
    """A policy that is asked which of two answers is better."""
    loaded = load_checkpoint(checkpoint, local_mesh, dtype=inference_dtype(dtype))
    check_generates(loaded, f"--judge={checkpoint}")
    return SuiteModel(loaded, suite_template(loaded))


def print_agreement(loaded: LoadedModel, comparisons: Sequence[Comparison], model: SuiteModel | None) -> None:
    """How far people, the reward model and a judge agree on comparisons of answers, and the judge's bias for
    what it sees first."""
    template = checkpoint_template(loaded)
    sequences = [
        encode_completion(template, each.prompt, {"role": "assistant", "content": answer}).ids
        for each in comparisons
        for answer in each.answers
    ]
    labels = {"reward model": score(loaded, sequences).reshape(-1, 2).argmax(1).tolist()}
    if model is not None:
        verdicts = judge(model, comparisons)
        labels["judge"] = verdicts.labels
        for what in ("first_preferred", "same_in_both_orders"):
            value, error = getattr(verdicts, what)
            print(f"judge_{what}", with_error(value, error, 3))
    print("\n".join(describe(agreements([each.labels for each in comparisons], labels))))


def score_rows(loaded: LoadedModel, name: str, *, rename: Sequence[str], output: Path | None) -> None:
    """Score a source, write its rows with their rewards to `output`, and print means."""
    template, longest = checkpoint_template(loaded), loaded.model.config.max_length
    rows, dropped = read_rows(name, template, longest=longest, rename=rename)
    rewards = score(loaded, [ids for row in rows for ids in row.sequences])
    ends = np.cumsum([len(row.sequences) for row in rows])
    by_row = np.split(rewards, ends[:-1])
    if output is not None:
        metrics = loaded.metadata.get("metrics") or {}  # none where an evaluation was interrupted
        with naming(output), output.open("w") as file:
            for row, values in zip(rows, by_row, strict=True):
                file.write(
                    json.dumps(row.record | reward_columns(values, metrics), default=json_value) + "\n"
                )
    prompts = numbered(tuple(row.sequences[0][: row.prompt_length]) for row in rows)
    value, error = mean(rewards.astype(np.float64), np.repeat(prompts, [len(row.sequences) for row in rows]))
    print(f"{len(rows)} rows scored, {dropped} left out; reward {with_error(value, error, 4)}")
    pairs = [(row, values) for row, values in zip(rows, by_row, strict=True) if len(values) == 2]
    if pairs:
        lengths = [[len(ids) - row.prompt_length for ids in row.sequences] for row, _ in pairs]
        zeros = np.zeros((len(pairs), 2))
        scores = np.stack([values for _, values in pairs])
        is_pair_row = np.array([len(row.sequences) == 2 for row in rows])
        table = reward_metrics(
            PairScores(scores, np.array(lengths), zeros[:, 0], zeros, prompts[is_pair_row])
        )
        for name in (
            "accuracy",
            "accuracy_longer_chosen",
            "accuracy_shorter_chosen",
            "length_baseline",
            "longer_preferred",
        ):
            print(name, with_error(table[f"eval/{name}"], table[f"eval/{name}_se"], 3))


def with_error(value: float, error: float, digits: int) -> str:
    """A mean with its standard error, where there is one."""
    if np.isnan(value):
        return "unknown, no row has it"
    return f"{value:.{digits}f}" + (
        f" ± {error:.{digits}f}" if error > 0 else " (one prompt, or all equal: no error)"
    )


def reward_columns(values: np.ndarray, metrics: Mapping[str, float]) -> dict[str, float]:
    """The columns that a row gets: its rewards, as they are and standardized by the validation's."""
    level, spread = metrics.get("eval/reward_mean", 0.0), metrics.get("eval/reward_std", 1.0) or 1.0
    names = ["reward"] if len(values) == 1 else ["chosen_reward", "rejected_reward"]
    columns = {name: float(value) for name, value in zip(names, values, strict=True)}
    return columns | {f"{name}_normalized": (x - level) / spread for name, x in columns.items()}
