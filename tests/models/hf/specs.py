"""A small model of each family, as transformers configures it, with every option that the family has."""

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# name -> (transformers' name, what differs from SIZES)
SPECS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral_nemo": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm2": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi4": ("Phi3", {"sliding_window": None}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 7},
    ),
    "gemma3_scaled": ("Gemma3Text", {"head_dim": 16, "sliding_window": 6, "rope_parameters": LINEAR}),
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128},
    ),
}


def settings(name: str) -> dict:
    """The arguments of the transformers config."""
    family, options = SPECS[name]
    if family == "GPT2":
        return {
            key: value for key, value in SIZES.items() if key.endswith("_id") or key == "vocab_size"
        } | options
    return SIZES | options
