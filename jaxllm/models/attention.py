"""Causal attention: over a whole sequence, or over a cache while decoding.

Shapes: B sequences, T query positions, S key positions or cache slots, D width, H query heads,
K key-value heads, G = H / K queries a key-value head, h head width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Linear, RMSNorm, rotate

OUTPUT_NAME = "attention_output"
MASKED = -1e30  # finite, so that a row that sees nothing is a plain average and not NaN


class LayerCache(NamedTuple):
    """Keys and values of one layer, one slot a position. [B, K, S, h] reads fastest in a decode step."""

    keys_BKSh: jax.Array
    values_BKSh: jax.Array


def keep_attention(primitive, *args, **params) -> bool:
    """A remat policy: attention's output, and what a kernel needs to go backwards from it, are kept."""
    named = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
    # cuDNN's softmax statistics have no name, only the primitive that makes them and the output.
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)


def visible(query_positions, key_positions, window: int | None) -> jax.Array:
    """Causal, and within the sliding window where there is one."""
    seen = key_positions <= query_positions
    return seen if window is None else seen & (query_positions - key_positions < window)


def weigh(q_BKGTh, k_BKSh, v_BKSh, mask, config: ModelConfig) -> jax.Array:
    """softmax(q k / sqrt(h)) v, softmax in float32; mask broadcasts to [B, K, G, T, S]."""
    B, K, G, T, h = q_BKGTh.shape
    q_BKRh = q_BKGTh.reshape(B, K, G * T, h)  # queries of a group share their keys: one matrix product
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRh, k_BKSh, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, -1) * h**-0.5
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights_BKRS = weights.astype(v_BKSh.dtype).reshape(B, K, G * T, -1)
    out_BKGTh = jnp.einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKSh).reshape(q_BKGTh.shape)
    # Divided last, by the sum of weights: h divisions a query, not S.
    return (out_BKGTh / weights.sum(axis=-1, keepdims=True)).astype(v_BKSh.dtype)


def attend_xla(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config: ModelConfig) -> jax.Array:
    """Attention in blocks of queries, each over only the keys that it can see.

    Half the work of a full square, and with scores recomputed backwards no layer keeps a [B, H, T, T].
    """
    B, T, H, h = q_BTHh.shape
    K = k_BTKh.shape[2]
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    k, v = k_BTKh.transpose(0, 2, 1, 3), v_BTKh.transpose(0, 2, 1, 3)
    block = max(64, -(-T // 8))  # at most 8 blocks: more would only lengthen the program

    def attend_block(start, q, k, v, segment_ids_BT):
        stop = min(start + block, T)
        first = 0 if config.sliding_window is None else max(0, start - config.sliding_window + 1)
        queries, keys = jnp.arange(start, stop), jnp.arange(first, stop)
        mask = visible(queries[:, None], keys[None, :], config.sliding_window)[None, None, None]
        if segment_ids_BT is not None:
            same = segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, first:stop]
            mask = mask & same[:, None, None]
        return weigh(q[..., start:stop, :], k[:, :, first:stop], v[:, :, first:stop], mask, config)

    attend_block = jax.checkpoint(attend_block, static_argnums=0)  # keeps q, k, v; not their slices
    blocks = [attend_block(start, q, k, v, segment_ids_BT) for start in range(0, T, block)]
    out = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)
    return checkpoint_name(out, OUTPUT_NAME)


def attend_cudnn(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config: ModelConfig) -> jax.Array:
    """cuDNN's flash attention on NVIDIA GPUs, in bfloat16 or float16."""
    mask = None
    if segment_ids_BT is not None:
        mask = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHh, k_BTKh, v_BTKh, mask=mask, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def attend_splash(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config: ModelConfig) -> jax.Array:
    """The Splash kernel on TPUs: flash attention that skips blocks without anything to see.

    A Pallas call does not partition by itself: under `jax.set_mesh` each device takes its rows and heads,
    where they divide.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def attend_shard(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT):
        _, T, H, h = q_BTHh.shape
        left = None if config.sliding_window is None else config.sliding_window - 1
        block = next(size for size in (512, 256, 128) if T % size == 0)
        attend = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.LocalMask((T, T), (left, 0), offset=0)] * H),
            block_sizes=splash.BlockSizes(*[block] * 8),
            attn_logits_soft_cap=config.attention_softcap,
            residual_checkpoint_name=OUTPUT_NAME,
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q_BTHh * h**-0.5, k_BTKh, v_BTKh))
        segments = None if segment_ids_BT is None else splash.SegmentIds(segment_ids_BT, segment_ids_BT)
        return jax.vmap(attend)(q, k, v, segments).swapaxes(1, 2)

    B, T, _, _ = q_BTHh.shape
    inputs = q_BTHh, k_BTKh, v_BTKh, segment_ids_BT
    # To whole blocks; no one sees what comes after.
    inputs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, -T % 128)] + [(0, 0)] * (x.ndim - 2)), inputs)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = ("data", "fsdp") if B % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        heads = P(rows, None, "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None)
        specs = (heads, heads, heads, P(rows))
        attend_shard = jax.shard_map(attend_shard, in_specs=specs, out_specs=heads, check_vma=False)
    return attend_shard(*inputs)[:, :T]


def attend_cache(q_BTHh, cache: LayerCache, positions_BT, config: ModelConfig) -> jax.Array:
    """Queries at given positions over the slots of a cache."""
    B, T, H, h = q_BTHh.shape
    _, K, S, _ = cache.keys_BKSh.shape
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    mask = visible(positions_BT[:, :, None], jnp.arange(S), config.sliding_window)[:, None, None]
    out = weigh(q, cache.keys_BKSh.astype(q.dtype), cache.values_BKSh.astype(q.dtype), mask, config)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def write_cache(cache: LayerCache, k_BTKh, v_BTKh, positions_BT) -> LayerCache:
    """Put T new keys and values of each row into its slots positions[b]."""
    B, K, _, _ = cache.keys_BKSh.shape
    # As a scatter, which XLA does in place; a slice update of one row it does in a copy.
    at = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None], positions_BT[:, None, :]
    return LayerCache(
        cache.keys_BKSh.at[at].set(k_BTKh.transpose(0, 2, 1, 3).astype(cache.keys_BKSh.dtype)),
        cache.values_BKSh.at[at].set(v_BTKh.transpose(0, 2, 1, 3).astype(cache.values_BKSh.dtype)),
    )


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD, positions_BT, angles, segment_ids_BT, cache: LayerCache | None, look_back: bool
    ):
        c = self.config
        B, T, _ = x_BTD.shape

        def heads(name, number):
            projected = Linear(number * c.head_dim, c.qkv_bias, c.param_dtype, name=name)(x_BTD)
            return projected.reshape(B, T, number, c.head_dim)

        q_BTHh = heads("query", c.num_heads)
        k_BTKh = heads("key", c.num_kv_heads)
        v_BTKh = heads("value", c.num_kv_heads)
        if c.qk_norm:
            q_BTHh = RMSNorm(c.norm_epsilon, c.param_dtype, name="query_norm")(q_BTHh)
            k_BTKh = RMSNorm(c.norm_epsilon, c.param_dtype, name="key_norm")(k_BTKh)
        q_BTHh, k_BTKh = rotate(q_BTHh, angles), rotate(k_BTKh, angles)

        if cache is not None:
            cache = write_cache(cache, k_BTKh, v_BTKh, positions_BT)
        if look_back:
            out_BTHh = attend_cache(q_BTHh, cache, positions_BT, c)
        else:
            attend = {"xla": attend_xla, "cudnn": attend_cudnn, "splash": attend_splash}[c.attention]
            out_BTHh = attend(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, c)
        output = Linear(c.width, c.output_bias, c.param_dtype, scale=0.5 / c.num_layers, name="output")
        return output(out_BTHh.reshape(B, T, -1)), cache
