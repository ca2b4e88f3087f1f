"""Frozen kernels in 8 or 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), quantized in blocks.

A block is BLOCK values along the input axis of one output; it shares a scale, its largest absolute value:

    kernel ~ scale * level[code],  code = the nearest level to kernel / scale

The levels of "int8" are -127/127 ... 127/127, those of "nf4" the quantiles of a normal distribution.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BLOCK = 64

# NormalFloat4: appendix E of Dettmers et al. 2023.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["size"])
@dataclass(frozen=True)
class Quantized:
    """A quantized kernel [..., in, out]. With arrays of shapes instead, `codes` and `scales` are shapes too.

    No block crosses a shard: what is sharded of the input axis is whole blocks.
    """

    codes: Any  # int8 [..., blocks, BLOCK, out]; of nf4 uint8 [..., blocks, BLOCK / 2, out], two a byte
    scales: Any  # bfloat16 [..., blocks, 1, out]
    size: int  # of the input axis; zeros fill the last block

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        *lead, _, _, out = self.codes.shape
        return (*lead, self.size, out)

    @property
    def kind(self) -> str:
        return "nf4" if self.codes.dtype == jnp.uint8 else "int8"


def is_quantized(x: object) -> bool:
    """As `is_leaf`: whether this is a whole quantized kernel, not one whose arrays are in another tree."""
    return isinstance(x, Quantized) and x.codes is not None


def quantize(kernel: jax.Array, kind: str) -> Quantized:
    """A kernel [..., in, out] as "int8" or "nf4". The codes are chosen for the rounded scale, so that a value
    is off by at most half the distance of its level's neighbors (int8: scale / 254)."""
    *lead, size, out = kernel.shape
    blocks = -(-size // BLOCK)
    padding = [(0, 0)] * len(lead) + [(0, blocks * BLOCK - size), (0, 0)]
    x = jnp.pad(kernel.astype(jnp.float32), padding).reshape(*lead, blocks, BLOCK, out)
    scales = jnp.max(jnp.abs(x), axis=-2, keepdims=True).astype(jnp.bfloat16)
    used = scales.astype(jnp.float32)
    x = x / jnp.where(used == 0, 1, used)
    if kind == "int8":
        return Quantized(jnp.round(x * 127).clip(-127, 127).astype(jnp.int8), scales, size)
    codes = sum((x > middle).astype(jnp.uint8) for middle in (NF4[1:] + NF4[:-1]) / 2)
    low, high = jnp.split(jnp.asarray(codes), 2, axis=-2)
    return Quantized(low | high << 4, scales, size)


def dequantize(quantized: Quantized) -> jax.Array:
    """The float32 kernel [..., in, out] of `quantize`: scale * level[code]."""
    codes = quantized.codes
    if quantized.kind == "int8":
        levels = codes.astype(jnp.float32) / 127
    else:
        levels = jnp.asarray(NF4)[jnp.concatenate([codes & 15, codes >> 4], axis=-2)]
    x = levels * quantized.scales.astype(jnp.float32)
    *lead, blocks, _, out = x.shape
    return x.reshape(*lead, blocks * BLOCK, out)[..., : quantized.size, :]


@jax.custom_vjp
def quantized_product(x_NI: jax.Array, quantized: Quantized) -> jax.Array:
    """x @ kernel in the dtype of x. The kernel, being frozen, has no gradient; it is dequantized where it is
    used, forward and backward, so that the kernels of one layer at a time are in memory."""
    return x_NI @ dequantize(_tied(quantized, x_NI)).astype(x_NI.dtype)


def _forward(x_NI: jax.Array, quantized: Quantized) -> tuple[jax.Array, Quantized]:
    return quantized_product(x_NI, quantized), quantized


def _backward(quantized: Quantized, g_NO: jax.Array) -> tuple[jax.Array, None]:
    return g_NO @ dequantize(_tied(quantized, g_NO)).astype(g_NO.dtype).T, None


quantized_product.defvjp(_forward, _backward)


def _tied(quantized: Quantized, x: jax.Array) -> Quantized:
    """The same, as if it depended on x: XLA would dequantize all layers at once, or before a decode loop, or
    keep what the forward pass dequantized for the backward pass. It removes other barriers too early."""
    is_nan = x[0, 0] != x[0, 0]  # then the product is NaN whatever the codes are
    return replace(quantized, codes=quantized.codes + is_nan.astype(quantized.codes.dtype))


def unquantized(wanted: Quantized, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of the kernel of which a quantized one (of shapes) is made, sharded as that is."""
    sharding = wanted.codes.sharding
    if isinstance(sharding, NamedSharding):
        *lead, blocks, _, out = (*sharding.spec, *(None,) * len(wanted.codes.shape))[
            : len(wanted.codes.shape)
        ]
        axes = zip((*lead, blocks, out), wanted.shape, strict=True)
        mesh = sharding.mesh
        fits = (axis if axis is None or size % mesh.shape[axis] == 0 else None for axis, size in axes)
        sharding = NamedSharding(mesh, P(*fits))
    return jax.ShapeDtypeStruct(wanted.shape, dtype, sharding=sharding)
