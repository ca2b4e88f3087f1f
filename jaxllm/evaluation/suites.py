"""Evaluation suites: files of questions in one format, and what a model makes of each question.

A row is a multiple-choice question (`prompt`, `choices`, `answer`), a question to be answered by generated
text (`prompt`, `answer`), or a text to predict (`text`). All rows of a suite are of one kind. Every question
has its scores, and every metric is a mean over questions, so that two models can be compared question by
question. The format: docs/how-to/evaluate.md.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from jaxllm.data.messages import Message
from jaxllm.data.prompts import PromptOptions, question_messages
from jaxllm.data.records import Record, Rename, json_value
from jaxllm.data.sources import BadRow, json_type, open_source
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.perplexity import ratio
from jaxllm.rewards.load import load_reward

Kind = Literal["choices", "answer", "text"]
PREFIX = "lm_eval:"  # of a task of lm-eval among suites
SUITES = "eval/suite/"  # with NAME/METRIC, a metric of a run
METRICS: dict[str, tuple[str, Literal["lowest", "highest"]]] = {  # unit, and which values are better
    "accuracy": ("fraction of questions", "highest"),
    "accuracy_normalized": ("fraction of questions", "highest"),
    "exact_match": ("fraction of completions", "highest"),
    "bits_per_byte": ("bits per byte", "lowest"),
}
_DEFAULT_CHECK = "exact_match"

Score = float | tuple[float, float] | None  # (numerator, denominator); None: unknown


class Question(NamedTuple):
    """One row of a suite."""

    id: str  # of its content: the same in the results of every model
    where: str  # file:line
    row: Mapping[str, Any]  # as it is, for the function that checks a completion
    messages: Sequence[Message] = ()  # of the prompt
    choices: Sequence[str] = ()
    answer: int = 0  # the index of the right choice
    text: str = ""


class Suite(NamedTuple):
    """Questions of one kind."""

    name: str
    kind: Kind
    questions: Sequence[Question]
    check: str = ""  # the reward function that gives 1 to a right completion


class Result(NamedTuple):
    """What a model made of one question."""

    id: str
    scores: dict[str, Score]  # by metric
    details: dict[str, Any]  # for people


class TaskResult(NamedTuple):
    """What was measured on one suite."""

    name: str
    metrics: dict[str, float]  # with NAME_se
    results: list[Result]


class Plain(NamedTuple):
    """Rows as the documented format has them: the options of suites that a config names."""

    rename: Sequence[str] = ()
    prompt_format: str | None = None
    system: str | None = None


def read_suites(
    sources: Sequence[str],
    options: PromptOptions = Plain(),  # noqa: B008 - immutable
    *,
    check: str = _DEFAULT_CHECK,
    max_rows: int | None = None,
    seed: int = 0,
) -> list[Suite]:
    """The suites of these sources, of each the first `max_rows` rows. `check` is for rows that name none.

    Raises DataError that names the file and line of a row that cannot be used, and ConfigError for two
    suites of one name or an unknown function.
    """
    if tasks := [source for source in sources if source.startswith(PREFIX)]:
        raise ConfigError(f"evaluation.suites: {tasks[0]} is measured by experiments/evaluate.py alone")
    suites = [read_suite(source, options, check, max_rows, seed) for source in sources]
    counts = Counter(suite.name for suite in suites)
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(f"{count} suites are called {name!r} by their file names: rename one of them")
    return suites


def read_suite(source: str, options: PromptOptions, check: str, max_rows: int | None, seed: int) -> Suite:
    """One suite, as in `read_suites`."""
    rename, seen = Rename(options.rename, "" if isinstance(options, Plain) else "--rename"), Counter[str]()
    questions: list[Question] = []
    first: tuple[Kind, str] | None = None
    opened = open_source(
        source, split="validation", text_key=None, synthetic_rows=max_rows or 1000, seed=seed
    )
    for row in itertools.islice(opened.rows(), max_rows):
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail)
            record = rename(row.value)
            found, question = read_question(record, row.where, options)
            kind = found, str(record.get("check") or check) if found == "answer" else ""
            first = first or kind
            if kind != first:
                shown = ", then ".join(f"{a!r} checked by {b!r}" if b else repr(a) for a, b in (first, kind))
                raise BadRow("a suite has rows of one kind, and one 'check'", f"{shown}: make two files")
        except BadRow as error:
            raise DataError(f"{row.where}: {rename.named(error)}") from None
        seen[question.id] += 1
        if (copies := seen[question.id]) > 1:
            question = question._replace(id=f"{question.id}-{copies}")
        questions.append(question)
    rename.check()
    if first is None:
        raise DataError(f"{source}: the suite has no rows")
    if first[1]:
        load_reward(first[1])
    return Suite(suite_name(source), first[0], questions, first[1])


def suite_name(source: str) -> str:
    """`arc_easy` of `folder/arc-easy.jsonl.gz`: what metrics and files of results are called by."""
    return re.sub(r"\W+", "_", Path(source).name.partition(".")[0]).strip("_")


def read_question(record: Mapping[str, Any], where: str, options: PromptOptions) -> tuple[Kind, Question]:
    """The question of a row, and its kind. Raises BadRow."""
    content = json.dumps({**record, "check": None}, sort_keys=True, default=json_value)
    question = Question(xxhash.xxh3_64_hexdigest(content.encode()), where, record)
    if "choices" in record:
        choices = record["choices"]
        if not isinstance(choices, list) or not all(map(is_text, choices)) or len(choices) < 2:
            raise BadRow(
                "wrong choices", "'choices' must be a list of at least two texts, none of them empty"
            )
        if len(set(choices)) < len(choices):
            raise BadRow("wrong choices", "two of the 'choices' are equal")
        answer, messages = right_choice(record, choices), question_messages(Record(record), options)[1]
        return "choices", question._replace(messages=messages, choices=choices, answer=answer)
    if "answer" in record:
        if record["answer"] in (None, [], ""):
            raise BadRow("wrong answer", f"'answer' is {json.dumps(record['answer'])}")
        return "answer", question._replace(messages=question_messages(Record(record), options)[1])
    if "text" in record:
        if not is_text(record["text"]):
            shown = "empty" if record["text"] == "" else f"{json_type(record['text'])}, not a text"
            raise BadRow("wrong text", f"'text' is {shown}")
        return "text", question._replace(text=record["text"])
    keys = ", ".join(record)
    raise BadRow("missing key", f"no 'choices', 'answer' or 'text' among {keys}; set data.rename=THEIRS=OURS")


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def right_choice(record: Mapping[str, Any], choices: Sequence[str]) -> int:
    """The index of the right choice: `answer` is the index, the choice or its letter. Raises BadRow."""
    if "answer" not in record:
        raise BadRow("missing key", f"no 'answer' among {', '.join(record)}")
    answer = record["answer"]
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and re.fullmatch(r"[A-Z]", answer):
        answer = ord(answer) - ord("A")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        shown = json.dumps(record["answer"])[:40]
        raise BadRow(
            "wrong answer",
            f"'answer' is {shown}; it must be one of {len(choices)} choices, its index from 0 or its letter",
        )
    return answer


# Metrics


def metrics(results: Sequence[Result]) -> dict[str, float]:
    """Each metric and, as NAME_se, its standard error over questions; unknown scores are left out."""
    row = {}
    for name in dict.fromkeys(name for result in results for name in result.scores):
        values = np.array([fraction for result in results if (fraction := as_ratio(result, name))])
        if len(values):
            row[name], row[f"{name}_se"] = ratio(*values.T)
    return row


def as_ratio(result: Result, name: str) -> tuple[float, float] | None:
    """A score as numerator and denominator; None where it is unknown."""
    score = result.scores.get(name)
    return score if score is None or isinstance(score, tuple) else (score, 1.0)


# Files of results


def write_results(file: Path, results: Sequence[Result]) -> None:
    """One JSON object a question."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": r.id, "scores": r.scores, **r.details}, default=json_value) for r in results)
    file.write_text("".join(f"{line}\n" for line in lines))


def read_results(file: Path) -> Iterator[Result]:
    """What `write_results` wrote. Raises ValueError for another file."""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("scores"), dict):
            raise ValueError("not the results of a suite")
        scores = {name: tuple(x) if isinstance(x, list) else x for name, x in row["scores"].items()}
        yield Result(row["id"], scores, {})
