"""The same weights give the same logits in transformers: small random models built from config objects."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import RopeScaling, build_model

torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'jaxllm[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers: pip install 'jaxllm[parity]'"
)

ORIGINAL_LENGTH = 64  # the tests use twice as many tokens
LLAMA3 = RopeScaling("llama3", 8.0, ORIGINAL_LENGTH, 1.0, 4.0, beta_fast=32.0, beta_slow=1.0)
YARN = RopeScaling("yarn", 4.0, ORIGINAL_LENGTH, 1.0, 4.0, beta_fast=8.0, beta_slow=1.0)


def reference_model(family, config, **options):
    """A random transformers model of the sizes of `config`, with noise on every parameter."""
    scaling = config.rope_scaling
    rope = {
        "none": {"rope_type": "default"},
        "llama3": {
            "rope_type": "llama3",
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
        },
        "yarn": {"rope_type": "yarn", "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow},
    }[scaling.kind]
    if scaling.kind != "none":
        rope |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_length}
    hf_config = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=256,
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_theta": config.rope_theta, **rope},
        attn_implementation="eager",
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def copied_params(hf_model, config):
    """The weights of a transformers model as our tree: matrices transposed to [in, out], layers stacked."""
    weights = {name: tensor.numpy() for name, tensor in hf_model.state_dict().items()}

    def stacked(name):
        layers = [weights[f"model.layers.{i}.{name}"] for i in range(config.num_layers)]
        return np.stack([layer.T for layer in layers])

    def linear(name):
        leaves = {"kernel": stacked(f"{name}.weight")}
        if f"model.layers.0.{name}.bias" in weights:
            leaves["bias"] = stacked(f"{name}.bias")
        return leaves

    attention = {
        ours: linear(f"self_attn.{theirs}_proj")
        for ours, theirs in [("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")]
    }
    if config.qk_norm:
        attention["query_norm"] = {"scale": stacked("self_attn.q_norm.weight")}
        attention["key_norm"] = {"scale": stacked("self_attn.k_norm.weight")}
    params = {
        "embed": {"table": weights["model.embed_tokens.weight"]},
        "blocks": {
            "attention": attention,
            "attention_norm": {"scale": stacked("input_layernorm.weight")},
            "mlp": {name: linear(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
        },
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        params["head"] = {"kernel": weights["lm_head.weight"].T}
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize(
    ("family", "options", "fields"),
    [
        pytest.param("Llama", {}, {"rope_scaling": LLAMA3}, id="llama3-scaling"),
        pytest.param("Llama", {}, {"rope_scaling": YARN, "tie_embeddings": False}, id="yarn-untied"),
        pytest.param(
            "Llama",
            {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
            {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "activation": "gelu"},
            id="llama-biases-geglu",
        ),
        pytest.param("Qwen2", {}, {"qkv_bias": True, "rope_scaling": YARN}, id="qwen2-yarn"),
        pytest.param("Qwen3", {}, {"qk_norm": True, "head_dim": 16}, id="qwen3-wide-heads"),
        pytest.param("Mistral", {"sliding_window": 7}, {"sliding_window": 7}, id="mistral-window"),
    ],
)
def test_logits_equal_those_of_transformers(tiny, family, options, fields):
    config = replace(tiny, num_layers=2, **fields)
    hf_model = reference_model(family, config, **options)
    model = build_model(config)
    params = copied_params(hf_model, config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 2 * ORIGINAL_LENGTH))
    with torch.no_grad():
        expected = hf_model(input_ids=torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(model.logits)(params, tokens)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)
