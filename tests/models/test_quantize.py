"""Quantized kernels: the levels, how far a value is moved, and that a model computes with what it stores."""

from dataclasses import replace
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base.models import model as model_size
from jaxllm.config import parse
from jaxllm.models import ModelConfig, build_model
from jaxllm.models.config import LoRAConfig
from jaxllm.models.lora import TRAINED, merge_lora
from jaxllm.models.quantize import BLOCK, NF4, dequantize, quantize, quantized_product
from jaxllm.training.state import merge_params, split_params

KEY = jax.random.key(0)
jitted_quantize = jax.jit(quantize, static_argnums=1)


def block_of(values, out=1):
    """One block that begins with these values; the rest is zeros."""
    return jnp.zeros((BLOCK, out)).at[: len(values)].set(jnp.array(values)[:, None])


def test_values_go_to_the_nearest_level_times_the_largest_of_their_block():
    # The scale is 2: NF4's levels around 0.1 / 2 are 0 and 0.0796, those around -1.5 / 2 are -1 and -0.696.
    kernel = block_of([2.0, 0.1, -1.5, 0.07, -2.0])
    nf4 = jitted_quantize(kernel, "nf4")
    assert (nf4.codes.shape, nf4.codes.dtype, nf4.kind) == ((1, BLOCK // 2, 1), jnp.uint8, "nf4")
    by_hand = 2 * np.array([NF4[15], NF4[8], NF4[1], 0.0, NF4[0], 0.0])
    np.testing.assert_array_equal(dequantize(nf4)[:6, 0], by_hand.astype("f"))
    assert int(nf4.codes[0, 0, 0]) == 15 | 7 << 4  # values 0 and 32 share a byte; level 7 is zero
    int8 = jitted_quantize(kernel, "int8")
    assert int8.codes[0, :5, 0].tolist() == [127, 6, -95, 4, -127]  # 127 * 0.05 = 6.35, 127 * -0.75 = -95.25
    np.testing.assert_allclose(dequantize(int8)[1, 0], 2 * 6 / 127, rtol=1e-6)


def test_the_nf4_levels_are_quantiles_of_the_normal_distribution():
    # 8 on the positive side, 7 on the negative one, and 0 between them (the authors' create_normal_map).
    last = 1 - (1 / 32 + 1 / 30) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive, negative = quantile(np.linspace(last, 0.5, 9)[:-1]), -quantile(np.linspace(last, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0.0, *negative]) / positive.max()
    np.testing.assert_allclose(NF4, levels, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("shape", [(3, 130, 5), (32, 4)])
def test_no_value_moves_further_than_half_its_gap(kind, shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("f")
    again = jitted_quantize(kernel, kind)
    assert (again.shape, again.scales.dtype) == (shape, jnp.bfloat16)
    levels = NF4 if kind == "nf4" else np.arange(-127, 128) / 127
    largest_gap = np.diff(levels).max() / 2
    pad = -shape[-2] % BLOCK
    blocks = np.pad(np.abs(kernel), [(0, 0)] * (len(shape) - 2) + [(0, pad), (0, 0)])
    blocks = blocks.reshape(*shape[:-2], -1, BLOCK, shape[-1]).max(-2, keepdims=True)
    bound = np.broadcast_to(1.004 * largest_gap * blocks, (*blocks.shape[:-2], BLOCK, shape[-1]))
    bound = bound.reshape(*shape[:-2], -1, shape[-1])[..., : shape[-2], :]
    assert (np.abs(np.asarray(dequantize(again)) - kernel) <= bound).all()
    np.testing.assert_array_equal(dequantize(jitted_quantize(jnp.zeros(shape), kind)), 0)


def test_a_product_and_its_gradient_are_those_of_the_dequantized_kernel():
    x, kernel = jax.random.normal(KEY, (6, 80)), jax.random.normal(KEY, (80, 7))
    quantized = jitted_quantize(kernel, "nf4")

    def product_and_gradient(multiply):
        def total(x):
            product = multiply(x)
            return jnp.sum(product**2), product

        return jax.jit(jax.grad(total, has_aux=True))(x)

    slope, product = product_and_gradient(lambda x: quantized_product(x, quantized))
    expected_slope, expected = product_and_gradient(lambda x: x @ dequantize(quantized))
    np.testing.assert_allclose(product, expected, atol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def config():
    small = replace(parse(ModelConfig, model_size("tiny").to_dict(), "model"), width=128, mlp_width=256)
    lora = LoRAConfig(3, 6.0, False, 0.0, "attention/", "nf4")
    return replace(small, vocab_size=64, max_length=32, num_layers=3, lora=lora)


def test_a_merged_model_computes_with_the_kernels_that_were_trained_beside(config):
    config = replace(config, num_layers=1)
    params = jax.jit(build_model(config).init)(KEY)
    params = jax.tree.map(lambda x: x + 0.02 if x.dtype == jnp.float32 else x, params)
    plain, merged = merge_lora(config, params)
    tokens = jax.random.randint(KEY, (2, 9), 0, 64)
    logits = jax.jit(build_model(config).logits)(params, tokens)
    np.testing.assert_allclose(jax.jit(build_model(plain).logits)(merged, tokens), logits, atol=1e-4)
    gate = params["blocks"]["mlp"]["gate"]["kernel"]  # which has no adapters
    np.testing.assert_array_equal(merged["blocks"]["mlp"]["gate"]["kernel"], dequantize(gate))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_kernels_of_one_layer_at_a_time_are_dequantized(config, scan_layers):
    model = build_model(replace(config, scan_layers=scan_layers, remat="none"))
    params = jax.eval_shape(model.init, KEY)
    trained, frozen = split_params(params, TRAINED)
    kernels = 4 * sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: merge_lora(config, p)[1], params)["blocks"])
    )

    def loss(trained, frozen, tokens):
        return model.logits(merge_params(trained, frozen), tokens).sum()

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(trained, frozen, tokens).compile().memory_analysis()
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen["blocks"]))
    assert stored < 0.16 * kernels  # 4.25 bits of 32, and norms
    assert memory.temp_size_in_bytes < 0.8 * kernels  # all layers at once would be more than 1
