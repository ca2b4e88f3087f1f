"""A pipeline's gates: each passes by what it claims, and can fail or be left unmeasured."""

import numpy as np
import pytest
from pipelines import make_config

from jaxllm.errors import ConfigError
from jaxllm.pipeline import completions, gates

GATES = make_config().gates


def scored(rubric, kl=1.0):
    """Completions with these scores, as in WORKDIR/answers/."""
    return [{"rewards": {"rubric": value}, "kl": kl} for value in rubric]


@pytest.mark.parametrize(
    ("rise", "kl", "passed"),
    [(0.05, 1.0, True), (0.0, 1.0, False), (-0.05, 1.0, False), (0.05, 11.0, False), (0.004, 1.0, False)],
)
def test_ppo_and_dpo_must_raise_the_rubrics_score_within_the_kl_limit(rise, kl, passed):
    draw = np.random.default_rng(0)
    before = draw.uniform(0, 1, 400)
    after = before + rise + draw.normal(0, 0.1, 400)  # standard error of the rise: 0.005
    found = gates.preference_gate(GATES, "ppo", scored(before), scored(after, kl), "rubric")
    assert found.passed is passed
    assert found.standard_error == pytest.approx(0.005, rel=0.1)
    assert found.measured == pytest.approx((after - before).mean())


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([{"answer": "In Rome.", "key": "Rome", "rivals": []}] * 2, True),
        ([{"answer": "In Rome.", "key": "Rome", "rivals": []}, None], False),
        (["Rome"], False),
        ([{"answer": "In Rome."}], False),
    ],
)
def test_the_rubric_is_used_only_if_every_row_has_a_complete_reference(references, expected):
    rows = [{"prompt": "Where?"} | ({} if each is None else {"reference": each}) for each in references]
    assert completions.has_references(rows) is expected


def test_unchanged_completions_fail_the_gate():
    same = scored(np.full(10, 0.5))
    assert gates.preference_gate(GATES, "ppo", same, same, "rubric").passed is False


def test_without_a_rubric_the_gate_is_not_measured():
    rows = [{"rewards": {"model": float(i)}, "kl": 1.0} for i in range(9)]
    found = gates.preference_gate(GATES, "dpo", rows, rows, "model")
    assert found.passed is None
    assert "4.000" in found.says


@pytest.mark.parametrize(
    ("after", "error", "passed"), [(0.55, 0.02, True), (0.45, 0.02, False), (0.55, 0.05, False)]
)
def test_reasoning_must_rise_by_twenty_points_and_five_standard_errors(after, error, passed):
    rows = [
        {"eval/sampled_pass@1": 0.3, "eval/sampled_pass@1_se": error},
        {"eval/sampled_pass@1": 0.9, "eval/sampled_pass@1_se": error},
        {"eval/sampled_pass@1": after, "eval/sampled_pass@1_se": error},
    ]
    found = gates.reasoning_gate(GATES, rows)
    assert found.passed is passed
    assert found.standard_error == pytest.approx(error * 2**0.5)


@pytest.mark.parametrize(
    ("accuracy", "error", "passed"), [(0.75, 0.01, True), (0.65, 0.01, False), (0.75, 0.06, False)]
)
def test_the_reward_model_must_be_near_the_ceiling_and_far_from_chance(accuracy, error, passed):
    found = gates.reward_gate(GATES, {"eval/accuracy": accuracy, "eval/accuracy_se": error})
    assert found.passed is passed


def test_a_gate_that_was_not_measured_names_the_reason():
    assert gates.reward_gate(GATES, {}).passed is None
    assert "held-out pairs" in gates.reward_gate(GATES, {}).says
    assert "group_size" in gates.reasoning_gate(GATES, [{"eval/pass@1": 0.5}]).says
    unknown = {"eval/sampled_pass@1": None, "eval/sampled_pass@1_se": None}  # no reward applied
    assert gates.reasoning_gate(GATES, [unknown, unknown]).passed is None


def test_gates_of_a_folder_without_a_pipeline_are_an_error_of_one_line(tmp_path):
    (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"lacks sft, .*: run experiments/pipeline.py first"):
        gates.measure_gates(make_config(), tmp_path)


@pytest.mark.parametrize("field", ["prompts", "shown"])
def test_gates_without_prompts_are_an_error(field):
    with pytest.raises(ConfigError, match=rf"gates\.{field} is empty"):
        make_config(**{f"gates__{field}": ""})
