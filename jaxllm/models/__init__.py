"""Decoders: the only folder that knows flax."""

from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.heads import ScalarModel, build_scalar_model
from jaxllm.models.transformer import Model, build_model, unstack_layers

__all__ = [
    "Model",
    "ModelConfig",
    "RopeScaling",
    "ScalarModel",
    "build_model",
    "build_scalar_model",
    "unstack_layers",
]
