"""Completions that are left out (truncated ones if masked, those without a reward) are left out everywhere:
of losses, of baselines, of what counts as signal, and of statistics."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import parse_config

from jaxllm.evaluation.completions import ScoredCompletions, completion_metrics, completion_rows
from jaxllm.losses import Weighted
from jaxllm.rewards.pool import Scores
from jaxllm.rl.rollouts import (
    RolloutSource,
    has_signal,
    join,
    make_rollout,
    resampling_metrics,
    rollout_metrics,
)
from jaxllm.rollout.collect import Completions
from jaxllm.stages import grpo, ppo

NAN = float("nan")
LENGTHS = np.array([2, 3, 1, 4])  # tokens of the four completions of each group, which begin at position 1


def config_of(stage="grpo", **changes):
    """Groups of four, two in a rollout."""
    file = {"grpo": "grpo_problems.py:tiny", "ppo": "ppo_preferences.py:tiny"}[stage]
    fields = {"rollout.num_prompts": 2, "rollout.group_size": 4, "rollout.mask_truncated": True} | changes
    return parse_config(file, fields)


def scored(rewards, truncated=(), failed=()):
    """Completions of groups with these rewards (NaN: none), of which some rows were truncated or failed."""
    rewards, number = np.float32(rewards), len(rewards)
    lengths = np.resize(LENGTHS, number)
    return ScoredCompletions(
        completions=Completions([[1] * n for n in lengths], [-np.ones(n) for n in lengths], [], 7),
        texts=["text"] * number,
        tokens=np.ones((number, 6), np.int32),
        prompt_lengths=np.full(number, 2),
        lengths=lengths,
        truncated=np.isin(np.arange(number), truncated),
        rewards=rewards,
        scores=Scores(
            total=rewards,
            by_name={"mine": rewards},
            applies=~np.isnan(rewards),
            failed=np.isin(np.arange(number), failed),
            counters={"reward/timeouts": len(failed), "reward/errors": 0},
            messages=[],
        ),
        seconds=0.0,
    )


def rollout_of(*args, config=None, **options):
    scores = scored(*args, **options)
    return make_rollout([None] * (len(scores.texts) // 4), scores, (config or config_of()).rollout)


CUT_OFF = rollout_of([1, 1, 1, 0, 1, 0, 1, 0], truncated=[3])  # the first group's last one
ABSTAINED = rollout_of([1, 1, 1, NAN, 1, 0, 1, 0])


@pytest.mark.parametrize("rollout", [CUT_OFF, ABSTAINED], ids=["truncated", "no reward"])
def test_equal_rewards_of_the_others_are_no_signal(rollout):
    assert has_signal(rollout, 4).tolist() == [False, True]
    row = rollout_metrics(rollout, config_of().rollout)
    assert row["reward/zero_std_fraction"] == 0.5
    assert row["completion/left_out_fraction"] == 1 / 8


@pytest.mark.parametrize("rewards", [[1, 1, 1, 0, NAN, NAN, 0, NAN], [NAN] * 8])
def test_a_group_with_less_than_two_rewards_has_no_signal(rewards):
    assert has_signal(rollout_of(rewards, truncated=[3]), 4).tolist() == [False, False]


def test_a_truncated_completion_that_is_not_masked_counts():
    config = config_of(**{"rollout.mask_truncated": False})
    rollout = rollout_of([1, 1, 1, 0, 1, 0, 1, 0], truncated=[3], config=config)
    assert has_signal(rollout, 4).tolist() == [True, True]
    assert rollout.valid.all()


@pytest.mark.parametrize("rollout", [CUT_OFF, ABSTAINED], ids=["truncated", "no reward"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective.advantage_scale": "batch"},
        {"objective.advantage_scale": "none", "objective.variant": "dr_grpo"},
        {"objective.advantage": "leave_one_out"},
    ],
    ids=lambda changes: ", ".join(changes.values()),
)
def test_a_left_out_completion_is_in_no_baseline_and_has_no_advantage(rollout, changes):
    found = np.asarray(grpo.advantages(config_of(**changes), rollout, np.zeros((8, 6), np.float32)))
    np.testing.assert_array_equal(found[:4], 0)
    assert (found[4:] != 0).all()


def test_a_left_out_completion_is_not_whitened_with_the_others():
    config = config_of(**{"objective.advantage": "reinforce_plus_plus"})
    found = np.asarray(grpo.advantages(config, ABSTAINED, np.zeros((8, 6), np.float32)))
    returns = np.repeat([1, 1, 1, 1, 0, 1, 0], np.delete(np.resize(LENGTHS, 8), 3))
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    np.testing.assert_allclose(found[ABSTAINED.mask], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[3], 0)


# Resampling


def test_what_was_resampled_is_counted_and_logged_beside_what_is_kept():
    config = config_of(**{"rollout.max_resamples": 3}).rollout
    first = rollout_of([1, 1, 1, NAN, 0, 0, 0, 0], failed=[3])
    parts = [first, rollout_of([NAN, NAN, NAN, NAN, 1, 0, 0, 0], failed=range(4)), rollout_of([1, 1, 1, 0])]
    kept = join(parts, config)
    row = rollout_metrics(kept, config) | resampling_metrics(parts, config)
    assert row["reward/mean"] == row["reward/mine"] == 4 / 8
    assert row["reward/zero_std_fraction"] == 0
    assert row["rollout/sampled_reward_mean"] == pytest.approx(7 / 15)
    assert row["rollout/sampled_zero_std_fraction"] == 3 / 5
    assert row["rollout/sampled_groups"] == 5
    assert row["reward/timeouts"] == 5
    assert row["reward/failed_fraction"] == 5 / 20  # of the calls that were made


# PPO


def ppo_batch(rollout, values, step=4, **changes):
    """The batch and the metrics that PPO makes of a rollout, whose KL is 0.25 nats a token."""
    config = config_of("ppo", **{"objective.critic_warmup": 0} | changes)
    algorithm = object.__new__(ppo.PPO)
    algorithm.knobs, algorithm.rollout = config.objective, config.rollout
    algorithm.kl_coefficient, algorithm.values = config.objective.kl_coefficient, lambda *_: values
    zeros = np.zeros(values.shape, np.float32)
    algorithm.log_probs = SimpleNamespace(
        old=lambda *_: (zeros, {}),
        kl=lambda *_: (zeros, np.where(rollout.mask, np.float32(0.25), 0)),
        importance_weights=lambda *_: None,
    )
    batch, row = algorithm.make_batch(
        SimpleNamespace(step=step, params={"policy": {}, "critic": {}}), rollout
    )
    return batch, row, algorithm.kl_coefficient


VALUES = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def test_ppo_trains_neither_policy_nor_critic_on_a_left_out_completion():
    batch, row, _ = ppo_batch(ABSTAINED, VALUES)
    other = np.where(np.arange(8)[:, None] == 3, 1e3, VALUES)  # its values are in no mean
    batches = [batch, ppo_batch(CUT_OFF, VALUES)[0], ppo_batch(ABSTAINED, other)[0]]
    for same in batches:
        assert not same.mask[3].any()
        np.testing.assert_array_equal(same.advantages, batch.advantages)
        np.testing.assert_array_equal(same.returns, batch.returns)
    counted = batch.advantages[batch.mask]
    assert (counted.mean(), counted.std(ddof=1)) == pytest.approx((0, 1), abs=1e-6)
    assert row["kl/reference"] == pytest.approx(0.25 * batch.mask.sum() / 7)


def test_the_explained_variance_is_that_of_the_critic_that_made_the_advantages():
    batch, row, _ = ppo_batch(ABSTAINED, VALUES)
    returns, values = batch.returns[batch.mask], VALUES[batch.mask]
    assert row["value/explained_variance"] == pytest.approx(1 - np.var(returns - values) / np.var(returns))


@pytest.mark.parametrize(("rewards", "samples"), [([1] * 8, 8), ([1, NAN] * 4, 4), ([NAN] * 8, 0)])
def test_the_kl_coefficient_is_adapted_by_the_completions_that_count(rewards, samples):
    changes = {"objective.kl_target": 10.0, "objective.kl_horizon": 100.0, "objective.kl_coefficient": 0.05}
    _, _, coefficient = ppo_batch(rollout_of(rewards), VALUES, **changes)
    assert coefficient == pytest.approx(0.05 * (1 - 0.2 * samples / 100))


def test_policy_metrics_are_over_all_updates_of_the_iteration():
    source = object.__new__(RolloutSource)
    source.config = config_of(**{"rollout.num_minibatches": 2}).rollout

    def update(step, total, weight):
        one = Weighted(np.float32(total), np.float32(weight))
        merged = source.merge(step, {"policy/ratio": one, "value/loss": one, "grad_norm": one})
        return [float(merged[name].mean) for name in ("policy/ratio", "value/loss", "grad_norm")]

    assert update(1, 6, 3) == [2, 2, 2]
    assert update(2, 5, 1) == [11 / 4, 11 / 4, 5]  # of four tokens; other metrics are the step's own
    assert update(3, 8, 2) == [4, 4, 4]  # a new rollout


# Evaluation


def test_a_completion_without_a_reward_is_neither_right_nor_wrong():
    completions = scored([1, 0, NAN, NAN, NAN, NAN, NAN, 1, NAN, NAN, NAN, NAN])
    row = completion_metrics(completions, 4, "")
    assert row["pass@1"] == row["reward"] == row["reward/mine"] == (0.5 + 1) / 2  # of two prompts
    assert row["pass@2"] == 1  # only the first has two
    assert np.isnan(row["pass@4"])
    assert [each["reward"] for each in completion_rows(completions)][:3] == [1, 0, None]
