"""Checkpoints and Hugging Face folders load over all devices of a process, in the dtype that is wanted."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base.models import model as model_shape
from jaxllm.config import parse
from jaxllm.models import ModelConfig, build_model
from jaxllm.models.hf import save_hf
from jaxllm.parallel.sharding import path_name, rule_for
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs import checkpoints
from jaxllm.runs.checkpoints import load_checkpoint, local_mesh
from jaxllm.serve.memory import sizes_on

CONFIG = replace(
    parse(ModelConfig, model_shape("tiny")), num_layers=2, num_heads=8, num_kv_heads=4, mlp_width=64, width=32
)


@pytest.fixture(scope="module")
def hf_folder(chat_model, tmp_path_factory):
    """A Hugging Face folder in bfloat16 whose heads divide over 4 devices, not over 8."""
    trained = load_checkpoint(chat_model)
    config = replace(CONFIG, vocab_size=trained.model.config.vocab_size, param_dtype="bfloat16")
    params = jax.jit(build_model(config).init)(jax.random.key(0))
    folder = tmp_path_factory.mktemp("hf")
    files = {
        path.name: path.read_bytes() for path in trained.folder.iterdir() if path.name.startswith("tokenizer")
    }
    save_hf(folder, config, params, tokenizer=files, dtype="bfloat16")
    return folder


@pytest.mark.parametrize(
    ("devices", "changes", "tensor", "fsdp"),
    [
        (8, {}, 4, 2),
        (8, {"num_kv_heads": 8}, 8, 1),
        (6, {}, 2, 3),  # as many devices as divide the heads, the others along fsdp
        (8, {"num_kv_heads": 1}, 1, 8),
        (8, {"mlp_width": 66}, 2, 4),
        (1, {}, 1, 1),
    ],
)
def test_heads_are_split_over_as_many_devices_as_divide_them(monkeypatch, devices, changes, tensor, fsdp):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    shape = local_mesh(replace(CONFIG, **changes)).shape
    assert (shape["data"], shape["tensor"], shape["fsdp"]) == (1, tensor, fsdp)


def complete(loaded):
    """Sampled tokens of three prompts."""
    sampling = SamplingConfig(1.0, top_k=None, top_p=None, min_p=None, max_new_tokens=8)
    return generate(
        loaded.model,
        loaded.params,
        [[1], [1, 2], [1, 2, 3]],
        sampling=sampling,
        stop_ids=(0,),
        keys=jax.random.split(jax.random.key(1), 3),
    ).tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["run", "hf"])
def test_each_array_is_sharded_and_cast_and_generates_what_one_device_does(
    chat_model, hf_folder, kind, dtype, capsys
):
    path = chat_model if kind == "run" else hf_folder
    single, loaded = load_checkpoint(path, dtype=dtype), load_checkpoint(path, local_mesh, dtype=dtype)
    assert loaded.mesh.size == 8
    assert loaded.model.config.compute_dtype == dtype
    for (name, x), one in zip(
        jax.tree_util.tree_leaves_with_path(loaded.params), jax.tree.leaves(single.params), strict=True
    ):
        assert x.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(x, one)
        # A shard has the share of the axes of its rule, but for those that do not divide its sizes.
        axes = zip(x.shape, rule_for(path_name(name)), strict=False)
        sizes = [(size, loaded.mesh.shape[axis]) for size, axis in axes if axis]
        shards = math.prod(n for size, n in sizes if size % n == 0)
        assert x.addressable_shards[0].data.size * shards == x.size
    if (kind, dtype) == ("hf", "float32"):
        assert complete(loaded) == complete(single)


def test_what_divides_over_no_axis_is_whole_and_said_once(chat_model, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:7])
    loaded = load_checkpoint(chat_model, local_mesh)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(loaded.params))
    (line,) = capsys.readouterr().err.splitlines()
    assert "arrays, such as blocks/attention/key/kernel, are whole on each of 7 devices" in line


def test_arrays_that_are_cast_are_read_one_after_the_other(chat_model, monkeypatch):
    read, reads = checkpoints.read_arrays, []
    monkeypatch.setattr(
        checkpoints, "read_arrays", lambda folder, tree, **k: reads.append(tree) or read(folder, tree, **k)
    )
    load_checkpoint(chat_model, dtype="bfloat16")
    assert max(len(jax.tree.leaves(tree)) for tree in reads) == 1
    reads.clear()
    load_checkpoint(chat_model)
    assert len(reads) == 1


def test_the_plan_counts_what_one_device_holds(chat_model):
    loaded = load_checkpoint(chat_model, local_mesh)
    sizes = sizes_on(local_mesh, loaded.model.config)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded.params))
    assert sizes.param_bytes == held
    assert sizes.tensor == loaded.mesh.shape["tensor"]


def test_random_weights_are_those_of_one_device(chat_model):
    one = load_checkpoint(chat_model, untrained=True).params
    jax.tree.map(
        np.testing.assert_array_equal, load_checkpoint(chat_model, local_mesh, untrained=True).params, one
    )
