"""What a decoder is made of: sizes and switches; and what a token costs."""

from dataclasses import dataclass, replace

# Ways to compute attention, and the platform that each needs.
ATTENTION = {"xla": None, "cudnn": "gpu", "splash": "tpu"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    `none` ignores the other fields. `llama3`: Llama 3.1 (Meta, 2024), wavelengths longer than
    original_length / low_frequency are divided by `factor`, those shorter than
    original_length / high_frequency are kept, between them linearly mixed. `yarn`: Peng et al. 2023
    (arXiv:2309.00071), the same idea in rotations over original_length (`beta_fast`, `beta_slow`),
    with attention scaled by 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int
    low_frequency: float
    high_frequency: float
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes in elements, lengths in tokens."""

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int  # fewer than num_heads: grouped-query attention
    head_dim: int
    mlp_width: int
    activation: str  # of the gated MLP: "silu" (SwiGLU) or "gelu" (GeGLU)
    max_length: int  # the longest sequence it is meant for
    rope_theta: float
    rope_scaling: RopeScaling
    norm_epsilon: float
    qk_norm: bool  # RMSNorm on each head's query and key
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    attention_softcap: float | None
    logit_softcap: float | None
    sliding_window: int | None  # a token sees itself and the window - 1 before it
    tie_embeddings: bool
    scan_layers: bool  # one compiled block for all layers; False unrolls them
    remat: str  # "none", "full", "dots" (keep matrix products) or "attention" (keep attention's output)
    attention: str  # of ATTENTION: "xla", "cudnn" (NVIDIA) or "splash" (TPU)
    compute_dtype: str
    param_dtype: str


def runs_on(config: ModelConfig, platform: str) -> bool:
    """Whether a platform ("cpu", "gpu", "tpu") can compute the model's attention."""
    return ATTENTION[config.attention] in (None, platform)


def for_platform(config: ModelConfig, platform: str) -> ModelConfig:
    """The same model on a platform that it may not have been trained on: weights know no kernels."""
    return config if runs_on(config, platform) else replace(config, attention="xla")


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one training step a token, forward and backward, counted by hand.

    6 a parameter in a matrix product (2 forward, 4 backward), plus attention, where a token meets
    min(T / 2, window) others on average: 12 * width of all heads * that. Recomputation is not work.
    XLA's own count sees a scanned layer once and cannot be used.
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = config.width * (2 * heads + 2 * kv_heads) + 3 * config.width * config.mlp_width
    seen = min(sequence_length / 2, config.sliding_window or sequence_length)
    matrices = config.num_layers * block + config.width * config.vocab_size
    return 6.0 * matrices + 12.0 * config.num_layers * heads * seen
