"""Decoders: the only folder that knows flax."""

from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.transformer import Model, build_model, unstack_layers

__all__ = ["Model", "ModelConfig", "RopeScaling", "build_model", "unstack_layers"]
