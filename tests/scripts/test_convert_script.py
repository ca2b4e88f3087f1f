"""A trained run leaves as a Hugging Face folder, which every script takes where it takes a run."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import parse_config

from jaxllm.config import run_script
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.scoring import score_rows
from jaxllm.models.hf import load_hf
from jaxllm.models.hf.fields import as_values
from jaxllm.rewards.reward_model import read_statistics
from jaxllm.runs import checkpoints
from jaxllm.runs import convert as convert_module
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
from jaxllm.runs.convert import generation_config
from jaxllm.runs.train import train
from jaxllm.stages import build_program, find_stage, ppo
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint

SCRIPT = Path(__file__).parents[2] / "experiments" / "convert.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def convert(script):
    """(arguments) -> exit code."""

    def run(*arguments):
        argv = script.action_as_flag(["convert.py", *map(str, arguments)])
        return run_script(script.main, None, script.define_flags, argv)

    return run


@pytest.fixture(scope="module")
def exported(convert, chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "chat"
    assert convert("export", f"--checkpoint={chat_model}", f"--output={folder}") == 0
    return folder


def test_an_exported_run_is_the_same_model(exported, chat_model):
    ours, theirs = load_checkpoint(str(chat_model)), load_checkpoint(str(exported))
    assert (theirs.generates, theirs.conversational) == (True, True)
    assert as_values(theirs.model.config) == as_values(ours.model.config)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    messages = [{"role": "user", "content": "one and two?"}]
    before, after = checkpoint_template(ours), checkpoint_template(theirs)
    assert before.prompt(messages) == after.prompt(messages)
    assert before.stop_ids == after.stop_ids


def test_its_config_names_the_family_and_the_stop_tokens(exported):
    config, generation = (
        json.loads((exported / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["eos_token_id"] == generation["eos_token_id"]
    assert len(generation["eos_token_id"]) == 2


def test_a_model_with_fewer_rows_than_the_tokenizer_has_tokens_is_an_error(exported, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda folder: SimpleNamespace(vocab_size=10**6))
    with pytest.raises(DataError, match=r"the tokenizer has 1000000 tokens, but model.vocab_size=\d+;"):
        load_checkpoint(str(exported))


def test_a_generation_config_says_what_ends_a_completion_and_is_exported_again(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    file = folder / "generation_config.json"
    fields = json.loads(file.read_text())
    fields |= {"eos_token_id": [*fields["eos_token_id"], 7], "temperature": 0.6}
    file.write_text(json.dumps(fields))
    loaded = load_checkpoint(str(folder))
    assert checkpoint_template(loaded).stop_ids[-1] == loaded.tokenizer.stop_ids[-1] == 7
    again = generation_config(loaded)
    assert set(again.pop("eos_token_id")) == set(fields.pop("eos_token_id"))
    assert again == fields


def test_a_run_is_initialized_from_it_with_its_model(exported, rows, tmp_path, capsys):
    fields = {"data.train": rows / "chats.jsonl", "data.sequence_length": "64", "data.batch_size": "8"}
    fields |= {"training.steps": "1", "optimizer.warmup_steps": "0", "training.sample_every": "0"}
    fields |= {"training.evaluate_every": "0", "checkpoint.best_metric": "none"}
    config, workdir = parse_config("sft_chat.py:tiny", fields), str(tmp_path / "run")  # of another size
    one = jax.devices()[:1]
    train(find_stage("sft"), config, workdir=workdir, init_from=str(exported), command=["train"], devices=one)
    assert f"fresh run with the weights of {exported}" in capsys.readouterr().out
    trained, parent = load_checkpoint(str(tmp_path / "run")), load_checkpoint(str(exported))
    assert as_values(trained.model.config) == as_values(parent.model.config) != as_values(config.model)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.params, parent.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    assert trained.tokenizer.hash == parent.tokenizer.hash


def test_a_reward_model_comes_back_as_one(convert, reward_model, tmp_path, capsys):
    assert convert("export", f"--checkpoint={reward_model}", f"--output={tmp_path / 'hf'}") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    before, after = load_checkpoint(str(reward_model)), load_checkpoint(str(tmp_path / "hf"))
    assert convert("check", f"--checkpoint={tmp_path / 'hf'}") == 78
    assert "is a reward model; check compares language models" in capsys.readouterr().err
    assert not after.generates
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_a_reward_model_without_statistics_cannot_be_normalized(convert, reward_model, tmp_path):
    folder, imported = tmp_path / "hf", tmp_path / "imported"
    assert convert("export", f"--checkpoint={reward_model}", f"--output={folder}") == 0
    assert convert("import", f"--checkpoint={folder}", f"--output={imported}") == 0
    for path in (folder, imported):
        name = f"reward.normalize needs.*reward.model={path} comes from Hugging Face.*reward.normalize=false"
        with pytest.raises(ConfigError, match=name):
            read_statistics(str(path), find_checkpoint(path), normalize=True)
        assert read_statistics(str(path), find_checkpoint(path), normalize=False) == (0.0, 1.0)


def test_an_exported_reward_model_scores_and_initializes_a_critic(
    convert, chat_model, reward_model, rows, tmp_path, capsys
):
    folder = tmp_path / "hf"
    assert convert("export", f"--checkpoint={reward_model}", f"--output={folder}") == 0
    printed, critics = [], []
    for path in (reward_model, folder):
        capsys.readouterr()
        output = tmp_path / "scores.jsonl"
        score_rows(load_checkpoint(str(path)), str(rows / "pairs.jsonl"), rename=(), output=output)
        printed.append(capsys.readouterr().out)
        small = {"model.num_layers": "1", "model.width": "32", "model.max_length": "64"}
        small |= {"data.sequence_length": "64", "rollout.sampling.max_new_tokens": "8"}
        fields = small | {"reward.model": path, "reward.normalize": "false"}
        program = build_program(parse_config("ppo_preferences.py:tiny", fields))
        critics.append(ppo.initial_params(program, find_checkpoint(chat_model))["critic"])
    assert printed[0] == printed[1]
    jax.tree.map(np.testing.assert_array_equal, *critics)


def test_check_finds_an_export_equal_in_transformers_and_a_changed_one_different(
    convert, exported, capsys, monkeypatch
):
    pytest.importorskip("torch", reason="check needs torch: pip install 'jaxllm[parity]'")
    pytest.importorskip("transformers", reason="check needs transformers: pip install 'jaxllm[parity]'")
    assert convert("check", f"--checkpoint={exported}") == 0
    assert "32 of 32 greedy tokens are equal" in capsys.readouterr().out
    monkeypatch.setattr(convert_module, "load_hf", lambda *args, **kwargs: changed(*load_hf(*args, **kwargs)))
    assert convert("check", f"--checkpoint={exported}") == 1
    assert "logits differ from those of transformers by" in capsys.readouterr().err


def changed(config, params):
    return config, jax.tree.map(lambda leaf: 1.01 * leaf, params)


def test_an_export_keeps_what_generation_config_says_of_its_source(convert, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    ids = json.loads((exported / "generation_config.json").read_text())
    kept = {"temperature": 0.6, "do_sample": True, "transformers_version": "4.51.0"}
    (tmp_path / "hf" / "generation_config.json").write_text(
        json.dumps(kept | {"eos_token_id": ids["eos_token_id"][0]})
    )
    assert convert("export", f"--checkpoint={tmp_path / 'hf'}", f"--output={tmp_path / 'again'}") == 0
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == kept | ids
    for file in exported.iterdir():
        if file.name != "generation_config.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bfloat16_stays_bfloat16_through_import_and_export(convert, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    weights = {
        name: value.astype("bfloat16") for name, value in load_file(exported / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    assert convert("import", f"--checkpoint={tmp_path / 'hf'}", f"--output={tmp_path / 'run'}") == 0
    for source in ("hf", "run"):
        output = tmp_path / f"from_{source}"
        assert convert("export", f"--checkpoint={tmp_path / source}", f"--output={output}") == 0
        assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
        saved = load_file(output / "model.safetensors")
        assert all(np.array_equal(saved[name], value) for name, value in weights.items())
        assert {value.dtype for value in saved.values()} == {np.dtype("bfloat16")}


def test_rows_of_the_embedding_beyond_the_tokenizer_are_kept(convert, exported, tmp_path):
    padded, again = tmp_path / "padded", tmp_path / "again"
    shutil.copytree(exported, padded)
    config = json.loads((exported / "config.json").read_text())
    weights = load_file(exported / "model.safetensors")
    rows = np.random.default_rng(0).normal(size=(24, config["hidden_size"])).astype(np.float32)
    weights["model.embed_tokens.weight"] = np.concatenate([weights["model.embed_tokens.weight"], rows])
    save_file(weights, padded / "model.safetensors")
    config["vocab_size"] += len(rows)
    (padded / "config.json").write_text(json.dumps(config))
    assert convert("import", f"--checkpoint={padded}", f"--output={tmp_path / 'run'}") == 0
    assert convert("export", f"--checkpoint={tmp_path / 'run'}", f"--output={again}") == 0
    assert json.loads((again / "config.json").read_text())["vocab_size"] == config["vocab_size"]
    saved = load_file(again / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(np.array_equal(saved[name], value) for name, value in weights.items())


def test_an_import_is_a_checkpoint_of_step_0(convert, exported, tmp_path):
    assert convert("import", f"--checkpoint={exported}", f"--output={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "checkpoints" / "0" / "manifest.json").exists()
    before, after = load_checkpoint(str(exported)), load_checkpoint(str(tmp_path / "run"))
    assert after.kind == before.kind
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.metadata["from"] == {"path": str(exported), "hash": checkpoint_hash(exported)}


def test_an_import_keeps_a_chat_template_of_its_own(convert, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    template = (exported / "chat_template.jinja").read_text() + "{# another #}"
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    assert convert("import", f"--checkpoint={tmp_path / 'hf'}", f"--output={tmp_path / 'run'}") == 0
    loaded = load_checkpoint(str(tmp_path / "run"))
    assert checkpoint_template(loaded).source == template


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "name what to do, one of export, import, check"),
        (("export", "--output=x"), "--checkpoint=FOLDER is missing"),
        (("export", "--checkpoint=x"), "--output=FOLDER is missing"),
        (
            ("export", "--checkpoint=x", "--output=x", "--dtype=int8"),
            "--dtype=int8: choose one of float32, bfloat16, float16",
        ),
        (
            ("export", "--checkpoint=x", "--output=x", "--max_shard_gb=0"),
            "--max_shard_gb=0.0 must be above 0",
        ),
        (("import", "--checkpoint=x", "--output=x", "--adapters"), "--adapters is for export"),
        (("export", "--checkpoint=x", "--output=x", "--adapters", "--dtype=bfloat16"), "leave out --dtype"),
        (("import", "--checkpoint=.", "--output=new"), "is no Hugging Face model"),
        (("check", "--checkpoint=."), "is no Hugging Face model"),
        (("export", "--checkpoint=.", "--output=."), "--output=. is not empty"),
    ],
)
def test_bad_flags_are_errors_of_one_line(convert, arguments, line, capsys):
    assert convert(*arguments) == 78
    (message,) = capsys.readouterr().err.splitlines()
    assert line in message
