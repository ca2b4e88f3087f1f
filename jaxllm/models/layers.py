"""The parts of a decoder block that are not attention.

Shapes: B sequences, T positions, D width, F hidden width of the MLP, N = B * T.
Parameters are stored in param_dtype and used in the dtype of the activations; norms are float32.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.interface import Array
from jaxllm.models.lora import LoRA
from jaxllm.models.quantize import Quantized, quantize, quantized_product


class Linear(nn.Module):
    """x @ kernel (+ bias) on the last axis; kernel is [in, out]. With LoRA, plus the adapters' product,
    and the kernel may be `Quantized`."""

    config: ModelConfig
    features: int
    use_bias: bool
    scale: float = 1.0  # the initial variance, in units of 1 / in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "truncated_normal")
        dtype = jnp.dtype(self.config.param_dtype)
        shape, quantization = (x.shape[-1], self.features), self.config.lora.quantize

        def make_kernel(key: jax.Array) -> jax.Array | Quantized:
            kernel = init(key, shape, dtype)
            return kernel if quantization == "none" else quantize(kernel, quantization)

        kernel = self.param("kernel", make_kernel)
        # One matrix product over all tokens: XLA:CPU runs it 1.3x faster than the same product in 3-D.
        x_NI = x.reshape(-1, x.shape[-1])
        y_NF = (
            quantized_product(x_NI, kernel)
            if isinstance(kernel, Quantized)
            else x_NI @ kernel.astype(x.dtype)
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
            y_NF += bias.astype(x.dtype)
        if self.config.lora.applies_to("/".join(self.path)):
            y_NF += LoRA(self.config.lora, self.features, name="lora")(x_NI)
        return y_NF.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float
    param_dtype: str
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = norm_scale(self, (x.shape[-1],), jnp.dtype(self.param_dtype))
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse_rms * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    epsilon: float
    param_dtype: str
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, shape = jnp.dtype(self.param_dtype), (x.shape[-1],)
        scale = norm_scale(self, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        inverse_std = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse_std * scale + bias).astype(x.dtype)


def norm_scale(norm: "RMSNorm | LayerNorm", shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """What a norm multiplies by: its parameter or, where that is zero-centered, 1 + its parameter."""
    if norm.zero_centered:
        return 1 + norm.param("scale", nn.initializers.zeros, shape, dtype).astype(jnp.float32)
    return norm.param("scale", nn.initializers.ones, shape, dtype)


def make_norm(config: ModelConfig, name: str | None = None) -> RMSNorm | LayerNorm:
    """The norm of a config, for states of its width."""
    kind = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    return kind(config.norm_epsilon, config.param_dtype, config.zero_centered_norm, name=name)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
}


class MLP(nn.Module):
    """down(activation(up(x))) or, gated, down(activation(gate(x)) * up(x)).

    Gated with "silu" it is SwiGLU, with "gelu" GeGLU (Shazeer 2020, arXiv:2002.05202).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        if c.mlp == "gated":
            gate_BTF = Linear(c, c.mlp_width, c.mlp_bias, name="gate")(x_BTD)
            up_BTF = Linear(c, c.mlp_width, c.mlp_bias, name="up")(x_BTD)
            hidden_BTF = activation(gate_BTF) * up_BTF
        else:
            hidden_BTF = activation(Linear(c, c.mlp_width, c.mlp_bias, name="up")(x_BTD))
        # Each block adds two outputs to the residual stream; this scale keeps its initial size at any depth.
        down = Linear(c, c.width, c.mlp_bias, scale=0.5 / c.num_layers, name="down")
        return down(hidden_BTF)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Radians per position for each pair of a head's elements, float32 [head_dim / 2], and the factor on
    cos and sin (1 except for YaRN).

    RoPE: Su et al. 2021 (arXiv:2104.09864); `RopeScaling` describes the scalings.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "none":
        return frequencies.astype(np.float32), 1.0
    rotations = scaling.original_length * frequencies / (2 * np.pi)  # over the original length
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency, scaling.high_frequency
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        attention_factor = 1.0
    else:
        # YaRN's ramp is linear in the pair's index, between the pairs with beta_fast and beta_slow rotations.
        def pair_index(beta: float) -> float:
            return head_dim * np.log(scaling.original_length / (beta * 2 * np.pi)) / (2 * np.log(theta))

        first = max(np.floor(pair_index(scaling.beta_fast)), 0)
        last = min(np.ceil(pair_index(scaling.beta_slow)), head_dim - 1)
        ramp = (np.arange(head_dim // 2) - first) / max(last - first, 1e-3)
        kept = 1.0 - np.clip(ramp, 0.0, 1.0)
        attention_factor = 0.1 * np.log(scaling.factor) + 1.0
    scaled = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return scaled.astype(np.float32), float(attention_factor)


Angles = tuple[jax.Array, jax.Array]


def layer_angles(config: ModelConfig, positions_BT: Array) -> dict[str, Angles]:
    """`rotary_angles` for each kind of layer that rotates its queries and keys."""
    if config.position_embedding != "rotary":
        return {}
    kinds = set(config.layer_pattern) - {"nope"}
    if config.local_rope_theta is None or kinds == {"global"}:
        angles = rotary_angles(config.head_dim, config.rope_theta, config.rope_scaling, positions_BT)
        return dict.fromkeys(sorted(kinds), angles)
    unscaled = replace(config.rope_scaling, kind="none")
    settings = {
        "global": (config.rope_theta, config.rope_scaling),
        "local": (config.local_rope_theta, unscaled),
    }
    return {kind: rotary_angles(config.head_dim, *settings[kind], positions_BT) for kind in sorted(kinds)}


def rotary_angles(head_dim: int, theta: float, scaling: RopeScaling, positions_BT: Array) -> Angles:
    """cos and sin, float32 [B, T, 1, head_dim], as `rotate` takes them: sin negated for the first half."""
    frequencies, factor = rotary_frequencies(head_dim, theta, scaling)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_BTHh: jax.Array, angles: Angles) -> jax.Array:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle: the half-split form of HF checkpoints."""
    cos, sin = angles
    x32 = x_BTHh.astype(jnp.float32)
    halves_swapped = jnp.roll(x32, x32.shape[-1] // 2, axis=-1)
    return (x32 * cos + halves_swapped * sin).astype(x_BTHh.dtype)
