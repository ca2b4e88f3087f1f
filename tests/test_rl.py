"""Reinforcement learning end to end: a reward is followed, and a run that is cut in two is one run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.program import Program, find_stage
from experiments.run import train
from jaxllm.config import load_config, override, parse
from jaxllm.errors import ConfigError
from jaxllm.training.checkpoint import find_checkpoint, read_arrays
from jaxllm.training.metrics import read_metrics

CONFIG = str(Path(__file__).parents[1] / "configs" / "grpo_problems.py:tiny")
SMALL = {
    "model.num_layers": "1",
    "data.synthetic_rows": "40",
    "data.sequence_length": "80",
    "data.batch_size": "16",
    "rollout.prompts": "8",
    "rollout.group_size": "4",
    "rollout.minibatches": "2",
    "rollout.sampling.max_new_tokens": "6",
    "sample.sampling.max_new_tokens": "6",
    "training.steps": "8",
    "training.log_every": "2",
    "training.evaluate_every": "4",
    "training.sample_every": "0",
    "training.checkpoint_every": "4",
    "evaluation.max_rows": "4",
    "optimizer.warmup_steps": "0",
    "optimizer.learning_rate": "1e-2",
    "mesh.data": "1",
    "mesh.fsdp": "8",
}


def make_config(rewards, **changes):
    config = load_config(CONFIG)
    small = SMALL | {"reward.functions": f"{rewards}:digits"}
    for field, text in (small | {name.replace("__", "."): x for name, x in changes.items()}).items():
        override(config, find_stage("grpo").Config, field, text)
    return parse(find_stage("grpo").Config, config)


def run(config, workdir):
    train(config, workdir=str(workdir), resume="auto", init_from=None, profile=None, command=["train.py"])


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """A file with a reward that random weights can learn to please: the share of digits."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(
        "def digits(example, completion):\n"
        "    assert 'answer' in example\n"
        "    return sum(c.isdigit() for c in completion) / max(1, len(completion))\n"
    )
    return file


@pytest.fixture(scope="module")
def whole(rewards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rl") / "whole"
    run(make_config(rewards), workdir)
    return workdir


def rows_of(workdir):
    timed = ("perf/", "time/")
    return [
        {k: x for k, x in row.items() if not k.startswith(timed)}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def test_the_first_update_of_a_rollout_has_the_ratio_1_and_sampler_and_trainer_agree(rewards, tmp_path):
    run(
        make_config(rewards, rollout__minibatches="1", data__batch_size="32", training__steps="2"),
        tmp_path / "r",
    )
    for row in rows_of(tmp_path / "r")[1:]:
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert row["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
        assert row["sampler/log_prob_difference_max"] < 1e-4
        assert {"reward/mean", "reward/zero_std_fraction", "completion/mean_length"} <= row.keys()


def test_a_reward_is_followed(rewards, tmp_path):
    run(make_config(rewards, training__steps="24", training__evaluate_every="0"), tmp_path / "r")
    means = [row["reward/mean"] for row in rows_of(tmp_path / "r") if "reward/mean" in row]
    assert np.mean(means[-3:]) > 2 * means[0]


def test_a_run_in_two_parts_is_one_run(rewards, whole, tmp_path):
    workdir = tmp_path / "parts"
    run(make_config(rewards, training__steps="4"), workdir)
    run(make_config(rewards), workdir)
    assert rows_of(workdir) == rows_of(whole)
    for folder in (workdir, whole):
        metadata = json.loads((find_checkpoint(folder) / "metadata.json").read_text())
        assert metadata["prompts_consumed"] == 4 * 8
    params = Program(make_config(rewards)).abstract_state.params
    a, b = (read_arrays(find_checkpoint(folder), params, prefix="params") for folder in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__group_size": "1"}, r"rollout.group_size=1: answers are compared with others"),
        ({"rollout__minibatches": "3"}, r"= 32 does not divide into rollout.minibatches=3: make it 30 or 33"),
        ({"data__batch_size": "8"}, r"data.batch_size=8 must be .* = 16"),
        ({"training__steps": "7"}, r"training.steps=7 must be a multiple of .* = 2: use 6 or 8"),
        ({"rollout__sampling__temperature": "0"}, "a greedy policy does not explore"),
        ({"reward__weights": "1.0,2.0"}, "reward.weights has 2 entries for 1 reward.functions"),
        ({"objective__advantage": "gae"}, "objective.advantage='gae': choose one of group, leave_one_out"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(rewards, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(rewards, **changes)
