"""A fault is reported once, and again when it returns."""

import json
import re
import typing

import numpy as np
import pytest

from jaxllm.rewards.pool import Scores
from jaxllm.rl.health import Health, unrewarded
from jaxllm.stages import grpo

HEALTHY = {
    "reward/mean": 0.5,
    "reward/zero_std_fraction": 0.2,
    "completion/mean_length": 20.0,
    "completion/truncated_fraction": 0.1,
    "sampler/log_prob_difference_mean": 1e-5,
    "policy/approx_kl": 0.01,
    "policy/entropy": 1.0,
    "kl/reference_token": 0.1,
}
FAULTS = {
    "failing rewards": ({"reward/failed_fraction": 0.6}, "60% of the calls of reward.functions failed"),
    "equal rewards": ({"reward/zero_std_fraction": 0.6}, "60% of the groups have equal rewards"),
    "no reward": ({"completion/left_out_fraction": 0.6}, "60% of the completions have no reward"),
    "truncated": (
        {"completion/truncated_fraction": 0.6},
        "60% of the completions do not end within rollout.sampling.max_new_tokens",
    ),
    "difference": ({"sampler/log_prob_difference_mean": 0.06}, "disagree by 0.06 nats a token.*=0.05"),
    "update too large": ({"policy/approx_kl": 0.2}, "moved the policy by a KL of 0.2 nats a token"),
    "far from reference": ({"kl/reference_token": 0.6}, "KL to the reference is 0.6 nats a token"),
    "entropy falls": ({"policy/entropy": 0.09}, "entropy fell from 1 to 0.09 nats"),
    "entropy grows": ({"policy/entropy": 3.1}, "entropy grew from 1 to 3.1 nats"),
    "length": ({"reward/mean": 0.6, "completion/mean_length": 41.0}, "completions grow from 20 to 41 tokens"),
}


@pytest.fixture
def health():
    """Health of a run whose first rollout had no fault."""
    health = Health(log_prob_difference_limit=0.05)
    assert health.lines(HEALTHY) == []
    return health


@pytest.mark.parametrize(("metrics", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported_once_and_again_when_it_returns(health, metrics, message):
    faulty = HEALTHY | metrics
    (line,) = health.lines(faulty)
    assert re.search(message, line)
    assert health.lines(faulty) == []
    assert health.lines(HEALTHY) == []
    assert health.lines(faulty) == [line]


def test_truncated_completions_that_are_left_out_are_reported_as_truncated(health):
    metrics = dict.fromkeys(("completion/left_out_fraction", "completion/truncated_fraction"), 0.6)
    (line,) = health.lines(HEALTHY | metrics)
    assert "do not end" in line


def test_failing_rewards_are_not_reported_as_equal_rewards(health):
    (line,) = health.lines(HEALTHY | {"reward/failed_fraction": 1.0, "reward/zero_std_fraction": 1.0})
    assert "reward.functions failed" in line


def test_a_new_fault_is_reported_beside_an_old_one(health):
    truncated, equal = (FAULTS[name][0] for name in ("truncated", "equal rewards"))
    assert len(health.lines(HEALTHY | truncated)) == 1
    (line,) = health.lines(HEALTHY | truncated | equal)
    assert "equal rewards" in line


@pytest.mark.parametrize(
    "metrics",
    [
        {"completion/mean_length": 41.0},  # longer, with the same reward
        {"reward/mean": 0.9, "completion/mean_length": 39.0},  # a higher reward, and not much longer
        {"policy/entropy": 0.11},
        {"policy/entropy": 2.9},
    ],
)
def test_usual_changes_are_not_a_fault(health, metrics):
    assert health.lines(HEALTHY | metrics) == []


def test_low_entropy_may_grow_to_one_nat():
    health = Health(log_prob_difference_limit=0.05)
    health.lines(HEALTHY | {"policy/entropy": 0.01})
    assert health.lines(HEALTHY | {"policy/entropy": 0.9}) == []
    assert len(health.lines(HEALTHY | {"policy/entropy": 1.1})) == 1


def test_a_resumed_run_compares_with_its_first_rollout(health):
    resumed = Health(log_prob_difference_limit=0.05)
    resumed.first = json.loads(json.dumps(health.first))  # as from its checkpoint
    (line,) = resumed.lines(HEALTHY | FAULTS["entropy falls"][0])
    assert "entropy fell from 1 to 0.09" in line


def test_metrics_that_a_stage_does_not_have_are_skipped():
    health = Health(log_prob_difference_limit=0.05)
    few = {name: HEALTHY[name] for name in HEALTHY if not name.startswith(("policy/", "kl/", "reward/zero"))}
    assert health.lines(few) == []


@pytest.mark.parametrize(("metrics", "message"), FAULTS.values(), ids=FAULTS)
def test_a_line_names_fields_that_exist(health, metrics, message):
    (line,) = health.lines(HEALTHY | metrics)
    named = re.findall(r"\b(?:rollout|reward|optimizer|objective|data|model)(?:\.[a-z_]+)+", line)
    assert named
    for name in named:
        config = grpo.Config
        for field in name.split("."):
            assert field in typing.get_type_hints(config), name
            config = typing.get_type_hints(config)[field]


@pytest.mark.parametrize(
    ("values", "failures", "said"),
    [
        ([0, 0, 0], 0, True),
        ([0, np.nan, 0], 0, True),
        ([0, 0, 0], 1, True),
        ([0, 0, 0], 3, False),  # said as a failure
        ([0, 0.5, 0], 0, False),
        ([0, -1, 0], 0, False),
        ([np.nan] * 3, 0, False),
    ],
)
def test_a_reward_of_0_for_every_completion_is_said_with_an_example(values, failures, said):
    values = np.array(values, np.float32)
    known = np.ones(len(values), bool)
    scores = Scores(values, {"mine": values}, known, ~known, {}, [], {"mine": failures})
    lines = list(unrewarded(scores, "It is\n42.", {"prompt": "What?", "answer": "41"}))
    assert len(lines) == said
    if said:
        assert re.match(r"reward 'mine' gave 0 to all [23] completions of the first rollout", lines[0])
        assert r"'It is\n42.' for the row answer='41'" in lines[0]
        assert "\n" not in lines[0]
