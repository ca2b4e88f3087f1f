"""GRPO in whole runs: training, advantages, resampling, samples and metrics, meshes."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from rl_runs import arrays_of, make_config, make_policy, metadata_of, rows_of, run

from jaxllm.errors import ConfigError
from jaxllm.rl import log_probs, rollouts
from jaxllm.rl.rollouts import Rollout
from jaxllm.stages import grpo

REWARDS = """
calls = -2  # the first call is the trial before the run

def counted(example, completion):
    global calls
    calls += 1
    return calls

def even(example, completion):
    return float(len(completion) % 2 == 0)

def of_odd(example, completion):
    return int(example["answer"]) % 2 * len(completion)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, rewards, a policy that ends its completions."""
    folder = tmp_path_factory.mktemp("grpo")
    make_policy(folder)
    (folder / "more.py").write_text(REWARDS)
    return folder


def configure(folder, reward="mine.py:vowels", **changes):
    usual = {"data__train": folder / "prompts.jsonl", "reward__functions": f"{folder}/{reward}"}
    return make_config("grpo", **(usual | changes))


def train_grpo(folder, workdir, devices=1, **changes):
    """Train, initialized from the policy. Returns the run folder."""
    return run(configure(folder, **changes), workdir, init_from=folder / "policy", devices=devices)


SAMPLES = {"training__sample_every": 4, "sample__prompts": "a,b,c,d", "sample__group_size": 4}
keys_of_whole = []  # of all completions, in the order in which they were begun


@pytest.fixture(scope="module")
def whole(folder):
    def recorded(*args, keys, **options):
        keys_of_whole.append(keys)
        return collect(*args, keys=keys, **options)

    collect = rollouts.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "collect", recorded)
        return train_grpo(folder, folder / "whole", **SAMPLES)


@pytest.fixture(scope="module")
def updated_once(folder):
    """A run of two rollouts with one update on each; held-out prompts are completed after each of them."""
    changes = {"rollout__num_prompts": 2, "rollout__num_minibatches": 1, "training__steps": 2}
    changes |= {f"training__{name}_every": 1 for name in ("log", "evaluate", "checkpoint")}
    changes |= {"reward": "more.py:even", "sample__group_size": 4}
    return train_grpo(folder, folder / "updated_once", **changes)


QUIET = {"training__evaluate_every": 0, "training__checkpoint_every": 0, "training__evaluate_at_start": False}


# Training


def test_at_the_first_update_the_ratio_is_1_and_sampler_and_trainer_agree(updated_once):
    rows = rows_of(updated_once)
    for step in (1, 2):
        assert rows[step]["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert rows[step]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
        assert 0 < rows[step]["sampler/log_prob_difference_mean"] < 1e-5
        assert {"reward/mean", "reward/zero_std_fraction", "completion/mean_length"} <= rows[step].keys()


def test_the_reward_rises(folder, tmp_path):
    rows = rows_of(train_grpo(folder, tmp_path / "r", **QUIET, training__steps=40))
    means = [row["reward/mean"] for row in rows.values()]
    assert np.mean(means[-3:]) > np.mean(means[:2]) + 0.2


def test_a_resumed_run_equals_an_uninterrupted_one(folder, whole, tmp_path):
    parts = tmp_path / "parts"
    train_grpo(folder, parts, **SAMPLES, training__steps=4)
    train_grpo(folder, parts, **SAMPLES)
    assert rows_of(parts) == rows_of(whole)
    assert arrays_of(parts) == arrays_of(whole)
    kept = ("prompts_consumed", "health")
    assert [metadata_of(parts)[name] for name in kept] == [metadata_of(whole)[name] for name in kept]
    assert metadata_of(whole)["prompts_consumed"] == 4 * 4
    first = rows_of(whole)[2]
    assert metadata_of(whole)["health"] == {name: first[name] for name in metadata_of(whole)["health"]}


def test_no_two_completions_of_a_run_and_no_train_step_have_the_same_key(whole):
    # Before training, in four rollouts and in evaluations: four prompts once, four times each, and one more.
    assert [len(keys) for keys in keys_of_whole] == [4, 16, 1, *2 * [16, 16, 4, 16, 1]]
    root = jax.random.key(0)
    init_key, run_key = jax.random.split(root)
    steps = jax.vmap(partial(jax.random.fold_in, run_key))(np.arange(8))
    keys = [root[None], init_key[None], run_key[None], jax.random.split(init_key, 3), steps, *keys_of_whole]
    data = np.concatenate([jax.random.key_data(each) for each in keys])
    assert len(np.unique(data, axis=0)) == len(data)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("grpo", {"objective__kl_coefficient": 0.1}),
        ("dr_grpo", {"objective__advantage_scale": "none"}),
        ("dapo", {"objective__advantage": "reinforce_plus_plus"}),
        ("gspo", {"objective__advantage": "leave_one_out"}),
        ("cispo", {"objective__clip_high": 2.0, "objective__entropy_coefficient": 0.01}),
    ],
)
def test_every_variant_trains(folder, tmp_path, variant, changes):
    changes |= QUIET | {"training__steps": 2, "objective__variant": variant}
    row = rows_of(train_grpo(folder, tmp_path / "r", **changes))[2]
    assert row["train/skipped_steps"] == 0
    assert 0 < row["train/grad_norm"] < 100
    assert all(value is not None for value in row.values())
    moved = arrays_of(tmp_path / "r", "params/"), arrays_of(folder / "policy", "params/")
    assert moved[0].keys() == moved[1].keys()
    assert moved[0] != moved[1]


# Advantages


def completions(rewards, lengths):
    """A rollout of completions with these rewards and lengths, four positions long."""
    nothing = Rollout(**dict.fromkeys(Rollout._fields))
    return nothing._replace(
        rewards=np.float32(rewards), mask=np.arange(4) < np.array(lengths)[:, None], prompts=[]
    )


def test_the_kl_in_the_reward_lowers_the_advantage(folder):
    kl = np.float32([[0.3, 0.1, 0, 0], [0, 0, 0, 0], [0.1, 0.1, 0.2, -0.4], [0, 0, 0, 0]])
    rollout, group = (
        completions([1, 1, 0, 1], [2, 3, 4, 1]),
        {"rollout__group_size": 2, "rollout__num_prompts": 8},
    )
    in_reward = {"objective__kl_in": "reward", "objective__kl_coefficient": 0.5}
    scale = {"objective__advantage_scale": "none"}
    found = grpo.advantages(configure(folder, **group, **in_reward, **scale), rollout, kl)
    np.testing.assert_allclose(found, [-0.1, 0.1, -0.5, 0.5], atol=1e-6)  # the first: -0.5 x 0.4
    leave_one_out = configure(folder, **group, **in_reward, objective__advantage="leave_one_out")
    np.testing.assert_allclose(grpo.advantages(leave_one_out, rollout, kl), [-0.2, 0.2, -1, 1], atol=1e-6)
    in_loss = configure(folder, **group, **scale, objective__kl_coefficient=0.5)
    np.testing.assert_allclose(grpo.advantages(in_loss, rollout, kl), [0, 0, -0.5, 0.5], atol=1e-6)


def test_a_fully_masked_completion_is_not_in_its_groups_statistics(folder):
    rollout = completions([1, 0, 5, 0], [2, 3, 0, 1])
    config = configure(folder, objective__advantage_scale="none")
    found = grpo.advantages(config, rollout, np.zeros((4, 4), np.float32))
    np.testing.assert_allclose(found, [2 / 3, -1 / 3, 0, -1 / 3], atol=1e-6)


def test_reinforce_plus_plus_whitens_the_returns_of_all_tokens(folder):
    kl = np.float32([[0.3, 0.1, 0, 0], [0, -0.2, 0.1, 0]])
    options = {"objective__advantage": "reinforce_plus_plus", "objective__kl_in": "reward"}
    config = configure(folder, **options, objective__kl_coefficient=0.5)
    found = grpo.advantages(config, completions([1, 0], [2, 3]), kl)
    returns = np.array([1 - 0.2, 1 - 0.05, 0.05, 0.05, -0.05])  # 1, 2 and 3 tokens
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    np.testing.assert_allclose(np.asarray(found)[np.arange(4) < [[2], [3]]], expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[np.arange(4) >= [[2], [3]]], 0)


def test_importance_weights_reach_the_loss(folder, tmp_path, monkeypatch):
    """With weights of 0 nothing trains."""
    monkeypatch.setattr(log_probs, "truncated_importance_weights", lambda old, *_, **__: np.zeros_like(old))
    changes = {"rollout__importance_sampling": "token", "rollout__dtype": "bfloat16", "training__steps": 2}
    row = rows_of(train_grpo(folder, tmp_path / "r", **QUIET, **changes))[2]
    assert 1e-4 < row["sampler/log_prob_difference_mean"] < 0.1
    assert arrays_of(tmp_path / "r", "params/") == arrays_of(folder / "policy", "params/")


def test_the_samplers_log_probs_can_replace_the_trainers_after_the_first_rollout(folder, whole, tmp_path):
    recomputed = rows_of(whole)
    sampled = rows_of(train_grpo(folder, tmp_path / "r", **QUIET, rollout__recompute_log_probs=False))
    assert sampled[2]["sampler/log_prob_difference_mean"] < 1e-5
    assert recomputed[4]["sampler/log_prob_difference_mean"] < 1e-5
    assert "sampler/log_prob_difference_mean" not in sampled[4]
    for step in (2, 4):
        grad_norms = [rows[step]["train/grad_norm"] for rows in (sampled, recomputed)]
        assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-3)


def test_groups_without_signal_are_resampled(folder, tmp_path):
    """Half of the prompts give all their completions a reward of 0."""
    changes = {"reward": "more.py:of_odd", "training__sample_every": 2, "rollout__max_resamples": 9}
    workdir = train_grpo(folder, tmp_path / "r", **QUIET | changes | {"training__checkpoint_every": 8})
    rows = rows_of(workdir).values()
    assert {row["reward/zero_std_fraction"] for row in rows} == {0.0}
    assert max(row["rollout/sampled_zero_std_fraction"] for row in rows) > 0.2
    assert metadata_of(workdir)["prompts_consumed"] > 4 * 4  # of four rollouts of four prompts
    assert len(table(workdir, 2)) == 16


# Samples, evaluations, metrics


def table(workdir, step):
    """Reward and advantage of every completion in a rollout's table of samples."""
    text = (workdir / "samples" / f"{step}.txt").read_text()
    lines = re.findall(r"^ *(-?[\d.e-]+) +(-?[\d.e-]+) +\d+  ", text, re.MULTILINE)
    return np.array(lines, float)


def test_the_last_rollout_is_written_with_rewards_and_advantages(whole):
    rewards, advantages = table(whole, 4).T
    assert rewards.mean() == pytest.approx(rows_of(whole)[4]["reward/mean"], abs=1e-3)
    groups = rewards.reshape(4, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True, ddof=1) + 1e-4)
    np.testing.assert_allclose(advantages, expected.ravel(), atol=0.02)  # shown with three digits
    assert np.abs(advantages).max() > 0.5


def test_held_out_prompts_are_completed_once_and_several_times(updated_once):
    for step, row in rows_of(updated_once).items():
        file = updated_once / "evals" / f"{step}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == 4
        right = [line["reward"] for line in lines]
        assert right == [float(len(line["completion"]) % 2 == 0) for line in lines]
        assert row["eval/pass@1"] == row["eval/reward"] == np.mean(right)
        assert row["eval/pass@1_se"] == pytest.approx(np.std(right, ddof=1) / 2)
        assert "eval/pass@2" not in row
    found = [row[f"eval/sampled_pass@{k}"] for k in (1, 2, 4)]
    assert found == sorted(found)
    assert 0 < found[0] < found[2]


def test_every_row_has_the_rollout_of_its_own_step(folder, tmp_path):
    rows = rows_of(train_grpo(folder, tmp_path / "r", **QUIET, reward="more.py:counted"))
    means = {step: row["reward/mean"] for step, row in rows.items()}
    assert means == {2: 7.5, 4: 23.5, 6: 39.5, 8: 55.5}  # means of 0 to 15, 16 to 31, ...


# On a mesh


def test_a_mesh_gives_the_same_completions_and_the_same_parameters(folder, tmp_path):
    """With parameters gathered for sampling; test_ppo_runs samples with split ones."""
    changes = {"optimizer__epsilon": 1e-3, "training__steps": 4, "training__sample_every": 2}
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "devices": 8}
    kinds = {"one": {}, "gathered": split | {"rollout__replicate_params": True}}
    runs = [train_grpo(folder, tmp_path / name, **QUIET | changes | kind) for name, kind in kinds.items()]
    for step in (2, 4):
        (text,) = {(workdir / "samples" / f"{step}.txt").read_text() for workdir in runs}
        assert "advantage" in text
    expected, found = (arrays_of(workdir, "params/") for workdir in runs)
    for name, x in found.items():
        one = np.frombuffer(expected[name], np.float32)
        np.testing.assert_allclose(np.frombuffer(x, np.float32), one, atol=1e-4, err_msg=name)


# Bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__sampling__top_p": 1.0, "rollout__sampling__min_p": 0.0},  # which filter nothing
        {"objective__kl_estimator": "k1", "objective__kl_coefficient": 0.1, "objective__kl_in": "reward"},
        {"objective__kl_estimator": "k1"},  # without a coefficient there is no KL
    ],
)
def test_a_filter_or_estimator_that_is_not_used_is_no_error(folder, changes):
    configure(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__group_size": 1}, r"rollout.group_size=1: a group must have other completions"),
        (
            {"rollout__num_minibatches": 3},
            r"16 is not divisible by rollout.num_minibatches=3: use 15 or 18",
        ),
        ({"data__batch_size": 4}, r"data.batch_size=4 must be .* = 8"),
        ({"training__steps": 7}, r"training.steps=7 must be a multiple of .* = 2: use 6 or 8"),
        ({"rollout__sampling__temperature": 0}, "a greedy policy does not explore"),
        ({"rollout__sampling__temperature": 1e-39}, "a greedy policy does not explore"),
        ({"rollout__sampling__top_k": 50}, r"rollout.sampling.top_k=50 .*importance.*top_k=none"),
        ({"rollout__sampling__top_p": 0.9}, r"rollout.sampling.top_p=0.9 .*importance.*top_p=none"),
        ({"rollout__sampling__min_p": 0.1}, r"rollout.sampling.min_p=0.1 .*importance.*min_p=none"),
        (
            {
                "rollout__max_resamples": 1,
                "rollout__group_size": 1,
                "rollout__num_prompts": 16,
                "objective__advantage": "reinforce_plus_plus",
            },
            "rollout.max_resamples=1 resamples groups of equal rewards, which all",
        ),
        ({"rollout__max_resamples": -1}, "rollout.max_resamples=-1 must not be negative"),
        (
            {"objective__kl_coefficient": 0.1, "objective__kl_estimator": "k1"},
            "objective.kl_estimator=k1 in the loss .* use k3 or k2, or objective.kl_in=reward",
        ),
        ({"objective__kl_coefficient": -0.1}, "objective.kl_coefficient=-0.1 must not be negative"),
        ({"rollout__sampling__max_new_tokens": 32}, "data.sequence_length=32 leaves no room for a prompt"),
        ({"reward__weights": "1.0,2.0"}, "reward.weights has 2 entries for 1 reward.functions"),
        ({"objective__advantage": "gae"}, "objective.advantage='gae': choose one of group, leave_one_out"),
        ({"objective__variant": "ppo"}, "objective.variant='ppo': choose one of grpo, dr_grpo"),
        ({"reward": "more.py:evne"}, r"more.py: no function 'evne'.*did you mean 'even'"),
        ({"objective__kl_in": "advantage"}, "objective.kl_in='advantage': choose one of loss, reward"),
        (
            {"rollout__importance_sampling": "row"},
            "='row': choose token, sequence or none",
        ),
        ({"rollout__dtype": "float16"}, "rollout.dtype='float16': choose float32, bfloat16 or none"),
        ({"sample__group_size": -1}, "sample.group_size=-1 must not be negative"),
        (
            {"rollout__importance_sampling": "token", "rollout__recompute_log_probs": False},
            "it needs rollout.recompute_log_probs=true",
        ),
    ],
)
def test_an_inconsistent_config_is_an_error_with_the_fix(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure(folder, **changes)
