"""Each filter drops what it is for and counts it under its reason; the rest is kept."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from jaxllm.config import load_config, parse
from jaxllm.errors import ConfigError, DataError
from jaxllm.synthesize import filters
from jaxllm.synthesize.config import SynthesizeConfig
from jaxllm.synthesize.filters import Overlaps, duplicate_finder, select

FILE = Path(__file__).parents[2] / "configs" / "synthesize.py"
CONFIG = parse(SynthesizeConfig, load_config(str(FILE))).filters
CONFIG = dataclasses.replace(CONFIG, near_duplicates=None, answer_length=(2, 60))
QUESTION = "Why does the sea look blue on a clear day?"


def answer(text, score=0.0, ended=True):
    return {"text": text, "ended": ended, "score": score}


def row(*answers, instruction=QUESTION, number=0, **more):
    return {"row": number, "instruction": instruction, "problem": None, "answers": list(answers), **more}


GOOD, WORSE = answer("Water takes the red light away.", 1.0), answer("Blue paint.", -1.0)


def selected(*rows, evaluation=(), judged=True, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return select(rows, config, judged=judged, overlaps=Overlaps(evaluation, config.overlap_words, seed=0))


def test_the_best_and_the_worst_usable_answers_are_kept():
    bad = answer("I cannot say.", 5.0)
    worst = answer("I cannot.", -5.0)
    found = selected(row(bad, WORSE, GOOD, answer("Because of the sky above it.", 0.5), worst))
    (kept,) = found.kept
    assert (kept.best, kept.worst) == (2, 1)
    assert found.answers == {"refusal": 2}
    assert not found.rows
    assert not found.pairs


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (answer("Light is scattered", ended=False), "cut off, without a stop token"),
        (answer("."), "length outside filters.answer_length"),
        (answer("blue " * 20), "length outside filters.answer_length"),
        (answer("Well, I’m sorry, but as an AI I do not know."), "refusal"),
        (answer("WHY does the sea look blue on a clear day"), "copy of the instruction"),
        (answer("You ask: " + QUESTION), "copy of the instruction"),
        (answer("the sea look blue"), "copy of the instruction"),
        (answer("A fine answer.", score=None), "no score"),
    ],
)
def test_a_dropped_answer_is_counted_under_its_reason(bad, reason):
    found = selected(row(bad), row(bad, GOOD))
    assert found.answers == {reason: 2}
    assert found.rows == {"no answer left": 1}
    assert [kept.best for kept in found.kept] == [1]


@pytest.mark.parametrize(
    "fine",
    [
        answer("The sea is blue, I cannot deny it." + " It is. " * 3),
        answer("Sorry to hear that you cannot see it."),
    ],
)
def test_an_answer_that_is_no_refusal_is_kept(fine):
    long_before = answer("x" * 101 + " I cannot say more.")
    assert selected(row(fine), answer_length=(1, 500), refusals=("as an ai",)).kept
    assert selected(row(long_before), answer_length=(1, 500)).kept


def test_a_short_instruction_may_stand_in_its_answer():
    assert selected(row(answer("What is rain? It is water."), instruction="What is rain?")).kept


@pytest.mark.parametrize(
    ("bad", "changes", "reason"),
    [
        (row(instruction="x", problem="instruction cut off"), {}, "instruction cut off"),
        (row(GOOD), {"min_score": 1.5}, "best score below filters.min_score"),
    ],
)
def test_a_dropped_row_is_counted_under_its_reason(bad, changes, reason):
    found = selected({**bad}, **changes)
    assert (found.kept, found.rows) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("pair", "changes", "reason"),
    [
        ((GOOD, dict(WORSE, score=1.0)), {}, "answers of equal score"),
        ((GOOD, WORSE), {"min_margin": 2.5}, "margin below filters.min_margin"),
        ((GOOD, dict(GOOD, score=0.5)), {}, "identical answers"),
    ],
)
def test_a_row_without_a_pair_is_kept_and_counted(pair, changes, reason):
    found = selected(row(*pair), **changes)
    assert [kept.worst for kept in found.kept] == [None]
    assert found.pairs == {reason: 1}


@pytest.mark.parametrize(
    ("verdicts", "worst"), [([0, 0], 1), ([0, 1], None), ([1, 1], None), ([0, None], None)]
)
def test_a_judge_must_prefer_the_best_answer_in_both_orders(verdicts, worst):
    found = selected(row(GOOD, WORSE, compared=[0, 1], verdicts=verdicts))
    assert [kept.worst for kept in found.kept] == [worst]
    assert found.pairs.total() == (worst is None)


def test_without_a_judge_the_first_usable_answer_is_kept():
    unscored = [dict(each, score=None) for each in (answer("I cannot say."), WORSE, GOOD)]
    (kept,) = selected(row(*unscored), judged=False).kept
    assert (kept.best, kept.worst) == (1, None)


# Duplicates


def test_exact_duplicates_differ_in_case_and_blanks_alone():
    is_duplicate = duplicate_finder(None)
    texts = ("What is rain?", " what is  RAIN? ", "What is snow?")
    assert list(map(is_duplicate, texts)) == [False, True, False]


def test_a_row_that_is_dropped_makes_no_other_a_duplicate():
    found = selected(row(answer("I cannot say.")), row(GOOD), row(GOOD))
    assert found.rows == {"no answer left": 1, "duplicate": 1}
    assert len(found.kept) == 1


def test_near_duplicates_are_found_by_their_shingles():
    pytest.importorskip("datasketch", reason="near-duplicates need the extra synthesize")
    text = "Explain in simple words to a small child why the sea looks blue on a clear and sunny day"
    is_duplicate = duplicate_finder(0.6)
    assert not is_duplicate(text)
    assert is_duplicate(text + "!")
    assert is_duplicate(f"{text}, please")  # 17 of 18 shingles
    assert not is_duplicate("Explain in simple words to a small child how a bridge carries a heavy train")
    assert not is_duplicate("Rain?")


def test_a_missing_library_is_an_error_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxllm\[synthesize\]', or set filters.near_dupl"):
        filters.check_near_duplicates(0.7)
    filters.check_near_duplicates(None)


# Decontamination


@pytest.fixture
def benchmark(tmp_path):
    """A file whose question has 15 words, and one of 4."""
    path = tmp_path / "benchmark.jsonl"
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    rows = [
        {"messages": [{"role": "user", "content": long}], "id": 7},
        {"prompt": "How high is it?", "answer": "9"},
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


THIRTEEN = "Two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, FOURTEEN."


@pytest.mark.parametrize(
    ("instruction", "text", "overlaps"),
    [
        (THIRTEEN, "Yes.", True),
        ("Say it.", f"Here: {THIRTEEN}", True),
        (THIRTEEN.replace("eight", "8"), "Yes.", False),
        (" ".join(THIRTEEN.split()[1:]), "Yes.", False),  # 12 words
        ("how high is it", "Ten.", True),
        ("how high is it now", "Ten.", False),
        ("Read this number.", "9", False),  # a short answer may be any answer
    ],
)
def test_a_row_overlaps_by_thirteen_words_or_as_a_whole_instruction(benchmark, instruction, text, overlaps):
    found = selected(
        row(answer(text), instruction=instruction), evaluation=[str(benchmark)], answer_length=(1, 200)
    )
    assert found.rows == ({"overlap with an evaluation set": 1} if overlaps else {})


def test_words_without_spaces_between_them_count_one_by_one():
    assert filters.words("天气 is A.I.") == ["天", "气", "is", "a", "i"]


@pytest.mark.parametrize(
    ("content", "message"), [("", "x.jsonl:1: empty file"), ('{"text": "a"}\n{"text": "cut', "x.jsonl:2: ")]
)
def test_an_evaluation_set_that_cannot_be_read_whole_is_an_error(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=f"filters.evaluation_sets: .*{message}"):
        Overlaps([str(tmp_path / "x.jsonl")], 13, seed=0)


def test_a_missing_evaluation_set_is_an_error_that_names_the_field(tmp_path):
    with pytest.raises(DataError, match=r"filters.evaluation_sets: .*none.jsonl' does not exist"):
        Overlaps([str(tmp_path / "none.jsonl")], 13, seed=0)
