"""config.json of published models, as their authors wrote it, and how many parameters each model has.

Counts are those of the published safetensors, with the embedding once where it is tied. Gemma 3's with a
`text_config` see images too: their image encoder is taken off.
"""

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "initializer_range": 0.02}
LLAMA = SPECIAL | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
}
LLAMA3 = LLAMA | {"max_position_embeddings": 131072, "rope_theta": 500000.0, "vocab_size": 128256}
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SMOLLM2 = LLAMA | {
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
QWEN = SPECIAL | {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "sliding_window": None,
}
MISTRAL = SPECIAL | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
}
PHI3 = SPECIAL | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GEMMA3 = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "use_cache": True,
    "vocab_size": 262144,
}


def sees_images(**text):
    """The config.json of a Gemma 3 with an image encoder: what its text model has by default is left out."""
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text |= {"model_type": "gemma3_text", "rope_scaling": scaling, "sliding_window": 1024}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    }


def image_encoder(width):
    """The parameters of Gemma 3's image encoder (SigLIP, 27 layers) and of its projection to `width`."""
    layer = 4 * (1152 + 1) * 1152 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    embeddings = 3 * 14 * 14 * 1152 + 1152 + 4096 * 1152
    return embeddings + 27 * layer + 2 * 1152 + 1152 * width + 1152


def sizes(layers, width, mlp_width, heads, kv_heads):
    """The fields that most families name alike."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# name -> (config.json, parameters)
PUBLISHED = {
    "Llama-2-7B": (
        LLAMA
        | sizes(32, 4096, 11008, 32, 32)
        | {"max_position_embeddings": 4096, "vocab_size": 32000, "rms_norm_eps": 1e-5},
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        LLAMA3 | sizes(32, 4096, 14336, 32, 8) | {"rope_scaling": LLAMA3_ROPE | {"factor": 8.0}},
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        LLAMA3
        | sizes(16, 2048, 8192, 32, 8)
        | {"head_dim": 64, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "SmolLM2-135M": (SMOLLM2 | sizes(30, 576, 1536, 9, 3), 134_515_008),
    "SmolLM2-1.7B": (SMOLLM2 | sizes(24, 2048, 8192, 32, 32) | {"rope_theta": 130000}, 1_711_376_384),
    "SmolLM3-3B": (
        SPECIAL
        | sizes(36, 2048, 11008, 16, 4)
        | {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
        3_075_098_624,
    ),
    "Qwen2.5-7B": (
        QWEN
        | sizes(28, 3584, 18944, 28, 4)
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "sliding_window": 131072,
            "use_mrope": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        QWEN3 | sizes(28, 1024, 3072, 16, 8) | {"max_window_layers": 28, "tie_word_embeddings": True},
        596_049_920,
    ),
    "Qwen3-32B": (QWEN3 | sizes(64, 5120, 25600, 64, 8) | {"max_window_layers": 64}, 32_762_123_264),
    "Mistral-7B-v0.1": (
        MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        MISTRAL
        | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
        7_248_023_552,
    ),
    "OLMo-2-1124-7B": (
        sizes(32, 4096, 11008, 32, 32)
        | {
            "architectures": ["Olmo2ForCausalLM"],
            "model_type": "olmo2",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": 100257,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 4096,
            "pad_token_id": 100277,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.47.0.dev0",
            "use_cache": True,
            "vocab_size": 100352,
        },
        7_298_617_344,
    ),
    "Phi-3-mini-4k": (
        PHI3
        | sizes(32, 3072, 8192, 32, 32)
        | {
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "Phi-4": (
        PHI3
        | sizes(40, 5120, 17920, 40, 10)
        | {
            "_name_or_path": "microsoft/phi-4",
            "attention_bias": False,
            "auto_map": {},
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
            "rope_theta": 250000,
            "sliding_window": None,
            "vocab_size": 100352,
        },
        14_659_507_200,
    ),
    "Gemma-2-9B": (
        SPECIAL
        | sizes(42, 3584, 14336, 16, 8)
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "torch_dtype": "float32",
            "transformers_version": "4.42.0.dev0",
            "vocab_size": 256000,
        },
        9_241_705_984,
    ),
    "Gemma-3-270M": (
        GEMMA3
        | {"num_hidden_layers": 18, "hidden_size": 640, "intermediate_size": 2048}
        | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3}
        | {"use_bidirectional_attention": False},
        268_098_176,
    ),
    "Gemma-3-1B": (
        GEMMA3
        | {"num_hidden_layers": 26, "hidden_size": 1152, "intermediate_size": 6912}
        | {"sliding_window_pattern": 6},
        999_885_952,
    ),
    "Gemma-3-4B": (
        sees_images(num_hidden_layers=34, hidden_size=2560, intermediate_size=10240),
        4_300_079_472 - image_encoder(2560),
    ),
    "Gemma-3-12B": (sees_images(**sizes(48, 3840, 15360, 16, 8)), 12_187_325_040 - image_encoder(3840)),
    "Gemma-3-27B": (
        sees_images(**sizes(62, 5376, 21504, 32, 16), head_dim=128, query_pre_attn_scalar=168),
        27_432_406_640 - image_encoder(5376),
    ),
    "GPT-2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-5,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        124_439_808,
    ),
}
