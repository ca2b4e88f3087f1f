"""Runs with adapters: what trains, what a checkpoint holds, what it belongs to, and what it shares."""

import json
import shutil

import jax
import numpy as np
import pytest
from rl_runs import arrays_of, checkpoint_of, make_config, make_policy, metadata_of, read_all, rows_of, run

from jaxllm.batches import TokenBatch
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models.lora import TRAINED, merge_lora
from jaxllm.parallel.sharding import matching
from jaxllm.runs.checkpoints import load_checkpoint
from jaxllm.runs.program import dry_run
from jaxllm.stages import build_program, ppo
from jaxllm.training.step_folder import checkpoint_hash

RANK = {"model__lora__rank": 2, "model__lora__alpha": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, rewards, and a policy with all its parameters trained."""
    folder = tmp_path_factory.mktemp("lora")
    make_policy(folder)
    return folder


def sft_config(folder, **changes):
    usual = {"data__train": folder / "sft.jsonl", "training__steps": 4, "training__checkpoint_every": 2}
    return make_config("sft", **(RANK | usual | changes))


@pytest.fixture(scope="module")
def adapted(folder):
    """SFT of adapters of the policy, with dropout."""
    config = sft_config(folder, model__lora__dropout=0.1)
    return run(config, folder / "adapted", init_from=folder / "policy")


@pytest.fixture(scope="module")
def rewarder(folder):
    """A reward model of adapters and a scalar head on the policy's weights."""
    config = make_config("reward_model", data__train=folder / "reward_model.jsonl", **RANK)
    return run(config, folder / "rewarder", init_from=folder / "policy")


def ppo_config(folder, **changes):
    usual = {"data__train": folder / "prompts.jsonl", "reward__functions": f"{folder}/mine.py:vowels"}
    usual |= {"reward__model": folder / "rewarder", "reward__weights": 1.0, "checkpoint__keep": 9}
    usual |= {"rollout__group_size": 1, "rollout__num_prompts": 16, "objective__critic_warmup": 0}
    usual |= {"training__steps": 4, "training__evaluate_every": 0, "training__checkpoint_every": 2}
    usual |= {"checkpoint__best_metric": None}
    return make_config("ppo", **(RANK | usual | changes))


@pytest.fixture(scope="module")
def ppo_run(folder, rewarder):
    return run(ppo_config(folder), folder / "ppo", init_from=folder / "policy")


def test_a_checkpoint_holds_what_trains_alone_and_names_its_base(folder, adapted):
    base = checkpoint_of(folder / "policy")
    names = read_all(checkpoint_of(adapted)).keys()
    tensors = [name for name in names if "blocks/" in name or name.startswith("params/")]
    assert all("/lora/" in name for name in tensors)
    assert len(tensors) == 3 * 14  # a and b of seven layers, and their moments
    assert metadata_of(adapted)["base"] == {"path": str(base), "hash": checkpoint_hash(base)}


def test_what_is_frozen_does_not_change_and_what_trains_does(folder, adapted):
    before, after = load_checkpoint(folder / "policy"), load_checkpoint(adapted)
    for path, leaf in jax.tree_util.tree_leaves_with_path(before.params):
        found = after.params
        for key in path:
            found = found[key.key]
        np.testing.assert_array_equal(found, leaf)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(after.params["blocks"]["mlp"]["up"]["lora"]))


def test_a_resumed_run_ends_as_an_uninterrupted_one(folder, adapted, tmp_path):
    config = sft_config(folder, model__lora__dropout=0.1)
    shutil.copytree(adapted, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "4")
    run(config, tmp_path / "r")
    assert arrays_of(tmp_path / "r") == arrays_of(adapted)


def test_what_trains_besides_is_resumed_too(folder, tmp_path):
    config = sft_config(folder, optimizer__trainable="embed")
    whole = run(config, tmp_path / "whole", init_from=folder / "policy")
    shutil.copytree(whole, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "4")
    run(config, tmp_path / "r")
    assert arrays_of(tmp_path / "r") == arrays_of(whole)
    assert "params/embed/table" in arrays_of(whole)


def test_adapters_are_of_their_base_alone(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "policy", base)
    config = sft_config(folder, training__steps=1, training__checkpoint_every=1)
    run(config, tmp_path / "r", init_from=base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds adapters of .*/base/checkpoints/30, which is missing"):
        load_checkpoint(tmp_path / "r")
    base.symlink_to(tmp_path / "elsewhere")
    load_checkpoint(tmp_path / "r")
    manifest = checkpoint_of(base) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", '{"hash": "another", ', 1))
    with pytest.raises(CheckpointError, match="which has changed since: its hash was"):
        load_checkpoint(tmp_path / "r")


def test_training_continues_with_the_adapters_of_a_parent_or_with_them_merged(folder, adapted, tmp_path):
    once = {"training__steps": 1, "training__checkpoint_every": 1, "optimizer__learning_rate": 0.0}
    kept = run(sft_config(folder, **once), tmp_path / "kept", init_from=adapted)
    assert metadata_of(kept)["base"] == metadata_of(adapted)["base"]
    assert arrays_of(kept, "params/") == arrays_of(adapted, "params/")

    merged = run(sft_config(folder, **once, model__lora__rank=None), tmp_path / "merged", init_from=adapted)
    loaded = load_checkpoint(adapted)
    expected = merge_lora(loaded.model.config, loaded.params)[1]
    found = load_checkpoint(merged).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert "base" not in metadata_of(merged)

    with pytest.raises(ConfigError, match=r"model.lora differs from theirs: rank 2 -> 3; set these fields"):
        run(sft_config(folder, model__lora__rank=3), tmp_path / "other", init_from=adapted)


def test_adapters_need_a_trained_model(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"model.lora.rank=2 needs --init_from: a run or"):
        run(sft_config(folder), tmp_path / "r")


def test_ppo_shares_one_base_between_policy_reference_and_critic(folder, rewarder, ppo_run):
    saved = arrays_of(ppo_run, "params/")
    assert all("/lora/" in name or name == "critic/scalar_head/kernel" for name in saved)
    state = build_program(ppo_config(folder), jax.devices()[:1]).abstract_state
    held = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.params["critic"])]
    assert len(held) == 15
    assert rows_of(ppo_run)[2]["kl/reference"] == 0.0
    base = metadata_of(ppo_run)["base"]
    assert base == metadata_of(rewarder)["base"]


def test_a_resumed_ppo_run_ends_as_an_uninterrupted_one(folder, ppo_run, tmp_path):
    shutil.copytree(ppo_run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "4")
    run(ppo_config(folder), tmp_path / "r")
    assert arrays_of(tmp_path / "r") == arrays_of(ppo_run)
    assert rows_of(tmp_path / "r") == rows_of(ppo_run)


def test_a_critic_has_for_itself_what_trains_besides(folder):
    config = ppo_config(folder, optimizer__trainable="embed")
    critic = build_program(config, jax.devices()[:1]).abstract_state.params["critic"]
    assert critic["embed"]["table"].shape == (512, 64)
    assert critic["final_norm"]["scale"] is None


def test_a_critic_of_another_base_begins_as_the_policy(folder, tmp_path, capsys):
    once = {"training__steps": 1, "training__evaluate_every": 0, "checkpoint__best_metric": None}
    config = make_config("reward_model", data__train=folder / "reward_model.jsonl", **once)
    whole = run(config, tmp_path / "whole", init_from=folder / "policy")
    program = build_program(ppo_config(folder, reward__model=whole), jax.devices()[:1])
    critic = ppo.initial_params(program, checkpoint_of(folder / "policy"))["critic"]
    assert "note: the critic begins as the policy, whose frozen weights it shares" in capsys.readouterr().out
    assert not np.asarray(critic["scalar_head"]["kernel"]).any()


def test_dropout_in_rollouts_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"model.lora.dropout=0.1 would change the policy between sampling"):
        ppo_config(folder, model__lora__dropout=0.1)


def test_a_mesh_changes_neither_losses_nor_adapters(folder):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 512, (8, 33)).astype(np.int32)
    ones = np.ones((8, 32), np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], ones > 0, ones, positions)

    def train(devices, **mesh):
        program = build_program(sft_config(folder, data__batch_size=8, **mesh), jax.devices()[:devices])
        state, losses = program.fresh_state(), []
        step = program.compile()
        for _ in range(3):
            state, metrics = step(state, jax.device_put(batch, program.batch_sharding))
            losses.append(float(metrics["loss"].mean))
        return losses, state.params

    losses, params = train(1, mesh__data=1)
    found, sharded = train(8, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, sharded)
    lora = sharded["blocks"]["attention"]["query"]["lora"]
    shards = {name: x.addressable_shards[0].data.size / x.size for name, x in lora.items()}
    assert shards == {"a": 0.5, "b": 0.5}  # over fsdp, over tensor


def test_the_optimizer_holds_what_trains_and_the_dry_run_says_so(folder):
    program = build_program(sft_config(folder), jax.devices()[:1])
    params, moments = program.abstract_state.params, program.abstract_state.opt_state
    trained = [
        leaf.nbytes if hasattr(leaf, "nbytes") else leaf.size * 4
        for leaf, kept in zip(
            jax.tree.leaves(params), jax.tree.leaves(matching(TRAINED, params)), strict=True
        )
        if kept
    ]
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments) if leaf.ndim)
    assert held == 2 * sum(trained)
    text = dry_run(program)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"{total:,} parameters" in text
    assert f"; {sum(trained) // 4:,} trained)" in text
    assert f"state: {sum(trained) / 1e9:.3f} GB trained parameters + " in text
    assert (
        json.loads((checkpoint_of(folder / "policy") / "config.json").read_text())["model"]["lora"]["rank"]
        is None
    )
