"""What jaxllm and the libraries it is compared with both get: the model's shape and a reward."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from jaxllm.models import ModelConfig


def llama_config(shape: "ModelConfig", **options: Any) -> "LlamaConfig":
    """A model's shape as a config of transformers. Raises ImportError where it is not installed."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.norm_epsilon,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=shape.tie_embeddings,
        **options,
    )


def even_words(example: Mapping[str, Any], completion: str) -> float:
    """The fraction of words that end in an even digit: fast, and different for most completions."""
    words = completion.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))
