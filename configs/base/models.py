"""Model sizes, from one for tests to Llama 3.1 8B: the argument of the stage configs, as in `:10m`.

`model("10m")` returns a ConfigDict with every field of `jaxllm.models.ModelConfig`. A config may change any
of them, and so may the command line: `--config.model.num_layers=6`.
"""

from ml_collections import ConfigDict, config_dict

from jaxllm.errors import ConfigError

# layers, width, query heads, key-value heads, head width, MLP width, vocabulary, longest sequence.
# Our own sizes are named after their number of parameters without the embedding (124m: with it, as GPT-2).
SHAPES = {
    "tiny": (2, 64, 4, 2, 16, 176, 512, 256),
    "1m": (4, 128, 4, 4, 32, 384, 1024, 512),
    "10m": (8, 320, 5, 5, 64, 864, 4096, 1024),
    "60m": (12, 640, 10, 10, 64, 1728, 16384, 2048),
    "124m": (12, 768, 12, 12, 64, 2048, 50304, 2048),
    "qwen3_0.6b": (28, 1024, 16, 8, 128, 3072, 151936, 40960),
    "llama3.2_1b": (16, 2048, 32, 8, 64, 8192, 128256, 131072),
    "llama3.1_8b": (32, 4096, 32, 8, 128, 14336, 128256, 131072),
}


def model(size: str) -> ConfigDict:
    """The config of a size in SHAPES. Raises ConfigError, which lists the sizes, for any other name."""
    if size not in SHAPES:
        raise ConfigError(f"no model size {size!r}: choose one of {', '.join(SHAPES)}")
    layers, width, heads, kv_heads, head_dim, mlp_width, vocab_size, max_length = SHAPES[size]
    config = ConfigDict()
    config.vocab_size = vocab_size
    config.num_layers = layers
    config.width = width
    config.num_heads = heads
    config.num_kv_heads = kv_heads  # fewer than num_heads: grouped-query attention
    config.head_dim = head_dim
    config.mlp_width = mlp_width
    config.mlp = "gated"  # "gated" (SwiGLU, GeGLU) or "plain"
    config.activation = "silu"  # "silu", "gelu" (its tanh approximation) or "gelu_exact"
    config.max_length = max_length  # tokens
    config.position_embedding = "rotary"  # "rotary" or "learned"
    config.rope_theta = 10_000.0
    config.rope_scaling = ConfigDict()
    config.rope_scaling.kind = "none"  # "none", "linear", "llama3" or "yarn"; "none" ignores the rest
    config.rope_scaling.factor = 1.0
    config.rope_scaling.original_length = max_length
    config.rope_scaling.low_frequency = 1.0
    config.rope_scaling.high_frequency = 4.0
    config.rope_scaling.beta_fast = 32.0
    config.rope_scaling.beta_slow = 1.0
    config.local_rope_theta = config_dict.placeholder(float)  # of "local" layers; None: rope_theta
    config.layer_pattern = ("global",)  # repeated: "global", "local" (sliding_window), "nope" (without RoPE)
    config.norm = "rms"  # "rms" or "layer"
    config.norm_epsilon = 1e-5
    config.norm_position = "before"  # of attention and MLP: "before", "after" or "both"
    config.zero_centered_norm = False  # norms multiply by 1 + scale
    config.qk_norm = "head"  # "none", "head" or "all_heads"; more stable at high rates (Dehghani et al. 2023)
    config.qkv_bias = False
    config.output_bias = False
    config.mlp_bias = False
    config.attention_scale = config_dict.placeholder(float)  # of query x key; None: head_dim ** -0.5
    config.attention_softcap = config_dict.placeholder(float)  # c of c tanh(x / c); None: off
    config.logit_softcap = config_dict.placeholder(float)  # the same for the output's logits
    config.sliding_window = config_dict.placeholder(int)  # tokens that "local" layers see, itself included
    config.tie_embeddings = True
    config.scale_embeddings = False  # by sqrt(width)
    config.scan_layers = layers > 12  # compile one block for all; unrolled, steps are a little faster
    config.remat = "none"  # recompute in the backward pass: "none", "attention", "dots" or "full"
    # "xla" everywhere, "cudnn" on NVIDIA, "splash" on TPU. "cudnn_packed" takes packed documents without a
    # mask (Hopper and later, up to 64 of them a row); it compiles, but has not run on a GPU yet.
    config.attention = "xla"
    config.compute_dtype = "float32"  # "bfloat16" on accelerators
    config.param_dtype = "float32"
    config.lora = ConfigDict()  # train low-rank adapters beside frozen weights (Hu et al. 2021)
    config.lora.rank = config_dict.placeholder(int)  # such as 16; None: all parameters train
    config.lora.alpha = 32.0  # the adapters' product is multiplied by alpha / rank
    config.lora.rank_stabilized = False  # by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)
    config.lora.dropout = 0.0  # of the adapters' input, while training
    config.lora.targets = "attention/|mlp/"  # regular expression: layers with it in their path have adapters
    config.lora.quantize = "none"  # the frozen kernels: "none" (param_dtype), "int8" or "nf4" (QLoRA)
    if layers > 12:
        config.compute_dtype = "bfloat16"
        config.remat = "attention"
    if size.startswith("llama"):
        config.qk_norm = "none"
        config.rope_theta = 500_000.0
        config.rope_scaling.kind = "llama3"
        config.rope_scaling.factor = 32.0 if size == "llama3.2_1b" else 8.0
        config.rope_scaling.original_length = 8192
        config.tie_embeddings = size == "llama3.2_1b"
    if size.startswith("qwen3"):
        config.rope_theta = 1_000_000.0
        config.norm_epsilon = 1e-6
    return config
