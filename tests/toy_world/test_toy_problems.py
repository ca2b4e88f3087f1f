"""Problems of the toy world as rows: their levels, and splits by their equations."""

import re
from collections import Counter

import pytest

from jaxllm.toy_world import addition_row, additions, chats, problem_row, problems
from jaxllm.toy_world.problems import Equation

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return list(problems("train", count=2000, seed=0))


@pytest.fixture(scope="module")
def validation() -> list[dict]:
    return list(problems("validation", count=500, seed=0))


def test_a_problem_does_not_depend_on_the_others(train):
    assert problem_row("train", 1234, seed=0) == train[1234]
    other_seed = problems("train", count=100, seed=1)
    assert sum(row["answer"] == other["answer"] for row, other in zip(train, other_seed, strict=False)) < 20
    with pytest.raises(ValueError, match="'test' does not exist"):
        problem_row("test", 0, seed=0)


def test_the_working_ends_in_the_answer(train, validation):
    for row in train + validation:
        assert row["working"].endswith(f" The answer is {row['answer']}."), row
        assert EQUATION.findall(row["working"])[-1][-1] == row["answer"], row


def test_levels_are_one_digit_then_longer_numbers_then_two_steps(train):
    for row in train:
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        if row["level"] == 1:
            assert len(numbers) == 2, row
            assert max(numbers) < 10, row
        elif row["level"] == 2:
            assert len(numbers) == 2, row
            assert max(numbers) >= 10, row
        else:
            assert len(numbers) == 3, row
            assert "Then we need" in row["working"], row


def test_the_levels_of_a_split_are_equally_frequent(train, validation):
    assert all(0.29 < count / len(train) < 0.38 for count in Counter(row["level"] for row in train).values())
    assert Counter(row["level"] for row in train).keys() == {1, 2, 3}
    assert Counter(row["level"] for row in validation).keys() == {2, 3}


def test_the_equations_of_word_problems_are_in_the_split_of_their_row(train, validation):
    for rows, split in ((train, "train"), (validation, "validation")):
        for row in rows:
            asked = re.findall(r"(\d+) ([-+*]) (\d+)\. ", row["working"].replace("need", ""))
            for a, sign, b in (each for each in asked if "We need" in row["working"]):
                assert Equation(int(a), sign, int(b)).split == split, row


def test_chats_have_the_same_wordings_of_problems(train):
    def wording(text: str) -> str:
        return re.sub(r"\d+", "N", text)

    asked = {
        wording(message["content"])
        for row in chats("train", count=8000, seed=0)
        for message in row["messages"]
    }
    sums = [row for row in train if re.search(r"\d [-+*] \d", row["prompt"])]
    assert len(sums) > 300
    assert sum(wording(row["prompt"]) in asked for row in sums) / len(sums) > 0.8


@pytest.mark.parametrize("split", ["train", "validation"])
def test_additions_are_of_two_numbers_one_of_them_long_and_of_their_split(split):
    rows = list(additions(split, count=500, seed=0))
    for row in rows:
        a, b = (int(number) for number in re.search(r"(\d+) \+ (\d+)", row["prompt"]).groups())
        assert row["answer"] == str(a + b)
        assert max(a, b) >= 10
        assert split == "train" or Equation(a, "+", b).split == "validation"
        assert row["working"].endswith(f" The answer is {a + b}.")
    assert addition_row(split, 123, seed=0) == rows[123]


def test_no_addition_is_in_both_splits():
    train, held_out = (
        {row["prompt"] for row in additions(split, count=3000, seed=0)} for split in ("train", "validation")
    )
    assert not train & held_out
