"""Chats of the toy world: correct answers that follow system messages, splits that share no prompt."""

import json
import operator
import random
import re
from collections import Counter

import pytest

from jaxllm.toy_world import build_world, chat, chats, split_of
from jaxllm.toy_world.exchanges import conversation
from jaxllm.toy_world.language import frames, passages, table

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return list(chats("train", count=4000, seed=0))


@pytest.fixture(scope="module")
def validation() -> list[dict]:
    return list(chats("validation", count=800, seed=0))


def prompt(row: dict) -> str:
    """The system message, if any, and the first question."""
    system, first = "", row["messages"][0]
    if first["role"] == "system":
        system, first = first["content"], row["messages"][1]
    return f"{system}\n{first['content']}"


def contents(row: dict, role: str) -> list[str]:
    """The contents of the messages with this role."""
    return [message["content"] for message in row["messages"] if message["role"] == role]


def test_a_row_does_not_depend_on_the_others_and_is_json(train):
    for index in (3999, 0, 17):
        assert chat("train", index, seed=0) == train[index] == json.loads(json.dumps(train[index]))
    assert chat("train", 0, seed=1) != train[0]
    with pytest.raises(ValueError, match="'test' does not exist; use one of train, validation"):
        chat("test", 0, seed=0)


def test_user_and_assistant_take_turns_after_at_most_one_system_message(train):
    for row in train:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 3


def test_three_in_four_chats_are_single_turns_and_one_in_six_has_a_system_message(train):
    single = sum(len(contents(row, "user")) == 1 for row in train) / len(train)
    system = sum(bool(contents(row, "system")) for row in train) / len(train)
    assert 0.70 < single < 0.80
    assert 0.14 < system < 0.19


def test_no_prompt_is_in_both_splits(train, validation):
    assert {split_of(prompt(row)) for row in train} == {"train"}
    assert {split_of(prompt(row)) for row in validation} == {"validation"}


def test_no_equation_of_validation_is_solved_in_training(train, validation):
    asked = {
        match.groups()
        for row in validation
        for text in contents(row, "assistant")
        for match in re.finditer(r"So (\d+) ([-+*]) (\d+) =", text)
    }
    solved_in_training = {
        match.groups()[:3]
        for row in train
        for text in contents(row, "assistant")
        for match in EQUATION.finditer(text)
    }
    solved_in_training |= {(b, sign, a) for a, sign, b in solved_in_training if sign != "-"}
    assert len(asked) > 100
    assert asked & solved_in_training == set()


def test_sums_are_correct_and_end_in_the_answer(train):
    num_problems = 0
    for row in train:
        for question, text in zip(contents(row, "user"), contents(row, "assistant"), strict=True):
            equations = EQUATION.findall(text)
            for a, sign, b, result in equations:
                assert OPERATIONS[sign](int(a), int(b)) == int(result), text
            if equations:
                num_problems += 1
                (answer,) = re.findall(r"the answer is (\d+)\.", text, flags=re.IGNORECASE)
                assert answer == equations[-1][-1], (question, text)
    assert num_problems > 500


@pytest.mark.parametrize(
    ("system", "follows"),
    [
        ("in one word", lambda text, system: re.fullmatch(r"\w+\.", text)),
        ("in one sentence", lambda text, system: re.fullmatch(r"[^.!?]+[.!?]", text)),
        ("in capital letters", lambda text, system: text == text.upper()),
        ("Have a nice day!", lambda text, system: text.endswith(" Have a nice day!")),
        ("You talk to", lambda text, system: text.startswith(re.search(r"talk to (\w+)", system)[1])),
    ],
)
def test_every_turn_follows_the_system_message(train, system, follows):
    rows = [row for row in train if any(system in message for message in contents(row, "system"))]
    assert len(rows) > 80
    for row in rows:
        (message,) = contents(row, "system")
        assert all(follows(text, message) for text in contents(row, "assistant")), row


def test_there_are_five_kinds_of_system_messages(train):
    kinds = Counter(re.sub(r"to \w+", "to", text)[-12:] for row in train for text in contents(row, "system"))
    assert len(kinds) == 5, kinds


def test_facts_are_those_of_the_world(train):
    homes = {person.name: person.town.name for person in build_world(0).people}
    asked = 0
    for row in train:
        for question, text in zip(contents(row, "user"), contents(row, "assistant"), strict=True):
            if found := re.search(r"Where does ([A-Z]\w+) live\?", question):
                asked += 1
                assert homes[found[1]].lower() in text.lower(), row
    assert asked > 10


def solved(question: str) -> str:
    """A line of the answer to a task on a list or a sentence, computed from the question alone."""
    task, _, rest = question.partition(": ")
    items = rest.rstrip(".").split(", ")
    if re.search("everse|backwards|around", task):
        return ", ".join(reversed(items))
    if re.search("Sort|numbers|smallest", task):
        return ", ".join(sorted(items, key=int))
    if "capital" in task:
        return rest.upper()
    names = re.match(r"Replace (?P<old>\w+) with (?P<new>\w+)|Change the name (\w+) to (\w+)", task)
    old, new = [name for name in names.groups() if name]
    return rest.replace(old, new)


def test_answers_to_small_tasks_are_correct(train):
    pattern = (
        r"(Reverse this list|Write this list backwards|Sort these|Write this in capital|Replace|Change the)"
    )
    solved_tasks = Counter()
    for row in train:
        question, text = contents(row, "user")[0], contents(row, "assistant")[0]
        if not contents(row, "system") and (found := re.match(pattern, question)):
            solved_tasks[found[1]] += 1
            assert solved(question) in text, row
        if not contents(row, "system") and question.startswith("How many words are in this sentence? "):
            solved_tasks["count"] += 1
            assert f" {len(question.split('? ')[1].split())} " in text, row
    assert len(solved_tasks) == 7, solved_tasks


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_reference_answer_has_the_key_and_no_rival(split):
    world, rng = build_world(0), random.Random(0)
    num_keys = 0
    for _ in range(3000):
        for exchange in conversation(world, rng, split):
            num_keys += bool(exchange.key)
            assert exchange.key in exchange.answer, exchange
            assert exchange.key not in exchange.rivals, exchange
            words = f" {exchange.answer.rstrip('.')} "
            assert not [rival for rival in exchange.rivals if f" {rival} " in words], exchange
    assert num_keys > 1500


def test_chats_are_correct_english(train, validation):
    for row in train + validation:
        for message in row["messages"]:
            text = message["content"]
            assert text.isascii()
            assert text == text.strip()
            assert not re.search(r"[{}\[\]|]|None", text), text  # a template that was not filled in
            assert not re.search(r" {2}|\n\n| [,?!]|[,?!]{2}|[^.]\.\.[^.]", text), text
            assert not re.search(r"\b[Aa] [aeiou]\w|\b[Aa]n (?!hour)[^aeiouAEIOUL]", text), text
            assert not re.search(r"\b([a-z]+) \1\b", text), text  # a word twice
            assert not re.search(r"(^|\n|[a-z][.?!] )[a-z]", text), text  # a sentence without a capital
            assert re.search(r'[.!?]"?$', text), text


@pytest.mark.parametrize("name", ["chats", "tales"])
def test_the_brackets_of_every_chat_template_close(name):
    for line in (line for passage in passages(name) for line in passage):
        assert line.count("[") == line.count("]"), line


def test_every_passage_has_the_format_that_its_reader_expects():
    assert all(len(row) == 2 for row in table("sentences"))
    for _, _, *asked in passages("tales"):
        assert len(asked) >= 2
        assert all(line.count(" | ") == 2 for line in asked)
    titles = [title for title, *_ in passages("chats")]
    assert set(titles) <= frames().keys()
    assert not set(titles) & {title for title, *_ in passages("frames")}
