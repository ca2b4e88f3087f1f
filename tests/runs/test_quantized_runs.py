"""QLoRA: a run on quantized frozen kernels trains, resumes, is loaded and leaves as it was trained."""

import json

import jax
import numpy as np
import pytest
from tiny_runs import parse_config, train_stage

from jaxllm.errors import ConfigError
from jaxllm.models.lora import ADAPTERS
from jaxllm.models.quantize import Quantized, quantize
from jaxllm.parallel.sharding import MeshConfig, make_mesh, placed
from jaxllm.runs.checkpoints import load_checkpoint, read_policy
from jaxllm.runs.convert import export_checkpoint
from jaxllm.runs.program import tree_bytes
from jaxllm.stages import build_program
from jaxllm.training.state import split_params
from jaxllm.training.step_folder import find_checkpoint

QLORA = {"model.lora.rank": "2", "model.lora.quantize": "nf4"}


@pytest.fixture(scope="module")
def run(chat_model, rows, tmp_path_factory):
    """Two steps, then two more after a stop."""
    folder = tmp_path_factory.mktemp("qlora") / "run"
    fields = QLORA | {"data.train": str(rows / "chats.jsonl"), "training.checkpoint_every": "2"}
    for steps in ("2", "4"):
        train_stage("sft_chat", folder, str(chat_model), **fields | {"training.steps": steps})
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumes_with_the_kernels_that_it_began_with(run, chat_model):
    loaded = load_checkpoint(run)
    assert (run / "checkpoints" / "4").exists()
    base = load_checkpoint(chat_model).params["blocks"]
    for layer, name in (("attention", "query"), ("mlp", "down")):
        found, kernel = loaded.params["blocks"][layer][name]["kernel"], base[layer][name]["kernel"]
        assert isinstance(found, Quantized)
        jax.tree.map(np.testing.assert_array_equal, found, quantize(kernel, "nf4"))
    trained = jax.tree.leaves(split_params(loaded.params, "/lora/b$")[0])
    assert all(np.abs(x).max() > 0 for x in trained)
    arrays = json.loads((find_checkpoint(run) / "arrays.json").read_text())
    assert not [name for name in arrays if "kernel" in name]


def test_the_state_is_as_small_as_planned(chat_model):
    config = parse_config("sft_chat.py:tiny", QLORA | {"model.width": "128", "model.mlp_width": "256"})
    program = build_program(config)
    frozen = split_params(program.abstract_state.params, ADAPTERS)[1]["blocks"]
    kernels = jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, Quantized))
    bits = [8 * tree_bytes(x) / np.prod(x.shape) for x in kernels if isinstance(x, Quantized)]
    assert bits == [4.25] * 7  # 4 a code, 16 a scale of 64
    assert "float32 over float32 and nf4 (frozen kernels)" in program.describe()
    plain = build_program(parse_config("sft_chat.py:tiny", {"model.width": "128", "model.mlp_width": "256"}))
    adapters = program.num_trained
    assert f"{plain.num_trained + adapters:,} parameters" in program.describe()


def test_kernels_that_are_quantized_cannot_train():
    config = parse_config("sft_chat.py:tiny", QLORA | {"optimizer.trainable": "mlp/"})
    with pytest.raises(ConfigError, match=r"optimizer\.trainable is found in the path of quantized kernels"):
        build_program(config)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_shards_of_a_mesh_hold_what_one_device_holds(kind, chat_model):
    fields = QLORA | {"model.lora.quantize": kind, "model.num_layers": "1", "model.width": "32"}
    fields |= {"model.max_length": "64", "data.sequence_length": "64", "data.batch_size": "8"}
    program = build_program(parse_config("sft_chat.py:tiny", fields))
    shapes, folder = program.abstract_state.params, find_checkpoint(chat_model)
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    sharded = read_policy(folder, placed(here, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))))
    jax.tree.map(np.testing.assert_array_equal, sharded, read_policy(folder, here))
    down = sharded["blocks"]["mlp"]["down"]["kernel"]
    assert not down.codes.sharding.is_fully_replicated


def test_it_leaves_as_what_it_was_trained_as(run, tmp_path, capsys):
    export_checkpoint(str(run), tmp_path / "hf", dtype=None, max_shard_bytes=10**9)
    assert "the frozen kernels as nf4 rounded them" in capsys.readouterr().out
    ours, theirs = load_checkpoint(run), load_checkpoint(tmp_path / "hf")
    tokens = np.arange(12).reshape(1, 12)
    logits = [jax.jit(each.model.logits)(each.params, tokens) for each in (ours, theirs)]
    np.testing.assert_allclose(*logits, atol=1e-4)
