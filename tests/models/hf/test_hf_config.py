"""config.json of published models is read; what it says that is not supported is named."""

import json
import math

import jax
import pytest
from published import LLAMA3_ROPE, PUBLISHED
from tiny_runs import parse_config

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models import build_model
from jaxllm.models.hf import load_hf_config
from jaxllm.runs.weights import with_model_of
from jaxllm.stages import build_program


def write_config(folder, raw):
    """The folder of a model whose weights are absent."""
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_model_has_the_published_number_of_parameters(name, tmp_path):
    raw, published = PUBLISHED[name]
    model = build_model(load_hf_config(write_config(tmp_path, raw)))
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == published


def test_a_run_is_planned_from_a_config_alone(tmp_path):
    """`train.py --dry_run --init_from=FOLDER`, but for the compiler: the weights need not be there."""
    folder = write_config(tmp_path, PUBLISHED["Llama-3.1-8B"][0])
    config = parse_config("sft_chat.py:tiny", {"data.batch_size": "8", "mesh.fsdp": "8", "mesh.data": "1"})
    program = build_program(with_model_of(config, str(folder)))
    assert "model: 8,030,261,248 parameters" in program.describe()


def config_of(tmp_path, raw):
    return load_hf_config(write_config(tmp_path, raw))


# What transformers 4 wrote of each published model, as transformers 5 writes it.
IN_BOTH_DIALECTS = {
    "Llama-3.1-8B": {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0, "rope_theta": 5e5}},
    "Mistral-7B-v0.1": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "Qwen2.5-7B": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "layer_types": ["full_attention"] * 28,
        "sliding_window": None,
    },
    "SmolLM3-3B": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "Phi-4": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 25e4, "partial_rotary_factor": 1.0},
    },
    "Gemma-2-9B": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "layer_types": ["sliding_attention", "full_attention"] * 21,
    },
    "Gemma-3-1B": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
    },
}
OLD_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")


@pytest.mark.parametrize("name", list(IN_BOTH_DIALECTS))
def test_both_dialects_are_the_same_model(name, tmp_path):
    old, _ = PUBLISHED[name]
    kept = {key: value for key, value in old.items() if key not in (*OLD_FIELDS, "torch_dtype")}
    new = kept | {"dtype": "bfloat16"} | IN_BOTH_DIALECTS[name]
    assert config_of(tmp_path, new) == config_of(tmp_path, old)
    assert config_of(tmp_path, old | new) == config_of(tmp_path, old)  # some files say it in both ways


@pytest.mark.parametrize(
    ("pattern", "kinds"), [(2, ("local", "global")), (6, ("local",) * 5 + ("global",)), (1, ("global",))]
)
def test_the_window_pattern_of_gemma_3_is_read(pattern, kinds, tmp_path):
    raw, _ = PUBLISHED["Gemma-3-1B"]
    raw = {key: value for key, value in raw.items() if key != "_sliding_window_pattern"}
    config = config_of(tmp_path, raw | {"sliding_window_pattern": pattern})
    assert config.layer_pattern == kinds
    assert config.sliding_window == (None if kinds == ("global",) else 512)


def test_layers_without_rope_are_read_from_the_list_or_the_interval(tmp_path):
    raw, _ = PUBLISHED["SmolLM3-3B"]
    assert config_of(tmp_path, raw).layer_pattern == ("global",) * 3 + ("nope",)
    by_interval = raw | {"no_rope_layers": None, "no_rope_layer_interval": 2}
    assert config_of(tmp_path, by_interval).layer_pattern == ("global", "nope")


def test_a_rope_scaling_may_be_named_by_type(tmp_path):
    raw, _ = PUBLISHED["Qwen2.5-7B"]
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_of(tmp_path, raw | {"rope_scaling": yarn | {"type": "yarn"}})
    assert config.rope_scaling.kind == "yarn"
    assert config == config_of(tmp_path, raw | {"rope_scaling": yarn | {"rope_type": "yarn", "type": "yarn"}})


PHI_4_MINI = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48},
    "original_max_position_embeddings": 4096,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Phi-4", PHI_4_MINI, "rope_scaling of type 'longrope' is not supported, only linear, llama3, yarn"),
        ("Phi-4", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported, only 1.0"),
        ("Phi-4", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("Qwen3-0.6B", {"model_type": "mamba"}, r"model_type='mamba' is not supported \(supported: llama, q"),
        ("Qwen3-0.6B", {"model_type": "t5"}, "t5 is an encoder-decoder; only decoders are supported"),
        ("Qwen3-0.6B", {"is_encoder_decoder": True}, "qwen3 is an encoder-decoder; only decoders"),
        ("Qwen3-0.6B", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supp"),
        ("Qwen3-0.6B", {"rope_scaling": {"type": "yarn"}}, "'yarn' needs a factor, not None"),
        ("Qwen3-0.6B", {"hidden_act": "relu2"}, "hidden_act='relu2' is not supported: silu"),
        ("Qwen3-0.6B", {"new_trick": True}, "unknown field new_trick=True: it may change what is computed"),
        ("Qwen3-0.6B", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported, only"),
        ("Qwen3-0.6B", {"hidden_size": None}, "hidden_size=None must be a positive integer"),
        ("Qwen3-0.6B", {"hidden_size": "1024"}, "hidden_size='1024' must be a positive integer"),
        ("Qwen3-0.6B", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ("Qwen3-0.6B", {"num_key_value_heads": 7}, "num_kv_heads=7 does not divide model.num_heads=16"),
        ("Qwen3-0.6B", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ("Qwen3-0.6B", {"rope_theta": None}, "rope_theta is missing"),
        ("Qwen3-0.6B", {"rope_theta": [1]}, "config.json has a field of a wrong type"),
        (
            "Qwen3-0.6B",
            {"layer_types": ["full_attention"]},
            "layer_types has 1 entries for num_hidden_layers=28",
        ),
        (
            "Qwen3-0.6B",
            {"layer_types": ["linear_attention"] * 28},
            "layer_types with 'linear_attention' are not",
        ),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for num_hidden_layers=36"),
        (
            "Llama-3.1-8B",
            {"original_max_position_embeddings": 4096},
            "embeddings=4096 contradicts rope_scaling",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_config_that_is_not_supported_is_an_error_that_names_the_field(name, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        config_of(tmp_path, PUBLISHED[name][0] | changes)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[1]", '{"model_type": "qwen3"', b"\xff\xfe"], ids=repr)
def test_a_corrupt_config_is_named(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: ") as error:
        load_hf_config(tmp_path)
    assert "\n" not in str(error.value)
