"""Decoder-only language models. No other folder imports flax."""

from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.heads import ScalarTransformer, build_scalar_model
from jaxllm.models.interface import (
    Aux,
    Cache,
    LayerCache,
    Model,
    Output,
    Params,
    ScalarModel,
    ScalarOutput,
)
from jaxllm.models.transformer import Transformer, build_model, unstack_layers

__all__ = [
    "Aux",
    "Cache",
    "LayerCache",
    "Model",
    "ModelConfig",
    "Output",
    "Params",
    "RopeScaling",
    "ScalarModel",
    "ScalarOutput",
    "ScalarTransformer",
    "Transformer",
    "build_model",
    "build_scalar_model",
    "unstack_layers",
]
