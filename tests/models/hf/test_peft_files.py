"""Adapters in PEFT's files: written as PEFT writes them, and read back; what is not supported is named."""

import json

import jax
import numpy as np
import pytest
from record import RECORDED, weights_of
from safetensors.numpy import load_file, save_file

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models import build_model, build_scalar_model
from jaxllm.models.config import LoRAConfig
from jaxllm.models.hf.peft import load_peft_config, read_peft, save_peft
from jaxllm.models.lora import TRAINED, adapted_layers
from jaxllm.parallel.sharding import MeshConfig, make_mesh, placed
from jaxllm.runs.checkpoints import read_adapters, read_base, read_kind, read_policy
from jaxllm.training.state import split_params

FAMILIES = json.loads(RECORDED.read_text())
LORA = LoRAConfig(4, 6.0, True, 0.1, "query|down", "none")


def write_base(folder, name="llama2"):
    folder.mkdir()
    recorded = FAMILIES[name]
    (folder / "config.json").write_text(json.dumps(recorded["config"]))
    save_file(weights_of(recorded["tensors"]), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def write_adapters(folder, base, build=build_model, lora=LORA):
    """Random adapters of a base, in PEFT's files; returns them."""
    from dataclasses import replace

    from jaxllm.models.hf import load_hf_config

    model = build(replace(load_hf_config(base), lora=lora))
    draw = np.random.default_rng(0)
    shapes = split_params(jax.eval_shape(model.init, jax.random.key(0)), TRAINED)[0]
    trained = jax.tree.map(lambda x: draw.normal(size=x.shape).astype("f"), shapes)
    save_peft(folder, lora, trained, base)
    return trained


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_names_and_shapes_are_those_of_peft(base, tmp_path):
    write_adapters(tmp_path / "a", base)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.2"
    assert tensors[f"{layer}.self_attn.q_proj.lora_A.weight"].shape == (4, 32)  # [rank, in]
    assert tensors[f"{layer}.mlp.down_proj.lora_B.weight"].shape == (32, 4)  # [out, rank]
    assert len(tensors) == 2 * 2 * 3
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.1}
    wanted |= {"use_rslora": True, "target_modules": ["down_proj", "q_proj"], "modules_to_save": None}
    assert fields | wanted | {"base_model_name_or_path": str(base)} == fields


@pytest.mark.parametrize(("build", "generates"), [(build_model, True), (build_scalar_model, False)])
def test_what_is_written_is_read_back(build, generates, base, tmp_path):
    written = write_adapters(tmp_path / "a", base, build)
    config = load_peft_config(tmp_path / "a")
    assert adapted_layers(config.lora, config) == ["attention/query", "mlp/down"]
    assert (config.lora.rank, config.lora.alpha, config.lora.rank_stabilized) == (4, 6.0, True)
    assert config.lora.dropout == 0.1
    assert read_kind(tmp_path / "a").generates == generates
    assert read_base(tmp_path / "a").path == base
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, read_adapters(tmp_path / "a", shapes), written)
    sharded = read_policy(tmp_path / "a", placed(shapes, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))))
    whole = read_policy(tmp_path / "a", shapes)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def test_short_names_that_would_match_other_layers_are_made_longer(tmp_path):
    base = write_base(tmp_path / "base", "gpt2")
    lora = LoRAConfig(2, 4.0, False, 0.0, "attention/output|mlp/up", "none")
    write_adapters(tmp_path / "a", base, lora=lora)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["attn.c_proj", "c_fc"]  # not mlp.c_proj
    assert fields["fan_in_fan_out"] is True
    config = load_peft_config(tmp_path / "a")
    assert adapted_layers(config.lora, config) == ["attention/output", "mlp/up"]


def test_adapters_of_parts_of_a_fused_layer_have_no_place(tmp_path):
    base = write_base(tmp_path / "base", "phi3")
    with pytest.raises(
        ConfigError, match=r"attention/query is a part of model\.layers\.\*\.self_attn\.qkv_proj"
    ):
        write_adapters(tmp_path / "a", base)
    assert not (tmp_path / "a").exists()


def test_what_trained_beside_the_adapters_has_no_place(base, tmp_path):
    with pytest.raises(ConfigError, match="final_norm/scale trained beside the adapters and has no place"):
        save_peft(tmp_path / "a", LORA, {"final_norm": {"scale": np.ones(3)}}, base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8} is not supported"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"new_trick": 3}, "new_trick=3 is not supported"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported, only 'LORA'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' is not supported, only 'CAUSAL_LM' and"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported, only those that leave"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save=\['embed_tokens'\] is not supported"),
        ({"r": 0}, "model.lora.rank=0 must be at least 1"),
        (
            {"base_model_name_or_path": "meta-llama/Llama-3.1-8B"},
            "meta-llama/Llama-3.1-8B' is no folder with a Hugging Face model: download it",
        ),
    ],
)
def test_fields_that_are_not_supported_are_named(fields, message, base, tmp_path):
    write_adapters(tmp_path / "a", base)
    change(tmp_path / "a", **fields)
    with pytest.raises(ConfigError, match=message):
        read_peft(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda names: [name for name in names if ".1.mlp" not in name],
            r"layers\.\*\.mlp\.down_proj has adapters in 2 of 3 layers",
        ),
        (
            lambda names: [*names, "base_model.model.model.embed_tokens.lora_embedding_A"],
            r"embed_tokens\.lora_embedding_A is no adapter of a layer of llama",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage, message, base, tmp_path):
    write_adapters(tmp_path / "a", base)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensors.get(name, np.zeros((4, 32), "f")) for name in damage(list(tensors))}, file)
    with pytest.raises(ConfigError, match=message):
        read_peft(tmp_path / "a")


def test_a_reward_model_without_its_head_is_named(base, tmp_path):
    write_adapters(tmp_path / "a", base)
    change(tmp_path / "a", task_type="SEQ_CLS")
    with pytest.raises(CheckpointError, match=r"score\.weight, a reward model's head, is missing"):
        read_peft(tmp_path / "a")


def test_adapters_of_another_rank_and_pickles_are_named(base, tmp_path):
    write_adapters(tmp_path / "a", base)
    change(tmp_path / "a", r=8)
    config = load_peft_config(tmp_path / "a")
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has shape .*, not \(3, 32, 8\)"):
        read_adapters(tmp_path / "a", shapes)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin is a pickle"):
        read_peft(tmp_path / "a")
