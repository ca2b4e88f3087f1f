"""What is wrong is said once, and again when it comes back."""

import json
import re

import pytest

from jaxllm.rl.health import Health

WELL = {
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
    "truncated": ({"completion/truncated_fraction": 0.6}, "60% of the answers did not end"),
    "difference": ({"sampler/log_prob_difference_mean": 0.06}, "disagree by 0.06 nats a token.*=0.05"),
    "update too large": ({"policy/approx_kl": 0.2}, "moved the policy by 0.2 nats a token"),
    "far from reference": ({"kl/reference_token": 0.6}, "0.6 nats a token away from its reference"),
    "entropy falls": ({"policy/entropy": 0.09}, "entropy fell from 1 to 0.09 nats"),
    "entropy grows": ({"policy/entropy": 3.1}, "entropy grew from 1 to 3.1 nats"),
    "length": ({"reward/mean": 0.6, "completion/mean_length": 41.0}, "answers grow from 20 to 41 tokens"),
}


@pytest.fixture
def health():
    """Of a run whose first rollout was well."""
    health = Health(log_prob_difference_limit=0.05)
    assert health.lines(WELL) == []
    return health


@pytest.mark.parametrize(("metrics", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_said_once_and_again_when_it_comes_back(health, metrics, message):
    ill = WELL | metrics
    (line,) = health.lines(ill)
    assert re.search(message, line)
    assert health.lines(ill) == []
    assert health.lines(WELL) == []
    assert health.lines(ill) == [line]


def test_rewards_that_fail_are_not_blamed_on_the_prompts(health):
    (line,) = health.lines(WELL | {"reward/failed_fraction": 1.0, "reward/zero_std_fraction": 1.0})
    assert "reward.functions failed" in line


def test_a_new_fault_is_said_beside_an_old_one(health):
    truncated, equal = (FAULTS[name][0] for name in ("truncated", "equal rewards"))
    assert len(health.lines(WELL | truncated)) == 1
    (line,) = health.lines(WELL | truncated | equal)
    assert "equal rewards" in line


@pytest.mark.parametrize(
    "metrics",
    [
        {"completion/mean_length": 41.0},  # longer, and no better paid
        {"reward/mean": 0.9, "completion/mean_length": 39.0},  # better paid, and not much longer
        {"policy/entropy": 0.11},
        {"policy/entropy": 2.9},
    ],
)
def test_what_is_usual_is_not_a_fault(health, metrics):
    assert health.lines(WELL | metrics) == []


def test_little_entropy_may_grow_to_a_nat():
    health = Health(log_prob_difference_limit=0.05)
    health.lines(WELL | {"policy/entropy": 0.01})
    assert health.lines(WELL | {"policy/entropy": 0.9}) == []
    assert len(health.lines(WELL | {"policy/entropy": 1.1})) == 1


def test_a_run_that_goes_on_compares_with_its_first_rollout(health):
    resumed = Health(log_prob_difference_limit=0.05)
    resumed.first = json.loads(json.dumps(health.first))  # as its checkpoint has it
    (line,) = resumed.lines(WELL | FAULTS["entropy falls"][0])
    assert "entropy fell from 1 to 0.09" in line


def test_a_stage_without_groups_or_a_reference_is_looked_at_too():
    health = Health(log_prob_difference_limit=0.05)
    few = {name: WELL[name] for name in WELL if not name.startswith(("policy/", "kl/", "reward/zero"))}
    assert health.lines(few) == []
