"""A run with adapters leaves merged or as adapters, which every script takes where it takes the run."""

import json

import jax
import numpy as np
import pytest
from tiny_runs import train_stage

from jaxllm.errors import ConfigError
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint, read_base
from jaxllm.runs.convert import export_adapters, export_checkpoint
from jaxllm.training.step_folder import find_checkpoint

LORA = {"model.lora.rank": "2", "model.lora.alpha": "4", "model.lora.targets": "query|down"}
TOKENS = np.arange(12).reshape(1, 12)


@pytest.fixture(scope="module")
def run(chat_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    fields = LORA | {"data.train": str(rows / "chats.jsonl")}
    train_stage("sft_chat", folder, str(chat_model), **fields | {"training.steps": "2"})
    return folder


@pytest.fixture(scope="module")
def adapters(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapters"
    export_adapters(str(run), folder)
    return folder


def logits(path):
    loaded = load_checkpoint(path)
    return jax.jit(loaded.model.logits)(loaded.params, TOKENS)


def test_adapters_are_loaded_as_the_run_that_they_are_from(run, adapters):
    ours, theirs = load_checkpoint(run), load_checkpoint(adapters)
    np.testing.assert_array_equal(logits(run), logits(adapters))
    assert (theirs.generates, theirs.conversational) == (True, True)
    assert theirs.tokenizer.pieces == ours.tokenizer.pieces
    messages = [{"role": "user", "content": "one and two?"}]
    assert checkpoint_template(theirs).prompt(messages) == checkpoint_template(ours).prompt(messages)
    assert read_base(adapters).path == adapters / "base"  # the run's, as a Hugging Face model


def test_an_export_has_the_adapters_merged(run, adapters, tmp_path):
    for name, path in (("a", run), ("b", adapters)):
        export_checkpoint(str(path), tmp_path / name, dtype=None, max_shard_bytes=10**9)
        np.testing.assert_allclose(logits(tmp_path / name), logits(run), atol=1e-5)
    assert load_checkpoint(tmp_path / "a").model.config.lora.rank is None


def test_a_base_that_is_a_hugging_face_model_is_named_where_it_is(adapters, tmp_path):
    export_adapters(str(adapters), tmp_path / "again")
    fields = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(adapters / "base")
    assert not (tmp_path / "again" / "base").exists()
    names = "adapter_model.safetensors"
    assert (tmp_path / "again" / names).read_bytes() == (adapters / names).read_bytes()


def test_training_continues_with_them(adapters, rows, tmp_path):
    fields = LORA | {"data.train": str(rows / "chats.jsonl")}
    # The same layers by another pattern.
    fields |= {"model.lora.targets": "attention/query|mlp/down", "training.steps": "1"}
    train_stage("sft_chat", tmp_path / "run", str(adapters), **fields | {"optimizer.learning_rate": "1e-9"})
    np.testing.assert_allclose(logits(tmp_path / "run"), logits(adapters), atol=1e-5)
    assert read_base(find_checkpoint(tmp_path / "run")) == read_base(adapters).hashed()
    with pytest.raises(ConfigError, match=r"--init_from=.* has adapters .*: rank 2 -> 3, targets"):
        train_stage(
            "sft_chat",
            tmp_path / "x",
            str(adapters),
            **fields | {"model.lora.rank": "3", "model.lora.targets": ""},
        )


def test_a_run_without_adapters_has_none_to_export(chat_model, tmp_path):
    with pytest.raises(ConfigError, match="has no adapters: leave out --adapters"):
        export_adapters(str(chat_model), tmp_path / "x")
