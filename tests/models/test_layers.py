"""The parts of a block against their formulas in float64 numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import RopeScaling
from jaxllm.models.layers import MLP, Linear, RMSNorm, layer_angles, rotary_frequencies, rotate


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_linear_is_a_product_on_the_last_axis_plus_bias(tiny, leading):
    x, kernel, bias = normal(*leading, 4), normal(4, 6, seed=1), normal(6, seed=2)
    layer = Linear(tiny, 6, use_bias=True)
    y = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, x @ kernel + bias, atol=1e-5)


def test_linear_works_in_the_dtype_of_its_input(tiny):
    x = jnp.ones((2, 4), jnp.bfloat16)
    layer = Linear(tiny, 6, use_bias=True)
    params = layer.init(jax.random.key(0), x)
    assert layer.apply(params, x).dtype == jnp.bfloat16


def test_rms_norm_is_computed_in_float32_and_returned_in_the_input_dtype():
    x, scale = 300 * normal(3, 64), normal(64, seed=1)
    exact = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True) + 1e-6) * scale
    norm = RMSNorm(1e-6, "float32")
    np.testing.assert_allclose(norm.apply({"params": {"scale": scale}}, x), exact, rtol=1e-5)
    half = norm.apply({"params": {"scale": scale}}, jnp.asarray(x, jnp.float16))  # x ** 2 overflows float16
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, exact, rtol=3e-3, atol=1e-3)


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    norm = RMSNorm(1e-6, "float32")
    params = {"params": {"scale": jnp.ones(4)}}
    value, gradient = jax.value_and_grad(lambda x: norm.apply(params, x).sum())(jnp.zeros(4))
    assert value == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_mlp_gates_with_the_activation(tiny, activation):
    x = normal(1, 3, tiny.width)
    mlp = MLP(replace(tiny, activation=activation))
    params = mlp.init(jax.random.key(0), x)["params"]
    gate, up = (x @ np.asarray(params[name]["kernel"]) for name in ("gate", "up"))
    gated = {
        "silu": gate / (1 + np.exp(-gate)),
        "gelu": gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))),
    }[activation]
    expected = (gated * up) @ np.asarray(params["down"]["kernel"])
    np.testing.assert_allclose(mlp.apply({"params": params}, x), expected, atol=1e-5)


# Rotary positions


def rotations(head_dim, theta):
    """Radians per position for each pair."""
    return [theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]


def llama3_frequency(frequency, scaling):
    """Llama 3.1's rule, stated in wavelengths."""
    wavelength = 2 * np.pi / frequency
    if wavelength < scaling.original_length / scaling.high_frequency:
        return frequency
    if wavelength > scaling.original_length / scaling.low_frequency:
        return frequency / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_frequency) / (
        scaling.high_frequency - scaling.low_frequency
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def yarn_frequencies(head_dim, theta, scaling):
    """YaRN, pair by pair: those with more than beta_fast rotations over the original length are kept, those
    with fewer than beta_slow are scaled, with a ramp over the pairs between."""

    def pair_with_rotations(beta):
        return head_dim / 2 * np.log(scaling.original_length / (2 * np.pi * beta)) / np.log(theta)

    first, last = (
        np.floor(pair_with_rotations(scaling.beta_fast)),
        np.ceil(pair_with_rotations(scaling.beta_slow)),
    )
    scaled = []
    for pair, frequency in enumerate(rotations(head_dim, theta)):
        fraction = min(max((pair - first) / (last - first), 0), 1)
        scaled.append(fraction * frequency / scaling.factor + (1 - fraction) * frequency)
    return scaled


LLAMA3 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0, 32.0, 1.0)
YARN = RopeScaling("yarn", 4.0, 4096, 1.0, 4.0, 32.0, 1.0)


def test_plain_rotary_frequencies():
    frequencies, factor = rotary_frequencies(64, 10_000.0, replace(LLAMA3, kind="none"))
    np.testing.assert_allclose(frequencies, rotations(64, 10_000.0), rtol=1e-6)
    assert factor == 1.0


def test_llama3_frequencies_keep_short_wavelengths_and_scale_long_ones():
    frequencies, factor = rotary_frequencies(128, 500_000.0, LLAMA3)
    plain = rotations(128, 500_000.0)
    np.testing.assert_allclose(frequencies, [llama3_frequency(f, LLAMA3) for f in plain], rtol=1e-6)
    stretch = np.array(plain) / frequencies
    assert stretch[0] == pytest.approx(1)
    assert stretch[-1] == pytest.approx(8)
    assert ((stretch > 1.01) & (stretch < 7.99)).any()
    assert factor == 1.0


@pytest.mark.parametrize(("beta_fast", "beta_slow"), [(32.0, 1.0), (16.0, 2.0)])
def test_yarn_frequencies_and_attention_factor(beta_fast, beta_slow):
    scaling = replace(YARN, beta_fast=beta_fast, beta_slow=beta_slow)
    frequencies, factor = rotary_frequencies(64, 1_000_000.0, scaling)
    np.testing.assert_allclose(frequencies, yarn_frequencies(64, 1_000_000.0, scaling), rtol=1e-6)
    assert factor == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_rotation_preserves_norms_and_products_depend_on_distance_alone(tiny):
    q, k = normal(1, 1, 2, tiny.head_dim), normal(1, 1, 2, tiny.head_dim, seed=1)

    def product(query_position, key_position):
        rotated_q = rotate(q, layer_angles(tiny, jnp.full((1, 1), query_position))["global"])
        rotated_k = rotate(k, layer_angles(tiny, jnp.full((1, 1), key_position))["global"])
        np.testing.assert_allclose(np.linalg.norm(rotated_q), np.linalg.norm(q), rtol=1e-5)
        return (rotated_q * rotated_k).sum(axis=-1)

    np.testing.assert_allclose(product(9, 4), product(205, 200), atol=1e-4)
    assert not np.allclose(product(9, 4), product(9, 5), atol=1e-2)


def test_rotation_pairs_the_two_halves_of_a_head(tiny):
    x = np.zeros((1, 1, 1, tiny.head_dim), np.float32)
    x[..., 1] = 1.0
    angle = 5 * tiny.rope_theta ** (-2 / tiny.head_dim)  # pair 1 at position 5
    expected = np.zeros(tiny.head_dim)
    expected[[1, 1 + tiny.head_dim // 2]] = np.cos(angle), np.sin(angle)
    rotated = rotate(jnp.asarray(x), layer_angles(tiny, jnp.full((1, 1), 5))["global"])
    np.testing.assert_allclose(rotated[0, 0, 0], expected, atol=1e-6)


def test_yarn_scales_queries_and_keys(tiny):
    yarn = replace(tiny, rope_scaling=RopeScaling("yarn", 4.0, 64, 1.0, 4.0, 32.0, 1.0))
    x = jnp.asarray(normal(1, 1, 1, tiny.head_dim))
    rotated = rotate(x, layer_angles(yarn, jnp.full((1, 1), 100))["global"])
    np.testing.assert_allclose(np.linalg.norm(rotated), np.linalg.norm(x) * (0.1 * np.log(4) + 1), rtol=1e-5)
