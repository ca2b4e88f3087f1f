"""Preferences of the toy world, and the rubric that labels them."""

import json
import random
import statistics

import pytest

from jaxllm.toy_world import (
    build_world,
    chats,
    correct,
    draft,
    drafts,
    preference,
    preferences,
    rubric,
    split_of,
)
from jaxllm.toy_world.exchanges import conversation
from jaxllm.toy_world.preferences import FLAWS, no_flaw

HOME = {
    "reference": {"answer": "Mia lives in Oakford.", "key": "Oakford", "rivals": ["Ashton", "Saltby"]},
}
SUM = {"reference": {"answer": "7 + 5 = 12. The answer is 12.", "key": "12", "rivals": []}}
RIVER = {"reference": {"answer": "A river is a long body of moving water.", "key": "", "rivals": []}}


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return list(preferences("train", count=4000, seed=0))


@pytest.fixture(scope="module")
def validation() -> list[dict]:
    return list(preferences("validation", count=400, seed=0))


@pytest.mark.parametrize(
    ("row", "answer", "score"),
    [
        # the mean of correct, helpful, brief, polite
        (HOME, "Mia lives in Oakford.", (1 + 1 + 1 + 0.5) / 4),
        (HOME, "Oakford.", (1 + 1 + 1 + 0.5) / 4),
        (HOME, "Of course! Mia lives in Oakford.", (1 + 1 + 1 + 1) / 4),
        (HOME, "Mia lives in Ashton.", (0 + 1 + 1 + 0.5) / 4),
        (HOME, "Mia lives in Ashton or in Oakford.", (0 + 1 + 1 + 0.5) / 4),
        (HOME, "In Oakford, and not in Ashton.", (1 + 1 + 1 + 0.5) / 4),
        (HOME, "Mia lives in Oakfordshire", (0 + 1 / 2 + 1 + 0.5) / 4),
        (HOME, "Oakford. What a silly question.", (1 + 1 + 1 + 0) / 4),
        (HOME, "Of course! What a silly question. Oakford.", (1 + 1 + 1 + 0) / 4),
        (HOME, "I am not sure.", (0 + 0 + 1 + 0.5) / 4),
        (HOME, "Mia lives in", (0 + 1 / 2 + 1 + 0.5) / 4),
        (HOME, "Mia.", (0 + 2 * 1 / 4 + 1 + 0.5) / 4),
        (HOME, "Oakford " + "is a town " * 10 + "too.", (1 + 1 + (40 - 28) / (40 - 10) + 0.5) / 4),
        (HOME, "Oakford, " + "and so on, " * 20 + "always.", (1 + 1 + 0 + 0.5) / 4),
        (HOME, "", (0 + 0 + 0 + 0.5) / 4),
        (SUM, "5 + 7 = 12.", (1 + 1 + 1 + 0.5) / 4),
        (SUM, "7 + 5 = 12. The answer is 13.", (0 + 1 + 1 + 0.5) / 4),
        (SUM, "12 comes from 7 and 5.", (0 + 1 + 1 + 0.5) / 4),
        # no single answer is correct: the mean of helpful, brief, polite
        (RIVER, "A river is a long body of moving water.", (1 + 1 + 0.5) / 3),
        (RIVER, "Water that is a long body.", (1 + 1 + 0.5) / 3),
        (RIVER, "A hill.", (2 * 1 / 8 + 1 + 0.5) / 3),
    ],
)
def test_the_rubric_is_the_mean_of_its_parts(row, answer, score):
    assert rubric(row, answer) == pytest.approx(score)


def test_of_two_candidates_at_the_same_place_the_longer_counts():
    owl = {"reference": {"answer": "A cow eats grass.", "key": "grass", "rivals": ["grass and oats"]}}
    assert rubric(owl, "A cow eats grass.") == pytest.approx(3.5 / 4)
    assert rubric(owl, "A cow eats grass and oats.") == pytest.approx(2.5 / 4)


def test_a_pair_does_not_depend_on_the_others_and_is_json(train):
    for index in (3999, 0, 17):
        assert preference("train", index, seed=0) == train[index] == json.loads(json.dumps(train[index]))
    assert preference("train", 0, seed=1) != train[0]


def test_a_prompt_ends_with_a_question(train):
    for row in train:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_without_label_noise_the_better_completion_is_chosen(train):
    clean = list(preferences("train", count=1000, seed=0, label_noise=0.0))
    assert all(rubric(row, row["chosen"]) - rubric(row, row["rejected"]) >= 0.1 - 1e-9 for row in clean)
    flipped = [noisy for noisy, row in zip(train, clean, strict=False) if noisy["chosen"] != row["chosen"]]
    assert all(rubric(row, row["chosen"]) < rubric(row, row["rejected"]) for row in flipped)
    assert 0.07 < len(flipped) / len(clean) < 0.13


def test_a_reference_answer_has_a_high_score(train, validation):
    for row in train + validation:
        assert rubric(row, row["reference"]["answer"]) >= 2.5 / 3


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["letters", "words"])
def test_length_tells_little_about_the_label(train, length):
    longer = statistics.fmean(length(row["chosen"]) > length(row["rejected"]) for row in train)
    shorter = statistics.fmean(length(row["chosen"]) < length(row["rejected"]) for row in train)
    assert 0.4 < longer < 0.65
    assert 0.4 < shorter < 0.65


@pytest.mark.parametrize("flaw", [flaw for flaw in FLAWS if flaw is not no_flaw])
def test_every_flaw_lowers_the_score(flaw):
    world, rng = build_world(0), random.Random(0)
    losses = []
    for _ in range(400):
        last = conversation(world, rng, "train")[-1]
        row = {"reference": {"answer": last.answer, "key": last.key, "rivals": last.rivals}}
        flawed = flaw(last, world, rng, "train")
        if flawed != last.answer:  # some flaws do not apply to every answer
            losses.append(rubric(row, last.answer) - rubric(row, flawed))
    assert len(losses) > 200
    assert statistics.fmean(loss >= 0.1 for loss in losses) > 0.95


def test_no_validation_prompt_is_trained_on_in_chats(train, validation):
    assert {split_of("\n" + row["prompt"][0]["content"]) for row in train} == {"train"}
    assert {split_of("\n" + row["prompt"][0]["content"]) for row in validation} == {"validation"}
    trained_on = {row["messages"][0]["content"] for row in chats("train", count=4000, seed=0)}
    assert not trained_on & {row["prompt"][0]["content"] for row in validation}


@pytest.mark.parametrize("label_noise", [-0.1, 0.6])
def test_label_noise_out_of_range_is_an_error(label_noise):
    with pytest.raises(ValueError, match=f"label_noise={label_noise} must be between 0 and 0.5"):
        preferences("train", count=1, seed=0, label_noise=label_noise)


def test_correct_is_the_first_part_of_the_rubric():
    assert correct(HOME, "Of course! Mia lives in Oakford.") == 1
    assert correct(HOME, "Mia lives in Ashton.") == 0
    assert correct(RIVER, "A river is a long body of moving water.") is None


def test_drafts_have_the_score_distribution_of_the_pairs(train):
    rows = list(drafts("train", count=2000, seed=0))
    both = [rubric(row, row[side]) for row in train for side in ("chosen", "rejected")]
    scores = [rubric(row, row["completion"]) for row in rows]
    assert statistics.mean(scores) == pytest.approx(statistics.mean(both), abs=0.02)
    assert statistics.mean(scores) < statistics.mean(rubric(row, row["chosen"]) for row in train) - 0.05
    assert draft("train", 1234, seed=0) == rows[1234]


def test_no_validation_prompt_is_trained_on_in_drafts(validation):
    openings = {row["prompt"][0]["content"] for row in drafts("train", count=4000, seed=0)}
    assert not openings & {row["prompt"][0]["content"] for row in validation}
