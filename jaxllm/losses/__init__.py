"""The losses: arrays in, arrays out, nothing but jax underneath. One file per idea, one flat namespace."""

from jaxllm.losses.aggregate import Weighted, aggregate, masked_mean, masked_variance, whiten
from jaxllm.losses.language_model import (
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    token_entropy,
    token_log_probs,
)

__all__ = [
    "Weighted",
    "aggregate",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "masked_mean",
    "masked_variance",
    "token_entropy",
    "token_log_probs",
    "whiten",
]
