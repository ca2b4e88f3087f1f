"""PPO in whole runs: initialization, updates of policy and critic, rewards, resuming."""

import json

import jax
import numpy as np
import pytest
from rl_runs import arrays_of, checkpoint_of, make_config, make_policy, metadata_of, rows_of, run

from jaxllm.errors import ConfigError
from jaxllm.parallel.sharding import matching
from jaxllm.runs.checkpoints import load_checkpoint
from jaxllm.stages import build_program, ppo
from jaxllm.training.optimizer import ParameterGroup

TARGET, HORIZON = 0.05, 100.0  # of the KL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, rewards, a policy that ends its completions and a reward model."""
    folder = tmp_path_factory.mktemp("ppo")
    make_policy(folder)
    train_reward_model(folder, "reward")
    suite = {"prompt": "aa?", "choices": ["aa", "ee"], "answer": 0}
    (folder / "suite.jsonl").write_text(json.dumps(suite))
    return folder


def train_reward_model(folder, name, init_from="policy", **changes):
    config = make_config("reward_model", data__train=folder / "reward_model.jsonl", **changes)
    return run(config, folder / name, init_from=init_from and folder / init_from)


def configure(folder, **changes):
    """Rewards: the reward model and the missing_eos_penalty; the fraction of vowels is only logged."""
    usual = {
        "data__train": folder / "prompts.jsonl",
        "rollout__group_size": 1,
        "rollout__num_prompts": 16,
        "reward__model": folder / "reward",
        "reward__functions": f"{folder}/mine.py:vowels",
        "reward__weights": 0.0,
        "reward__missing_eos_penalty": -1.0,
        "objective__kl_target": TARGET,
        "objective__kl_horizon": HORIZON,
        "objective__critic_warmup": 1,
        "training__checkpoint_every": 2,
        "checkpoint__keep": 9,
        "evaluation__suites": folder / "suite.jsonl",
        "evaluation__suites_every": 4,
    }
    return make_config("ppo", **(usual | changes))


QUIET = {"training__evaluate_every": 0, "training__checkpoint_every": 0, "training__evaluate_at_start": False}
QUIET |= {"evaluation__suites": (), "evaluation__suites_every": 0}
sources = []  # of rollouts, of the run below


@pytest.fixture(scope="module")
def whole(folder):
    """A run of four rollouts with two updates on each, and a suite after the last."""
    make_source = ppo.make_source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_source", lambda *args: sources.append(make_source(*args)) or sources[-1])
        return run(configure(folder), folder / "whole", init_from=folder / "policy")


# Initialization


def test_the_ratio_is_1_at_the_first_update_on_a_rollout(folder, tmp_path, monkeypatch):
    batches, make_batch = [], ppo.PPO.make_batch

    def recorded(self, state, rollout):
        batch, row = make_batch(self, state, rollout)
        batches.append(batch)
        return batch, row

    monkeypatch.setattr(ppo.PPO, "make_batch", recorded)
    once = {"rollout__num_prompts": 8, "rollout__num_minibatches": 1, "objective__kl_target": None}
    once |= {"training__log_every": 1, "training__steps": 3, "objective__critic_warmup": 0}
    config = configure(folder, **QUIET, **once)
    rows = rows_of(run(config, tmp_path / "r", init_from=folder / "policy"))
    assert rows[1]["kl/reference"] == rows[1]["kl/reference_token"] == 0.0
    assert rows[2]["kl/reference"] != 0.0
    for step, batch in enumerate(batches, 1):
        assert rows[step]["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert rows[step]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
        assert rows[step]["kl/coefficient"] == 0.05
        returns, values = batch.returns[batch.mask], batch.values[batch.mask]
        explained = 1 - np.var(returns - values) / np.var(returns)
        assert rows[step]["value/explained_variance"] == pytest.approx(explained, abs=1e-3)


def test_the_critic_is_initialized_from_the_reward_model_in_the_units_of_the_rewards(folder):
    config = configure(folder, reward__model_weight=3.0)
    program = build_program(config, jax.devices()[:1])
    initial = ppo.initial_params(program, checkpoint_of(folder / "policy"))
    reward_model = load_checkpoint(folder / "reward")
    head = reward_model.params.pop("scalar_head")["kernel"]
    critic = dict(initial["critic"])
    scale = 3.0 / reward_model.metadata["metrics"]["eval/reward_std"]
    np.testing.assert_allclose(critic.pop("scalar_head")["kernel"], head * scale, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, critic, reward_model.params)
    jax.tree.map(np.testing.assert_array_equal, initial["policy"], load_checkpoint(folder / "policy").params)


def test_without_a_reward_model_the_critic_is_the_policy_with_a_head_of_zeros(folder):
    config = configure(folder, reward__model=None)
    initial = ppo.initial_params(build_program(config, jax.devices()[:1]), checkpoint_of(folder / "policy"))
    assert not np.any(initial["critic"].pop("scalar_head")["kernel"])
    jax.tree.map(np.testing.assert_array_equal, initial["critic"], initial["policy"])
    pairs = zip(jax.tree.leaves(initial["critic"]), jax.tree.leaves(initial["policy"]), strict=True)
    assert not any(a is b for a, b in pairs)  # a buffer cannot be donated twice


# Updates


def test_only_the_critic_trains_during_its_warm_up(folder, whole):
    initial = arrays_of(folder / "policy")
    initial = {name: initial[f"params/{name}"] for name in arrays_of(whole, "params/policy/")}
    assert arrays_of(whole, "params/policy/", 2) == initial
    assert arrays_of(whole, "params/policy/", 4) != initial
    critics = [arrays_of(whole, "params/critic/", step) for step in (2, 4)]
    reward_model = arrays_of(folder / "reward", "params/")
    assert critics[0].keys() == reward_model.keys()
    assert all(critics[0][name] != reward_model[name] for name in critics[0] if "kernel" in name)
    assert critics[0] != critics[1]


def test_the_reference_stays_the_initial_policy(folder, whole):
    initial = load_checkpoint(folder / "policy").params
    jax.tree.map(np.testing.assert_array_equal, sources[0].algorithm.log_probs.reference, initial)
    assert not np.array_equal(load_checkpoint(whole).params["embed"]["table"], initial["embed"]["table"])


def test_the_kl_coefficient_falls_below_the_target_and_rises_above_it(whole):
    rows = rows_of(whole)
    assert "eval/suite/suite/accuracy" in rows[8]
    kls = [rows[step]["kl/reference"] for step in (2, 4, 6, 8)]
    coefficients = [rows[step]["kl/coefficient"] for step in (2, 4, 6, 8)]
    coefficients.append(metadata_of(whole)["kl_coefficient"])
    expected = [0.05, 0.05]  # constant while only the critic trains
    for kl in kls[1:]:
        expected.append(expected[-1] * (1 + np.clip(kl / TARGET - 1, -0.2, 0.2) * 16 / HORIZON))
    np.testing.assert_allclose(coefficients, expected, rtol=1e-6)
    assert expected[2] < expected[1]
    assert expected[4] > expected[3] > expected[2]


def test_the_critic_may_have_a_learning_rate_and_a_clip_of_its_own(folder):
    def group(**changes):
        return configure(folder, optimizer__learning_rate=0.01, **changes).parameter_group

    assert group() is None
    assert group(objective__critic_learning_rate=0.02) == ParameterGroup("^critic/", 2.0, None)
    assert group(objective__critic_clip_norm=0.5) == ParameterGroup("^critic/", 1.0, 0.5)
    params = build_program(configure(folder), jax.devices()[:1]).abstract_state.params
    found = matching("^critic/", params)
    assert all(jax.tree.leaves(found["critic"]))
    assert not any(jax.tree.leaves(found["policy"]))


# Rewards


def test_the_reward_is_the_models_and_the_penalty_without_functions_of_weight_0(folder, whole):
    known = metadata_of(folder / "reward")["metrics"]
    fractions = []
    for step in (2, 4, 6, 8):
        row = rows_of(whole)[step]
        model = (row["reward/model"] - known["eval/reward_mean"]) / known["eval/reward_std"]
        fractions.append(row["completion/truncated_fraction"])
        assert row["reward/mean"] == pytest.approx(model - fractions[-1], abs=1e-4)
        assert row["reward/vowels"] > 0
    assert any(0 < fraction < 1 for fraction in fractions)


def test_the_reward_of_a_function_alone_rises(folder, tmp_path):
    changes = {"reward__model": None, "reward__weights": 1.0, "reward__missing_eos_penalty": 0.0}
    changes |= {"objective__kl_target": None, "objective__kl_coefficient": 0.0, "objective__value_clip": None}
    config = configure(folder, **QUIET, **changes, training__steps=40)
    rows = rows_of(run(config, tmp_path / "r", init_from=folder / "policy"))
    means = [row["reward/mean"] for step, row in rows.items() if step]
    assert np.mean(means[-3:]) > np.mean(means[:2]) + 0.2


# Resuming


def test_a_resumed_run_equals_an_uninterrupted_one(folder, whole, tmp_path):
    parts = tmp_path / "parts"
    run(configure(folder, training__steps=4), parts, init_from=folder / "policy")
    run(configure(folder), parts)
    assert rows_of(parts) == rows_of(whole)
    assert arrays_of(parts) == arrays_of(whole)
    kept = ("prompts_consumed", "kl_coefficient", "health")
    assert [metadata_of(parts)[name] for name in kept] == [metadata_of(whole)[name] for name in kept]
    assert metadata_of(whole)["prompts_consumed"] == 4 * 16


def test_other_stages_read_the_policy_of_a_checkpoint(folder, whole, tmp_path):
    policy = arrays_of(whole, "params/policy/")
    loaded = load_checkpoint(whole).params
    assert np.asarray(loaded["embed"]["table"]).tobytes() == policy["embed/table"]
    config = make_config(
        "grpo",
        data__train=folder / "prompts.jsonl",
        reward__functions=f"{folder}/mine.py:vowels",
        optimizer__learning_rate=0.0,
        training__steps=2,
        training__checkpoint_every=2,
        training__evaluate_every=2,
    )
    run(config, tmp_path / "grpo", init_from=whole)
    assert arrays_of(tmp_path / "grpo", "params/") == policy


def test_a_mesh_gives_the_same_metrics(folder, whole, tmp_path):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    config = configure(folder, **QUIET, **mesh, training__steps=2)
    rows = rows_of(run(config, tmp_path / "mesh", init_from=folder / "policy", devices=8))
    for name, expected in rows_of(whole)[2].items():
        assert rows[2][name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward__functions": (), "reward__weights": (), "reward__model": None}, "both empty: name one"),
        ({"reward__functions": "length,a.py:length", "reward__weights": "1,1"}, "two of the name 'length'"),
        ({"reward__functions": "a.py:model"}, "two of the name 'model'"),
        ({"reward__missing_eos_penalty": 1.0}, "would reward a missing stop token: use 0 or less"),
        ({"objective__entropy_coefficient": 0.1}, r"objective.entropy_coefficient=0.1 would move the policy"),
        ({"optimizer__weight_decay": 0.1}, r"optimizer.weight_decay=0.1 would move .*critic_warmup=0"),
        ({"objective__kl_target": 0.0}, r"objective.kl_target=0.0 must be above 0, or none"),
        ({"objective__critic_learning_rate": 0.0}, r"objective.critic_learning_rate=0.0 must be above 0"),
        ({"objective__critic_clip_norm": -1.0}, r"objective.critic_clip_norm=-1.0 must be above 0, or none"),
        (
            {"objective__critic_learning_rate": 1e-3, "optimizer__learning_rate": 0.0},
            r"critic_learning_rate=0.001 follows the schedule of optimizer.learning_rate=0.0",
        ),
    ],
)  # fmt: skip
def test_an_inconsistent_config_is_an_error_with_the_fix(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        configure(folder, **changes)


def test_an_unsuitable_reward_model_is_an_error_with_the_fix(folder, tmp_path):
    def check_error(model, message, **changes):
        config = configure(folder, reward__model=folder / model, **changes)
        with pytest.raises(ConfigError, match=rf"reward.model=\S*{model}.*{message}"):
            run(config, tmp_path / model, init_from=folder / "policy")

    check_error("policy", "is not a reward model; pass the run of one")
    no_evaluation = {"training__evaluate_every": 0, "training__steps": 2, "checkpoint__best_metric": None}
    train_reward_model(folder, "unmeasured", **no_evaluation)
    check_error("unmeasured", r"without an evaluation.*set reward.normalize=false")
    train_reward_model(folder, "foreign", init_from=None, **no_evaluation)
    check_error("foreign", "another tokenizer than the policy: train it from the same model")
    larger = {"model__num_layers": 2, "tokenizer__path": folder / "policy" / "tokenizer.model"}
    train_reward_model(folder, "larger", init_from=None, **no_evaluation, **larger)
    check_error("larger", "a model of another size: num_layers 2 -> 1", reward__normalize=False)


def test_a_parent_or_reward_model_that_does_not_fit_is_an_error_before_data_is_read(folder, tmp_path):
    no_rows = {"data__train": tmp_path / "missing.jsonl"}
    with pytest.raises(ConfigError, match="--init_from=RUN is missing: PPO starts from a trained policy"):
        run(
            configure(folder, tokenizer__path=folder / "policy" / "tokenizer.model", **no_rows),
            tmp_path / "a",
        )
    config = configure(folder, reward__model=folder / "policy", **no_rows)
    with pytest.raises(ConfigError, match="is not a reward model; pass the run of one"):
        run(config, tmp_path / "b", init_from=folder / "policy")
