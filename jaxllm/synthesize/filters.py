"""Which rows are kept, and why the others are not: each reason is counted."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.data.held_out import text_key
from jaxllm.data.sources import BadRow, open_source
from jaxllm.errors import ConfigError, DataError
from jaxllm.synthesize.config import FiltersConfig
from jaxllm.synthesize.judge import extremes

REFUSAL_WITHIN = 100  # characters from the start of an answer
MIN_COPIED_WORDS = 5  # a shorter instruction may stand in a good answer
SHINGLE_WORDS = 3  # by which near-duplicates are compared
_IDEOGRAMS = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each is a word
_WORD = re.compile(rf"[{_IDEOGRAMS}]|[^\W{_IDEOGRAMS}]+")

Row = dict[str, Any]  # of rows.jsonl
Answer = dict[str, Any]  # "text", "ended", "score"


class Kept(NamedTuple):
    """A row that is kept: its best answer and, where there is a pair, its worst."""

    row: Row
    best: int
    worst: int | None


class Selection(NamedTuple):
    """What the filters leave."""

    kept: list[Kept]
    answers: Counter[str]  # answers dropped, by reason
    rows: Counter[str]  # rows dropped, by reason
    pairs: Counter[str]  # kept rows without a pair, by reason


def select(rows: Sequence[Row], config: FiltersConfig, *, judged: bool, overlaps: "Overlaps") -> Selection:
    """The rows that pass. Each dropped answer, row and pair is counted under its first reason."""
    is_duplicate = duplicate_finder(config.near_duplicates)
    found = Selection([], Counter(), Counter(), Counter())
    for row in rows:
        usable = []
        for i, answer in enumerate(row["answers"]):
            if problem := answer_problem(row["instruction"], answer, config, judged):
                found.answers[problem] += 1
            else:
                usable.append(i)
        best = max(usable, key=lambda i: row["answers"][i]["score"] or 0.0, default=None)
        if problem := row["problem"] or row_problem(row, best, config, overlaps, is_duplicate):
            found.rows[problem] += 1
            continue
        assert best is not None
        worst = pair_of(row, usable, config)
        if isinstance(worst, str):
            found.pairs[worst] += 1
        found.kept.append(Kept(row, best, None if isinstance(worst, str) else worst))
    return found


def answer_problem(instruction: str, answer: Answer, config: FiltersConfig, judged: bool) -> str | None:
    """Why an answer is dropped."""
    text, (low, high) = answer["text"], config.answer_length
    if config.must_end and not answer["ended"]:
        return "cut off, without a stop token"
    if not low <= len(text) <= high:
        return "length outside filters.answer_length"
    if refuses(text, config.refusals):
        return "refusal"
    if config.copies and copies(instruction, text):
        return "copy of the instruction"
    return "no score" if judged and answer["score"] is None else None


def row_problem(
    row: Row,
    best: int | None,
    config: FiltersConfig,
    overlaps: "Overlaps",
    is_duplicate: Callable[[str], bool],
) -> str | None:
    """Why a row is dropped. Only what passes all other filters makes later rows duplicates."""
    if best is None:
        return "no answer left"
    answer = row["answers"][best]
    if config.min_score is not None and answer["score"] < config.min_score:
        return "best score below filters.min_score"
    if overlaps(row["instruction"], answer["text"]):
        return "overlap with an evaluation set"
    return "duplicate" if is_duplicate(row["instruction"]) else None


def pair_of(row: Row, usable: Sequence[int], config: FiltersConfig) -> int | str:
    """The worst usable answer; or why there is no pair."""
    answers = row["answers"]
    pair = extremes([answer["score"] if i in usable else None for i, answer in enumerate(answers)])
    if pair is None:
        return "answers of equal score"
    best, worst = pair
    if answers[best]["score"] - answers[worst]["score"] < config.min_margin:
        return "margin below filters.min_margin"
    if answers[best]["text"] == answers[worst]["text"]:
        return "identical answers"
    if "verdicts" in row and (row["compared"] != [best, worst] or row["verdicts"] != [best, best]):
        return "judge does not prefer the best answer in both orders"
    return worst


def words(text: str) -> list[str]:
    """The words of a text, case folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def refuses(text: str, phrases: Sequence[str]) -> bool:
    """Whether an answer begins with a refusal."""
    start = f" {' '.join(words(text[:REFUSAL_WITHIN]))} "
    return any(f" {' '.join(words(phrase))} " in start for phrase in phrases)


def copies(instruction: str, answer: str) -> bool:
    """Whether an answer repeats the whole instruction, or is part of it."""
    asked, given = (f" {' '.join(words(text))} " for text in (instruction, answer))
    return given in asked if len(asked.split()) < MIN_COPIED_WORDS else given in asked or asked in given


# Duplicates


def check_near_duplicates(threshold: float | None) -> None:
    """ConfigError where the library is missing that finds near-duplicates."""
    if threshold is not None:
        try:
            import datasketch  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"filters.near_duplicates={threshold} needs datasketch: pip install 'jaxllm[synthesize]', or "
                "set filters.near_duplicates=none for exact duplicates alone"
            ) from None


def duplicate_finder(threshold: float | None) -> Callable[[str], bool]:
    """A function that says whether a text is one that it was called with before, but for case and blanks; or
    one whose shingles have at least this Jaccard similarity, as MinHash estimates it."""
    seen: set[int] = set()
    near = (lambda text: False) if threshold is None else near_duplicate_finder(threshold)

    def is_duplicate(text: str) -> bool:
        key = text_key(text)
        if key in seen:
            return True
        seen.add(key)
        return near(text)

    return is_duplicate


def near_duplicate_finder(threshold: float) -> Callable[[str], bool]:
    """The part of `duplicate_finder` that needs datasketch."""
    from datasketch import MinHash, MinHashLSH

    index, number = MinHashLSH(threshold=threshold), 0
    hashes = {}

    def is_near_duplicate(text: str) -> bool:
        nonlocal number
        minhash = MinHash()
        minhash.update_batch([" ".join(gram).encode() for gram in grams(words(text), SHINGLE_WORDS)])
        if any(minhash.jaccard(hashes[found]) >= threshold for found in index.query(minhash)):
            return True
        index.insert(number, minhash)
        hashes[number], number = minhash, number + 1
        return False

    return is_near_duplicate


def grams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All n words in a row; of a shorter text all its words."""
    for start in range(max(1, len(tokens) - n + 1)):
        yield tuple(tokens[start : start + n])


# Decontamination


class Overlaps:
    """The evaluation sets that no row may overlap with: `n` words in a row of any of their texts, or the
    whole of a shorter text as an instruction (GPT-3 compared 13 words, arXiv:2005.14165)."""

    def __init__(self, names: Sequence[str], n: int, *, seed: int, synthetic_rows: int = 1000):
        """Raises DataError where a set cannot be read."""
        self.n = n
        self.grams: set[tuple[str, ...]] = set()
        for name in names:
            try:
                source = open_source(
                    name, split="validation", text_key=None, synthetic_rows=synthetic_rows, seed=seed
                )
            except DataError as error:
                raise DataError(f"filters.evaluation_sets: {error}") from None
            for row in source.rows():
                if row.value is None:
                    raise DataError(
                        f"filters.evaluation_sets: {row.where}: {BadRow(row.problem, row.detail)}"
                    )
                for text in texts_of(row.value):
                    self.grams.update(grams(words(text), n))
        self.grams.discard(())

    def __call__(self, instruction: str, answer: str) -> bool:
        """Whether a row overlaps with a set. An answer of fewer than `n` words never does."""
        asked, given = words(instruction), words(answer)
        found = {*grams(asked, self.n), *(grams(given, self.n) if len(given) >= self.n else ())}
        return not self.grams.isdisjoint(found)


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from texts_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each)
