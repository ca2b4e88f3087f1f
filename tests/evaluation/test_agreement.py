"""Agreement beyond chance of people, reward model and judge; the judge's bias for what it sees first."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.evaluation.agreement import (
    Comparison,
    agreements,
    cohen_kappa,
    describe,
    judge,
    read_comparisons,
)
from jaxllm.evaluation.preference import longer_preferred
from jaxllm.evaluation.suites import Result

PROMPT = [{"role": "user", "content": "What?"}]


def test_kappa_is_agreement_beyond_chance():
    # 20 both 0, 5 and 10 split, 15 both 1: observed 0.7, chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    first = [0] * 20 + [0] * 5 + [1] * 10 + [1] * 15
    second = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    found = cohen_kappa(first, second, range(50))
    assert (found.value, found.share, found.comparisons) == (pytest.approx(0.4), 0.7, 50)
    error = (0.7 * 0.3 / 50) ** 0.5 / 0.5  # Cohen's, of large samples
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_no_interval_of_few_comparisons_and_no_kappa_of_equal_labels():
    few, equal = cohen_kappa([0, 1] * 4, [0, 1] * 4, range(8)), cohen_kappa([0] * 20, [0] * 20, range(20))
    assert describe({"a and b": few, "a and c": equal}) == [
        "a and b: kappa 1.00, no interval from fewer than 10 comparisons; 100.0% equal, 8 comparisons",
        "a and c: no kappa, as all labels are the same; 100.0% equal, 20 comparisons",
    ]


def test_labels_of_one_comparison_are_resampled_together():
    first, second = [0, 1] * 20, [0, 1] * 10 + [1, 0] * 10
    apart = cohen_kappa(first * 4, second * 4, range(160))
    together = cohen_kappa(first * 4, second * 4, list(range(40)) * 4)
    assert together.value == apart.value
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_people_and_models_are_compared_on_what_both_judged():
    people = [{"a": 0, "b": 0}, {"a": 1, "b": "tie"}, {"a": 1}, {"b": "bad"}]
    found = agreements(people, {"reward model": [0, 1, 0, 1], "judge": [0, 1, 1, 0]})
    assert {name: (kappa.share, kappa.comparisons) for name, kappa in found.items()} == {
        "people and people": (0.5, 2),
        "reward model and people": (0.75, 3),
        "judge and people": (1.0, 3),
        "reward model and judge": (0.5, 4),
    }


def test_choices_of_the_page_are_read_in_one_order_of_the_answers(tmp_path):
    row = {"prompt": PROMPT, "answers": ["x", "y"], "choice": 0, "rater": "a", "comparison": "c"}
    rows = [
        row,
        row | {"answers": ["y", "x"], "choice": 0, "rater": "b"},
        row | {"choice": "tie", "rater": "c"},
        row | {"answers": ["edited", "y"], "rater": "d"},
        {"prompt": "p", "chosen": "x", "rejected": "y"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (found,) = read_comparisons(str(tmp_path / "p.jsonl"))
    assert found.answers == ("x", "y")
    assert found.labels == {"a": 0, "b": 1, "c": "tie"}


def test_a_judge_is_asked_in_both_orders():
    margins = [[1.0, -2.0], [3.0, 1.0], [1.0, 3.0], [-1.0, -3.0]]  # of A, in each order
    asked = []

    def measure(suite):
        asked.extend(question.messages[0]["content"] for question in suite.questions)
        return [Result("", {}, {"log_probs": [x, 0.0]}) for pair in margins for x in pair]

    comparisons = [Comparison(PROMPT, (f"x{i}", f"y{i}"), {}) for i in range(4)]
    found = judge(SimpleNamespace(measure=measure), comparisons)
    assert found.labels == [0, 0, 1, 0]
    assert found.first_preferred[0] == 5 / 8
    assert found.same_in_both_orders[0] == 1 / 4
    assert asked[0].index("x0") < asked[0].index("y0")
    assert asked[1].index("y0") < asked[1].index("x0")


def test_how_often_the_longer_completion_has_the_higher_reward():
    scores = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [9.0, 0.0]])
    assert longer_preferred(scores, np.array([3, 2, -1, 0]), None)[0] == 0.5
