"""Attention over blocks of queries against one plain softmax in float64 numpy."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention

from jaxllm.models import LayerCache, attention, build_model
from jaxllm.models.attention import (
    attend,
    attend_cache,
    attend_cudnn,
    attend_cudnn_packed,
    attend_splash,
    attend_xla,
    write_cache,
)
from jaxllm.parallel.sharding import MeshConfig, make_mesh


def queries_keys_values(config, batch, length, seed=0):
    rng = np.random.default_rng(seed)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return [rng.normal(size=(batch, length, n, config.head_dim)).astype(np.float32) for n in heads]


def plain_attention(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config):
    """Head by head, row by row, with all T x T scores."""
    B, T, H, h = q_BTHh.shape
    group = H // k_BTKh.shape[2]
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    causal = (distance >= 0) & (distance < (config.sliding_window or T))
    out = np.zeros(q_BTHh.shape)
    for b in range(B):
        mask = (
            causal
            if segment_ids_BT is None
            else causal & (segment_ids_BT[b][:, None] == segment_ids_BT[b][None])
        )
        for head in range(H):
            keys, values = k_BTKh[b, :, head // group], v_BTKh[b, :, head // group]
            scores = q_BTHh[b, :, head].astype(np.float64) @ keys.T / np.sqrt(h)
            if config.attention_softcap is not None:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            weights = np.where(mask, np.exp(scores), 0)
            out[b, :, head] = weights / weights.sum(axis=-1, keepdims=True) @ values
    return out


# One token; within, at and beyond one block of 64 queries; a length that no block divides.
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}, {"attention_softcap": 2.0}], ids=str)
def test_blocks_of_queries_equal_plain_attention(tiny, length, options):
    config = replace(tiny, **options)
    q, k, v = queries_keys_values(config, 2, length)
    segment_ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, length)))
    for segments in (None, segment_ids):
        out = jax.jit(attend_xla, static_argnums=(4, 5))(q, k, v, segments, config.sliding_window, config)
        np.testing.assert_allclose(out, plain_attention(q, k, v, segments, config), atol=1e-5)


def test_a_window_of_one_is_the_value_itself(tiny):
    q, k, v = queries_keys_values(tiny, 1, 70)
    out = attend_xla(q, k, v, None, 1, tiny)
    np.testing.assert_allclose(out, np.repeat(v, tiny.num_heads // tiny.num_kv_heads, axis=2), atol=1e-6)


def test_blockwise_gradient_equals_finite_differences(tiny):
    config = replace(tiny, sliding_window=5, layer_pattern=("local",), attention_softcap=3.0)
    q, k, v = queries_keys_values(config, 1, 70)
    directions = queries_keys_values(config, 1, 70, seed=1)
    weights = np.random.default_rng(2).normal(size=q.shape)

    def loss(q, k, v):
        return (attend_xla(q, k, v, None, config.sliding_window, config) * weights).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step = 1e-4

    def moved(sign):
        arrays = [x.astype(np.float64) + sign * step * d for x, d in zip((q, k, v), directions, strict=True)]
        return (plain_attention(*arrays, None, config) * weights).sum()

    assert slope == pytest.approx((moved(1) - moved(-1)) / (2 * step), rel=1e-3)


def test_the_backward_pass_saves_queries_keys_and_values_only(tiny):
    q, k, v = queries_keys_values(tiny, 1, 300)
    pull_back = jax.eval_shape(
        lambda *qkv: jax.vjp(lambda *x: attend_xla(*x, None, None, tiny), *qkv)[1], q, k, v
    )
    saved = sum(leaf.size for leaf in jax.tree.leaves(pull_back))
    assert saved == q.size + k.size + v.size  # no scores, and no slice of keys per block


def test_scores_and_softmax_are_float32_below_bfloat16_inputs(tiny):
    q, k, v = queries_keys_values(tiny, 1, 40)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (8 * q, k, v)]  # sharp: scores of about 8
    out = jax.jit(attend_xla, static_argnums=(4, 5))(*half, None, None, tiny)
    assert out.dtype == jnp.bfloat16
    exact = plain_attention(*(np.asarray(x, np.float32) for x in half), None, tiny)
    # Weights and output are rounded, to 2^-9 each; rounded scores would be off by 2^-6.
    assert np.linalg.norm(np.asarray(out, np.float32) - exact) / np.linalg.norm(exact) < 0.005


def test_a_query_whose_keys_are_all_masked_is_finite(tiny):
    q_BKGTh, k_BKSh = jnp.ones((1, 2, 2, 3, 8)), jnp.ones((1, 2, 5, 8))

    def loss(q_BKGTh):
        return attend(q_BKGTh, k_BKSh, k_BKSh, jnp.zeros((3, 5), bool), tiny).sum()

    value, gradient = jax.value_and_grad(loss)(q_BKGTh)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_rows_are_written_to_a_cache_at_different_positions(tiny):
    _, k, v = queries_keys_values(tiny, 3, 2)
    zeros = jnp.zeros((3, tiny.num_kv_heads, 6, tiny.head_dim))
    starts = np.array([0, 4, 2])
    cache = write_cache(LayerCache(zeros, zeros), k, v, starts[:, None] + np.arange(2))
    expected_keys, expected_values = np.zeros((2, *zeros.shape))
    for row, start in enumerate(starts):
        expected_keys[row, :, start : start + 2] = k[row].swapaxes(0, 1)
        expected_values[row, :, start : start + 2] = v[row].swapaxes(0, 1)
    np.testing.assert_array_equal(cache.keys_BKSh, expected_keys)
    np.testing.assert_array_equal(cache.values_BKSh, expected_values)


def test_a_tpu_selects_where_others_scatter_a_token_into_the_cache(tiny, monkeypatch):
    # A TPU copies a cache that it scatters into: four times the cycles of a decode step (docs/plan.md).
    _, *token = queries_keys_values(tiny, 3, 1)
    zeros, positions = jnp.zeros((3, tiny.num_kv_heads, 6, tiny.head_dim)), jnp.array([[0], [4], [2]])
    write = jax.jit(lambda k, v: write_cache(LayerCache(zeros, zeros), k, v, positions))
    traced = write.trace(*token)
    programs = {each: traced.lower(lowering_platforms=(each,)).as_text() for each in ("cpu", "tpu")}
    assert {each: "scatter" in text for each, text in programs.items()} == {"cpu": True, "tpu": False}
    scattered = write(*token)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, tpu, default: tpu(*arguments))
    selected = write_cache(LayerCache(zeros, zeros), *token, positions)
    jax.tree.map(np.testing.assert_array_equal, selected, scattered)


def test_a_query_over_a_cache_attends_to_its_window_and_to_no_later_slot(tiny):
    config = replace(tiny, sliding_window=3, layer_pattern=("local",))
    q, k, v = queries_keys_values(config, 1, 9)
    cache = LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
    expected = plain_attention(q, k, v, None, config)
    out = attend_cache(q[:, 5:7], cache, np.array([[5, 6]]), config.sliding_window, config)
    np.testing.assert_allclose(out, expected[:, 5:7], atol=1e-5)


# Other implementations


def test_the_arguments_of_cudnn_describe_the_same_attention(tiny, monkeypatch):
    """XLA's implementation of the same function takes the arguments: the kernel needs a GPU."""
    implementations = []

    def on_xla(*args, implementation, **kwargs):
        implementations.append(implementation)
        return dot_product_attention(*args, implementation="xla", **kwargs)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    q, k, v = queries_keys_values(tiny, 2, 30)
    segment_ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, 30)))
    for config in (tiny, replace(tiny, sliding_window=4, layer_pattern=("local",))):
        for segments in (None, segment_ids):
            out = attend_cudnn(q, k, v, segments, config.sliding_window, config)
            np.testing.assert_allclose(out, plain_attention(q, k, v, segments, config), atol=1e-5)
    assert set(implementations) == {"cudnn"}


def test_cudnn_gets_each_packed_document_as_a_sequence(tiny, monkeypatch):
    """JAX's own preparation of the arguments says where each lies among the rows: the kernel needs a GPU."""

    def kernel(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type == fused_attention_stablehlo.MaskType.PADDING_CAUSAL
        B, T, H, h = q.shape
        prepared = fused_attention_stablehlo._fix_seqlen_offsets(
            q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k
        )
        lengths, key_lengths, starts, key_starts = (np.asarray(x).ravel() for x in prepared)
        np.testing.assert_array_equal(lengths, key_lengths)
        np.testing.assert_array_equal(starts, key_starts)
        q, k, v = (np.asarray(x).reshape(B * T, H, h) for x in (q, k, v))
        out = np.full((B * T, H, h), np.nan)
        for length, start in zip(lengths, starts // (H * h), strict=False):
            if length:
                at = slice(start, start + length)
                out[at] = plain_attention(q[at][None], k[at][None], v[at][None], None, tiny)[0]
        return jnp.asarray(out.reshape(B, T, H, h))

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", kernel)
    q, k, v = queries_keys_values(tiny, 4, 30)
    segment_ids = np.zeros((4, 30), int)  # of one document, of three and padding, of two, of one a token
    segment_ids[1] = np.repeat([1, 2, 3, 0], [5, 1, 20, 4])
    segment_ids[2, 7:] = 1
    segment_ids[3] = np.arange(30)
    out = attend_cudnn_packed(q, k, v, segment_ids, None, tiny)
    np.testing.assert_allclose(out, plain_attention(q, k, v, segment_ids, tiny), atol=1e-5)
    monkeypatch.setattr(attention, "PACKED_DOCUMENTS", 20)
    out = attend_cudnn_packed(q, k, v, segment_ids, None, tiny)
    assert np.isnan(out[3]).all()  # loud, where it would be wrong
    assert np.isfinite(out[:3]).all()


@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(2, 2, 2), MeshConfig(8, 1, 1), MeshConfig(1, 2, 4)], ids=str
)
def test_splash_equals_xla_on_any_mesh(tiny, mesh, monkeypatch):
    """Interpreted. Four rows over 8 devices, or two key-value heads over 4, do not divide: not sharded."""
    interpreted = partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
    window = {"sliding_window": 40, "layer_pattern": ("local",)}
    config = tiny if mesh else replace(tiny, attention_softcap=5.0, **window)
    q, k, v = queries_keys_values(config, 4, 150)
    weights = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
    segment_ids = None if mesh is None else np.sort(np.random.default_rng(1).integers(0, 3, (4, 150)))

    def value_and_gradient(attend):
        def loss(q, k, v):
            out = attend(q, k, v, segment_ids, config.sliding_window, config)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    expected = value_and_gradient(attend_xla)
    with jax.set_mesh(make_mesh(mesh)) if mesh else nullcontext():
        actual = value_and_gradient(attend_splash)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), actual, expected)


def lowered_gradient(config, platform):
    """The lowered gradient, as text, for a platform that this machine need not have."""
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = segment_ids = np.ones((1, 128), int)

    def loss(params):
        return model.apply(params, tokens, segment_ids=segment_ids).hidden.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("attention", 1), ("full", 2)])
def test_kernels_lower_and_repeat_the_forward_pass_only_where_remat_says_so(
    tiny, remat, forward, monkeypatch
):
    config = replace(tiny, remat=remat, sliding_window=100, layer_pattern=("local",))
    splash = lowered_gradient(replace(config, attention="splash"), "tpu")
    assert splash.count("tpu_custom_call") == forward + 2  # gradients of queries; of keys and values

    installed = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", installed)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    packed = replace(config, sliding_window=None, layer_pattern=("global",), attention="cudnn_packed")
    packed = lowered_gradient(replace(packed, compute_dtype="bfloat16"), "cuda")
    assert packed.count("__cudnn$fmhaSoftmax(") == forward  # without a bias
    cudnn = lowered_gradient(replace(config, attention="cudnn", compute_dtype="bfloat16"), "cuda")
    assert cudnn.count("__cudnn$fmhaScaleBiasSoftmax(") == forward
    assert cudnn.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
