"""The toy world: reproducible rows, consistent facts, correct sums, splits that never overlap."""

import operator
import os
import random
import re
import statistics
import subprocess
import sys
from collections import defaultdict

import pytest

from jaxllm.toy_world import (
    build_world,
    document,
    documents,
    fact,
    split_of,
    sum_problem,
    word_problem,
)
from jaxllm.toy_world.documents import MIXTURE, write
from jaxllm.toy_world.facts import relations
from jaxllm.toy_world.language import passages, spin
from jaxllm.toy_world.lexicon import ANIMALS, JOBS, THINGS
from jaxllm.toy_world.problems import Equation

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(documents("train", count=4000, seed=0))


@pytest.fixture(scope="module")
def validation() -> list[str]:
    return list(documents("validation", count=500, seed=0))


def test_every_process_generates_the_same_rows():
    program = (
        "import hashlib; from jaxllm.toy_world import chats, documents, preferences, problems\n"
        "rows = [row for write in (chats, documents, preferences, problems)"
        " for split in ('train', 'validation') for row in write(split, count=60, seed=3)]\n"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    hashes = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert ran.stdout, ran.stderr
        hashes.add(ran.stdout)
    assert len(hashes) == 1


def test_a_document_does_not_depend_on_the_others(train):
    for index in (3999, 0, 17):
        assert document("train", index, seed=0) == train[index]
    assert list(documents("train", count=20, seed=0)) == train[:20]


def test_another_seed_is_another_world(train):
    assert document("train", 0, seed=1) != train[0]
    homes = [{person.name: person.town.name for person in build_world(seed).people} for seed in (0, 1)]
    assert homes[0].keys() == homes[1].keys()
    assert homes[0] != homes[1]


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'test' does not exist; use one of train, validation"):
        document("test", 0, seed=0)


def test_no_document_is_in_both_splits_or_twice_in_one(train, validation):
    assert {split_of(text) for text in train} == {"train"}
    assert {split_of(text) for text in validation} == {"validation"}
    assert len(set(train + validation)) == len(train) + len(validation)


def test_documents_are_of_readable_length(train):
    words = [len(text.split()) for text in train]
    assert 70 <= statistics.mean(words) <= 100
    assert statistics.fmean(40 <= count <= 200 for count in words) > 0.9


def test_every_equation_is_right(train, validation):
    equations = [match.groups() for text in train + validation for match in EQUATION.finditer(text)]
    assert len(equations) > 5000
    assert {sign for _, sign, _, _ in equations} == set(OPERATIONS)
    assert [
        each for each in equations if OPERATIONS[each[1]](int(each[0]), int(each[2])) != int(each[3])
    ] == []


def test_no_equation_of_validation_is_solved_in_training(train, validation):
    asked = {
        match.groups() for text in validation for match in re.finditer(r"So (\d+) ([-+*]) (\d+) =", text)
    }
    solved = {match.groups()[:3] for text in train for match in EQUATION.finditer(text)}
    solved |= {(b, sign, a) for a, sign, b in solved if sign != "-"}
    assert len(asked) > 100
    assert len(solved) > 2000
    assert asked & solved == set()


def test_every_problem_uses_equations_of_its_split():
    world = build_world(0)
    for split in ("train", "validation"):
        rng = random.Random(split)
        problems = [sum_problem(rng, split) for _ in range(100)]
        problems += [word_problem(world, rng, split) for _ in range(200)]
        assert {equation.split for problem in problems for equation in problem.equations} == {split}


def test_the_working_leads_from_the_numbers_of_a_problem_to_its_answer():
    world, rng = build_world(0), random.Random(0)
    for _ in range(300):
        for problem in (sum_problem(rng, "train"), word_problem(world, rng, "train")):
            known = {int(number) for number in re.findall(r"\d+", problem.question)}
            for equation in problem.equations:
                assert {equation.a, equation.b} <= known, problem
                assert f"{equation}." in problem.working
                known.add(equation.result)
            assert re.findall(r"\d+", problem.working)[-1] == problem.answer == str(equation.result)


@pytest.mark.parametrize(
    ("equation", "working"),
    [
        (Equation(37, "+", 25), "30 + 20 = 50. 7 + 5 = 12. 50 + 12 = 62. So 37 + 25 = 62."),
        (Equation(137, "+", 5), "7 + 5 = 12. 130 + 12 = 142. So 137 + 5 = 142."),
        (Equation(62, "-", 25), "62 - 20 = 42. 42 - 5 = 37. So 62 - 25 = 37."),
        (Equation(23, "*", 4), "20 * 4 = 80. 3 * 4 = 12. 80 + 12 = 92. So 23 * 4 = 92."),
        (Equation(62, "-", 20), "62 - 20 = 42."),
        (Equation(30, "+", 5), "30 + 5 = 35."),
        (Equation(7, "*", 8), "7 * 8 = 56."),
    ],
)
def test_working_is_tens_first(equation, working):
    assert equation.working() == working


def test_every_step_of_a_working_is_in_the_training_split():
    whole = [Equation(a, sign, b) for a in range(2, 130) for b in range(2, a + 1) for sign in OPERATIONS]
    whole = [equation for equation in whole if equation.sign != "*" or equation.b < 10]
    assert {step.split for equation in whole for step in equation.steps()} == {"train"}
    held_out = sum(equation.split == "validation" for equation in whole)
    assert 0.1 < held_out / len(whole) < 0.2


def test_facts_are_the_same_in_every_text(train, validation):
    patterns = {
        "home": r"\b([A-Z]\w+) lives in (\w+)",
        "age": r"\b([A-Z]\w+) is (\d+) years old",
        "pet": r"\b([A-Z]\w+) has a (\w+ (?:called|named) \w+)",
        "friend": r"\b([A-Z]\w+) is the best friend of (\w+)",
        "market": r"\b([A-Z]\w+) has a market every (\w+)",
        "product": r"\b([A-Z]\w+) is known for its ([a-z ]+)",
        "material": r"\b[Aa]n? (\w+) is made of (\w+)",
    }
    world = build_world(0)
    names = {entity.name for entity in (*world.people, *world.towns, *THINGS)}
    found = defaultdict(set)
    for text in train + validation:
        for relation, pattern in patterns.items():
            for subject, value in re.findall(pattern, text):
                if subject in names:
                    found[relation, subject].add(value.replace("named", "called"))
    assert {key: values for key, values in found.items() if len(values) > 1} == {}
    for person in world.people:
        assert found["home", person.name] == {person.town.name}
        assert found["age", person.name] == {str(person.age)}
        assert found["pet", person.name] == {f"{person.pet} called {person.pet_name}"}
    for town in world.towns:
        assert found["market", town.name] == {town.market_day}


def test_best_friendship_is_mutual():
    people = {person.name: person for person in build_world(0).people}
    assert len(people) == 48
    for name, person in people.items():
        assert person.friend != name
        assert people[person.friend].friend == name
        assert (person.job.name == "pupil") == (people[person.friend].job.name == "pupil")


def test_every_fact_has_a_question_and_a_statement():
    world, rng = build_world(0), random.Random(0)
    for entity in (*world.people, *world.towns, *THINGS, *ANIMALS, *JOBS):
        for relation in relations(entity):
            question, answer, statement = fact(entity, relation, rng)
            assert question.endswith("?")
            assert entity.name in question
            assert entity.name in statement
            assert statement.endswith(".")
            assert answer


def test_no_two_things_have_the_same_weight():
    # Stories ask which of two things is heavier.
    assert len({thing.grams for thing in THINGS}) == len(THINGS)


@pytest.mark.parametrize("kind", MIXTURE)
def test_documents_are_correct_english(kind):
    world = build_world(0)
    for index in range(200):
        text = write(kind, world, random.Random(index), "train")
        assert text.isascii()
        assert text == text.strip()
        assert not re.search(r"[{}\[\]|]|None", text), text  # a template that was not filled in
        assert not re.search(r" {2}|\n\n| [,.?!]|[.,?!]{2}", text), text
        assert not re.search(r"\b[Aa] [aeiouAEIO]\w|\b[Aa]n (?!hour)[^aeiouAEIOUL]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text  # a word twice
        assert not re.search(r'(^|\n|[a-z][.?!] )"?[a-z]', text), text  # a sentence without a capital
        assert re.search(r'[.!?]"?$', text), text
        assert text.count('"') % 2 == 0, text


@pytest.mark.parametrize(
    "name", ["computers", "concepts", "facts", "frames", "problems", "procedures", "stories"]
)
def test_the_brackets_of_every_template_close(name):
    for line in (line for passage in passages(name) for line in passage):
        assert line.count("[") == line.count("]"), line


def test_spin_chooses_fills_in_and_tidies():
    assert spin("[a|a] {x} and a {y}[|]. he [ate|ate] it.", random.Random(0), x="egg", y="pear") == (
        "An egg and a pear. He ate it."
    )
    results = {spin("[b[e|i]d|bad]", random.Random(seed)) for seed in range(50)}
    assert results == {"Bed", "Bid", "Bad"}
