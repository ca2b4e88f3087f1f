"""The sizes and options of a decoder, the checks on them, and the compute cost of a token."""

import math
import re
from dataclasses import dataclass, replace

from jaxllm.errors import ConfigError

QUANTIZATIONS = ("none", "int8", "nf4")

# Implementations of attention, and the platform that each needs.
ATTENTION = {"xla": None, "cudnn": "gpu", "cudnn_packed": "gpu", "splash": "tpu"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts beyond the length of pretraining.

    `none` ignores the other fields. `linear`: Chen et al. 2023 (arXiv:2306.15595); all frequencies are
    divided by `factor`. `llama3`: Llama 3.1 (Meta, 2024); frequencies whose wavelength is longer than
    original_length / low_frequency are divided by `factor`, those with one shorter than original_length /
    high_frequency are kept, and those between are interpolated linearly. `yarn`: Peng et al. 2023
    (arXiv:2309.00071); the same in terms of the rotations over original_length (`beta_fast`, `beta_slow`),
    with cos and sin multiplied by 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int  # tokens
    low_frequency: float
    high_frequency: float
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside frozen kernels: see `jaxllm.models.lora`."""

    rank: int | None  # None: no adapters
    alpha: float  # the adapters' product is multiplied by alpha / rank
    rank_stabilized: bool  # by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)
    dropout: float  # of the adapters' input, while training
    targets: str  # regular expression: layers with it in their path have adapters
    quantize: str  # how the frozen kernels are stored: "none" (param_dtype), "int8" or "nf4"

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"model.lora.rank={self.rank} must be at least 1, or none for no adapters")
        if not self.alpha > 0:
            raise ConfigError(f"model.lora.alpha={self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout={self.dropout} must be at least 0 and less than 1")
        if self.quantize not in QUANTIZATIONS:
            raise ConfigError(
                f"model.lora.quantize={self.quantize!r}: choose one of {', '.join(QUANTIZATIONS)}"
            )
        if self.quantize != "none" and self.rank is None:
            raise ConfigError(
                f"model.lora.quantize={self.quantize} freezes the kernels: set model.lora.rank, so that "
                "adapters train"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ConfigError(f"model.lora.targets={self.targets!r}: {error}") from None

    def applies_to(self, path: str) -> bool:
        """Whether the layer at a path in its block (`attention/query`) has adapters."""
        return self.rank is not None and re.search(self.targets, f"blocks/{path}") is not None

    @property
    def scale(self) -> float:
        """What multiplies the product of the adapters."""
        assert self.rank is not None
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


NO_LORA = LoRAConfig(None, 32.0, False, 0.0, "attention/|mlp/", "none")


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
    mlp: str  # "gated" (SwiGLU, GeGLU) or "plain"
    activation: str  # "silu", "gelu" (its tanh approximation) or "gelu_exact"
    max_length: int  # the longest sequence, prompt and completion together
    position_embedding: str  # "rotary" or "learned"
    rope_theta: float
    rope_scaling: RopeScaling
    local_rope_theta: float | None  # of "local" layers, without scaling; None: as in the other layers
    layer_pattern: tuple[str, ...]  # kinds of layers, repeated over the depth: see LAYER_KINDS
    norm: str  # "rms" or "layer"
    norm_epsilon: float
    norm_position: str  # of a block's attention and MLP: "before", "after" or "both"
    zero_centered_norm: bool  # norms multiply by 1 + scale
    qk_norm: str  # RMSNorm on queries and keys: "none", "head" (of each head) or "all_heads" (together)
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    attention_scale: float | None  # multiplies queries x keys; None: head_dim ** -0.5
    attention_softcap: float | None
    logit_softcap: float | None
    sliding_window: int | None  # in "local" layers, a token attends to itself and to window - 1 before it
    tie_embeddings: bool
    scale_embeddings: bool  # multiply embedded tokens by sqrt(width)
    scan_layers: bool  # one compiled block for all layers; False unrolls them
    remat: str  # what the backward pass recomputes: one of REMAT
    attention: str  # "xla", "cudnn" or "cudnn_packed" (NVIDIA GPUs), "splash" (TPUs)
    compute_dtype: str
    param_dtype: str
    lora: LoRAConfig


# The fields that say how a model is computed; all others say what is computed.
HOW = ("scan_layers", "remat", "attention", "compute_dtype", "param_dtype", "lora")

# Attention to all earlier tokens; to those in `sliding_window`; to all, without rotary embedding.
LAYER_KINDS = ("global", "local", "nope")

# Nothing; all of a block; all but its matrix products; all but the output of its attention.
REMAT = ("none", "full", "dots", "attention")


def check_model_config(config: ModelConfig) -> None:
    """Raise ConfigError, naming the field, where a value is invalid or two fields contradict each other."""
    for field, value in vars(config).items():
        if isinstance(value, int | float) and value is not False and value <= 0:
            raise ConfigError(f"model.{field}={value} must be above 0")
    if config.num_heads % config.num_kv_heads:
        divisors = [str(n) for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ConfigError(
            f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}; "
            f"use one of {', '.join(divisors)}"
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={config.head_dim} must be even: rotary embeddings rotate pairs of elements"
        )
    choices = {
        "mlp": ("gated", "plain"),
        "activation": ("silu", "gelu", "gelu_exact"),
        "position_embedding": ("rotary", "learned"),
        "norm": ("rms", "layer"),
        "norm_position": ("before", "after", "both"),
        "qk_norm": ("none", "head", "all_heads"),
        "remat": REMAT,
        "attention": tuple(ATTENTION),
        "compute_dtype": ("float32", "bfloat16", "float16"),
        "param_dtype": ("float32", "bfloat16"),
    }
    for field, allowed in choices.items():
        if getattr(config, field) not in allowed:
            raise ConfigError(f"model.{field}={getattr(config, field)!r}: choose one of {', '.join(allowed)}")
    if config.rope_scaling.kind not in ("none", "linear", "llama3", "yarn"):
        raise ConfigError(
            f"model.rope_scaling.kind={config.rope_scaling.kind!r}: choose one of none, linear, llama3, yarn"
        )
    if not config.layer_pattern or not set(config.layer_pattern) <= set(LAYER_KINDS):
        raise ConfigError(
            f"model.layer_pattern={config.layer_pattern}: name one or several of {', '.join(LAYER_KINDS)}"
        )
    if ("local" in config.layer_pattern) != (config.sliding_window is not None):
        raise ConfigError(
            f"model.sliding_window={config.sliding_window} with model.layer_pattern={config.layer_pattern}: "
            f"layers of the kind local need a window, and only they use it"
        )
    check_lora(config)
    if config.attention.startswith("cudnn") and config.attention_softcap is not None:
        raise ConfigError(
            f"model.attention={config.attention} does not support model.attention_softcap; use "
            "model.attention=xla"
        )
    if config.attention.startswith("cudnn") and config.compute_dtype == "float32":
        raise ConfigError(
            f"model.attention={config.attention} does not support model.compute_dtype=float32; use bfloat16 "
            "or float16"
        )


def check_lora(config: ModelConfig) -> None:
    """ConfigError where no layer of this model would have adapters although the config asks for them."""
    layers = layer_shapes(config)
    if config.lora.rank is not None and not any(map(config.lora.applies_to, layers)):
        raise ConfigError(
            f"model.lora.targets={config.lora.targets!r} matches no layer: they are {', '.join(layers)}"
        )


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of each layer: the pattern, repeated as often as the depth needs."""
    pattern = config.layer_pattern
    return (pattern * -(-config.num_layers // len(pattern)))[: config.num_layers]


def layer_window(config: ModelConfig, kind: str) -> int | None:
    """The sliding window of a kind of layer; None: it attends to all earlier tokens."""
    return config.sliding_window if kind == "local" else None


def runs_on(config: ModelConfig, platform: str) -> bool:
    """Whether a platform ("cpu", "gpu", "tpu") supports the config's implementation of attention."""
    return ATTENTION[config.attention] in (None, platform)


def for_platform(config: ModelConfig, platform: str) -> ModelConfig:
    """The config with an attention that the platform supports; the parameters do not depend on it."""
    return config if runs_on(config, platform) else replace(config, attention="xla")


KEYS_AND_VALUES = ("attention/key", "attention/value")


def flops_per_token(
    config: ModelConfig, sequence_length: int, *, unembedded: float = 1.0, last_block: float = 1.0
) -> float:
    """FLOPs of one training step per token, forward and backward, from the sizes.

    6 per parameter in a matrix product (2 forward, 4 backward; 2 of these where adapters train and it is
    frozen), plus 12 * num_heads * head_dim a layer for each token attended to, min(T / 2, window) on average.
    `unembedded` is the fraction of tokens that the vocabulary head is applied to: 0 for reward models and
    critics, which have none. `last_block` is that of the tokens for which the last block needs more than keys
    and values: 0 for a reward model, which needs one a row. Recomputation (remat) does not count.
    XLA's own cost analysis counts a scanned layer once, so it cannot be used.
    """
    heads, layers = config.num_heads * config.head_dim, layer_shapes(config)
    windows = [layer_window(config, kind) for kind in layer_kinds(config)]
    attended_by_layer = [min(sequence_length / 2, window or sequence_length) for window in windows]
    attended = sum(attended_by_layer) - (1 - last_block) * attended_by_layer[-1]
    beside = sum(math.prod(shape) for path, shape in layers.items() if path not in KEYS_AND_VALUES)
    matrices = matrix_parameters(config) - (1 - last_block) * beside
    matrices -= (1 - unembedded) * config.width * config.vocab_size
    if config.lora.rank is None:
        return 6.0 * matrices + 12.0 * heads * attended
    shapes = [shape for path, shape in layers.items() if config.lora.applies_to(path)]
    adapters = config.num_layers * config.lora.rank * sum(map(sum, shapes))
    return 4.0 * matrices + 6.0 * adapters + 12.0 * heads * attended


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters in the matrix products of a token: of the blocks and the head, tied or not."""
    block = sum(rows * columns for rows, columns in layer_shapes(config).values())
    return config.num_layers * block + config.width * config.vocab_size


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of the matrix of each layer of a block, by its path."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    up = dict.fromkeys(("gate", "up") if config.mlp == "gated" else ("up",), (config.width, config.mlp_width))
    return {
        "attention/query": (config.width, heads),
        "attention/key": (config.width, kv_heads),
        "attention/value": (config.width, kv_heads),
        "attention/output": (heads, config.width),
        **{f"mlp/{name}": shape for name, shape in up.items()},
        "mlp/down": (config.mlp_width, config.width),
    }
