"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): the weights train, frozen, through a detour.

A layer x @ kernel becomes x @ kernel + scale * (x @ a) @ b, with a [in, rank] and b [rank, out]; only a and b
train. b begins as zeros, so that a model with fresh adapters computes what it computed without them.
"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.models.config import NO_LORA, LoRAConfig, ModelConfig, layer_shapes
from jaxllm.models.interface import Params
from jaxllm.models.quantize import Quantized, dequantize
from jaxllm.random_streams import DROPOUT, stream

# Regular expression of the parameters that train beside frozen ones: adapters, and heads that are new.
TRAINED = r"/lora/[ab]$|(^|/)scalar_head/"
ADAPTERS = r"/lora/[ab]$"


def adapted_layers(lora: LoRAConfig, config: ModelConfig) -> list[str]:
    """The layers of a model that have these adapters."""
    return [path for path in layer_shapes(config) if lora.applies_to(path)]


class LoRA(nn.Module):
    """scale * (dropout(x) @ a) @ b. The adapters are float32, whatever the kernels are stored in."""

    config: LoRAConfig
    features: int

    @nn.compact
    def __call__(self, x_NI: jax.Array) -> jax.Array:
        rank = self.config.rank
        # Uniform within 1 / sqrt(in), as in the authors' code and in PEFT.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a_IR = self.param("a", init, (x_NI.shape[-1], rank), jnp.float32)
        b_RF = self.param("b", nn.initializers.zeros, (rank, self.features), jnp.float32)
        x_NI = nn.Dropout(self.config.dropout)(x_NI, deterministic=not self.has_rng("dropout"))
        return (x_NI @ a_IR.astype(x_NI.dtype)) @ b_RF.astype(x_NI.dtype) * self.config.scale


def dropout_key(config: ModelConfig, key: jax.Array) -> jax.Array | None:
    """The key of a step's dropout, for `Model.apply`, from the step's key; None where there is no dropout."""
    lora = config.lora
    return None if lora.rank is None or not lora.dropout else stream(key, DROPOUT)


def merge_lora(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model without adapters that computes the same: its kernels are kernel + scale * a @ b.

    params: from `Model.init` or `ScalarModel.init` of this config, blocks stacked. The sum is rounded to the
    kernel's dtype; kernels that are quantized, beside which the adapters were trained, become float32.
    Without adapters, both are returned as they are.
    """

    def merged(layer: Params) -> Params:
        if isinstance(kernel := layer.get("kernel"), Quantized):
            return merged(layer | {"kernel": jax.jit(dequantize)(kernel)})
        if "lora" not in layer:
            return {name: merged(x) if isinstance(x, dict) else x for name, x in layer.items()}
        kernel, (a, b) = layer["kernel"], (layer["lora"]["a"], layer["lora"]["b"])
        change = config.lora.scale * jnp.einsum("lir,lrf->lif", a, b, precision="highest")
        rest = {name: x for name, x in layer.items() if name != "lora"}
        return rest | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}

    if config.lora.rank is None:
        return config, params
    return replace(config, lora=NO_LORA), merged(params)
