"""Run folders that version 1 wrote (revision 6a2e121) are loaded and resumed under today's names."""

import functools
import json
import re
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from rl_runs import arrays_of, rows_of

from jaxllm.config import load_config, override, parse
from jaxllm.config_versions import (
    ADDED,
    REMOVED,
    RENAMED,
    VERSION,
    current_name,
    replacement,
    stamped,
    upgrade,
)
from jaxllm.errors import ConfigError, DataError
from jaxllm.rl import rollouts
from jaxllm.runs.checkpoints import load_checkpoint
from jaxllm.runs.train import train
from jaxllm.stages import find_stage
from jaxllm.training.run_folder import RunFolder, record_start

ROOT = Path(__file__).parents[2]

# What the PPO run was started with, under today's names: differences from configs/ppo_preferences.py:tiny.
FIELDS = {
    "model.num_layers": 1,
    "model.width": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.mlp_width": 16,
    "model.vocab_size": 320,
    "data.validation": "",
    "data.sequence_length": 32,
    "checkpoint.keep": 1,
    "optimizer.warmup_steps": 0,
    "rollout.num_prompts": 4,
    "rollout.group_size": 4,
    "rollout.epochs": 1,
    "rollout.num_minibatches": 2,
    "rollout.sampling.max_new_tokens": 6,
    "sample.sampling.max_new_tokens": 6,
    "training.log_every": 2,
    "training.evaluate_every": 4,
    "training.sample_every": 0,
    "training.checkpoint_every": 4,
    "evaluation.max_rows": 4,
    "reward.model": "none",
    "reward.functions": "length",
    "reward.weights": 1.0,
}


@pytest.fixture
def old(tmp_path):
    """A folder with `sft` and `ppo`, two runs as version 1 left them, and their prompts."""
    with tarfile.open(Path(__file__).with_name("version_1.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    record = tmp_path / "ppo" / "run.json"
    record.write_text(record.read_text().replace("FOLDER", str(tmp_path)))
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert config["objective"]["lambda_"] == 0.95  # it is of the old version
    config["data"]["train"] = [str(tmp_path / "prompts.jsonl")]
    (tmp_path / "ppo" / "config.json").write_text(json.dumps(config))
    return tmp_path


def make_config(old, **changes):
    config = load_config(f"{ROOT / 'configs' / 'ppo_preferences.py'}:tiny")
    kind = find_stage("ppo").Config
    fields = FIELDS | {"data.train": old / "prompts.jsonl"} | changes
    for field, value in fields.items():
        override(config, kind, field, str(value))
    return parse(kind, config)


def resume(old, **changes):
    config = make_config(old, **changes)
    devices = jax.devices()[:1]
    train(find_stage("ppo"), config, workdir=str(old / "ppo"), command=["train.py"], devices=devices)


def test_its_policy_is_loaded(old):
    for run, prefix in (("sft", "params/"), ("ppo", "params/policy/")):
        loaded = load_checkpoint(old / run)
        assert loaded.generates
        assert loaded.conversational
        table = arrays_of(old / run, prefix)["embed/table"]
        assert np.asarray(loaded.params["embed"]["table"]).tobytes() == table


def test_it_is_resumed(old, capsys, monkeypatch):
    used, collect = [], rollouts.collect

    def recorded(*args, keys, **options):
        used.append(keys)
        return collect(*args, keys=keys, **options)

    monkeypatch.setattr(rollouts, "collect", recorded)
    before, state = rows_of(old / "ppo"), arrays_of(old / "ppo")
    resume(old, **{"training.steps": 8})
    assert "resumed at step 8\nnothing to do" in capsys.readouterr().out
    assert arrays_of(old / "ppo") == state
    resume(old, **{"training.steps": 10, "training.evaluate_every": 0})
    assert "resumed at step 8" in capsys.readouterr().out
    after = rows_of(old / "ppo")
    assert {step: after[step] for step in before} == before
    assert list(after) == [*before, 10]
    assert json.loads((old / "ppo" / "config.json").read_text())["version"] == VERSION
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 4), 0)  # the fifth rollout's, as ever
    assert (used[0] == jax.random.split(key, 16)).all()


def test_a_setting_that_differs_is_still_an_error(old):
    with pytest.raises(ConfigError, match=r"rollout\.num_prompts 4 -> 8"):
        resume(old, **{"rollout.num_prompts": 8})


@pytest.mark.parametrize(("version", "sources"), [(1, ["synthetic"]), (1, ["mine.txt"]), (2, ["synthetic"])])
def test_only_fingerprints_of_synthetic_text_of_version_1_are_not_compared(
    tmp_path, capsys, version, sources
):
    config = {"stage": "pretrain", "data": {"train": sources, "validation": [], "text_key": "text"}}
    (tmp_path / "config.json").write_text(json.dumps(config if version == 1 else stamped(config)))
    record = {"id": "a", "parent": None, "fingerprints": {"data": "old", "tokenizer": "t"}, "starts": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = RunFolder(tmp_path, "a", resuming=True, step=None)
    start = functools.partial(
        record_start, run, config, command=["train.py"], fingerprints={"data": "new", "tokenizer": "t"}
    )
    if (version, sources) == (1, ["synthetic"]):
        start()
        assert "not compared" in capsys.readouterr().out
        start()  # it is of today's version now, with today's fingerprint
        assert capsys.readouterr().out == ""
    else:
        with pytest.raises(DataError, match="the data differs"):
            start()


def test_added_fields_have_the_value_by_which_older_runs_trained():
    for field, (beside, value) in ADDED.items():
        (section, _, name), old = field.rpartition("."), beside.rpartition(".")[2]

        def upgraded(fields, section=section):
            return upgrade({section: fields})[section] if section else upgrade(fields)

        assert upgraded({old: 1})[name] == value
        assert upgraded({old: 1, name: 7})[name] == 7
        assert upgraded({}) == {}


@pytest.mark.parametrize("field", REMOVED)
def test_a_removed_field_of_an_old_run_is_left_out_and_answered_with_what_has_its_place(field):
    section, _, name = field.rpartition(".")
    assert upgrade(stamped({section: {name: 1, "train": []}})) == {section: {"train": []}}
    assert replacement(field) == replacement(f"ppo.{field}") == REMOVED[field]
    config = load_config(f"{ROOT}/configs/pretrain_text.py:tiny")
    with pytest.raises(ConfigError, match=rf"config.{field}: unknown key, use {re.escape(REMOVED[field])}"):
        override(config, find_stage("pretrain").Config, field, "x")


def test_every_renamed_field_is_translated():
    config = {"data": {"too_long": "cut", "train": ["a"]}, "rollout": {"prompts": 4}, "worked": 1}
    upgraded = {"data": {"overlong": "truncate", "train": ["a"]}, "rollout": {"num_prompts": 4}}
    assert upgrade(config) == upgraded | {"sft_reasoning": 1}
    assert upgrade(stamped(upgraded)) == upgraded
    with pytest.raises(ValueError, match="version 99; this jaxllm reads up to"):
        upgrade({"version": 99})


@pytest.mark.parametrize("old_name", RENAMED)
def test_an_old_name_is_answered_with_the_new_one(old_name):
    assert current_name(old_name) == RENAMED[old_name]
    assert current_name(f"ppo.{old_name}") == f"ppo.{RENAMED[old_name]}"


def test_an_old_name_on_the_command_line_is_answered_with_the_new_one(old):
    with pytest.raises(ConfigError, match=r"rollout\.refills: unknown key, it is now called rollout\.max_"):
        make_config(old, **{"rollout.refills": 2})
