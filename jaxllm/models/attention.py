"""Causal attention: over a whole sequence, or over a cache while decoding.

Shapes: B sequences, T query positions, S key positions or cache slots, D width, H query heads,
K key-value heads, G = H / K queries per key-value head, h head width.
"""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxllm.models.config import ModelConfig, layer_window
from jaxllm.models.interface import Array, LayerCache
from jaxllm.models.layers import Angles, Linear, RMSNorm, rotate
from jaxllm.parallel import sequence

OUTPUT_NAME = "attention_output"
PACKED_DOCUMENTS = 64  # of a row, at most, with model.attention=cudnn_packed
MASKED = -1e30  # finite, so that a query whose keys are all masked averages the values; -inf would give NaN


class Context(NamedTuple):
    """What attention needs to know about a batch of tokens, the same in every layer."""

    positions_BT: Array  # int
    angles: dict[str, Angles]  # cos and sin at these positions by kind of layer, from `layer_angles`
    segment_ids_BT: Array | None  # int; tokens attend within their own segment


def attention_saveable(primitive: Any, *args: Any, **params: Any) -> bool:
    """A remat policy that saves attention's output, and what a kernel's backward pass needs."""
    named = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
    # cuDNN's softmax statistics have no name; they are recognized by the primitive that computes them.
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)


def causal_mask(query_positions: Array, key_positions: Array, window: int | None) -> Array:
    """True where a query attends to a key: one that is not later, and within the sliding window if any."""
    mask = key_positions <= query_positions
    return mask if window is None else mask & (query_positions - key_positions < window)


def attention_scale(config: ModelConfig) -> float:
    """What multiplies the product of a query and a key."""
    return config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale


def attend(q_BKGTh: Array, k_BKSh: Array, v_BKSh: Array, mask: Array, config: ModelConfig) -> jax.Array:
    """softmax(scale q k) v, softmax in float32; mask broadcasts to [B, K, G, T, S]."""
    B, K, G, T, h = q_BKGTh.shape
    q_BKRh = q_BKGTh.reshape(B, K, G * T, h)  # queries of a group share their keys: one matrix product
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRh, k_BKSh, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, -1) * attention_scale(config)
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights_BKRS = weights.astype(v_BKSh.dtype).reshape(B, K, G * T, -1)
    out_BKGTh = jnp.einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKSh).reshape(q_BKGTh.shape)
    # Normalized after the product with v: h divisions per query instead of S.
    return (out_BKGTh / weights.sum(axis=-1, keepdims=True)).astype(v_BKSh.dtype)


def attend_xla(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    segment_ids_BT: Array | None,
    window: int | None,
    config: ModelConfig,
) -> jax.Array:
    """Attention in blocks of queries, each over only the keys that causality and the window allow.

    Half the work of a full square; the backward pass recomputes the scores, so no [B, H, T, T] is stored.
    Where each device has a part of every row's tokens, its queries attend to the keys of all parts; which of
    these are later is not known when it compiles, so that all are computed.
    """
    B, T, H, h = q_BTHh.shape
    K = k_BTKh.shape[2]
    offset, segment_ids_BS = 0, segment_ids_BT
    if split := sequence.is_split():
        offset = sequence.first_position(T)
        k_BTKh, v_BTKh, segment_ids_BS = jax.tree.map(sequence.gathered, (k_BTKh, v_BTKh, segment_ids_BT))
    S = k_BTKh.shape[1]
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    k, v = k_BTKh.transpose(0, 2, 1, 3), v_BTKh.transpose(0, 2, 1, 3)
    block = max(64, -(-T // 8))  # at most 8 blocks: more would only make the program larger

    def attend_block(
        start: int, q: Array, k: Array, v: Array, queries_BT: Array | None, keys_BS: Array | None
    ) -> jax.Array:
        stop = min(start + block, T)
        first = 0 if split or window is None else max(0, start - window + 1)
        last = S if split else stop
        queries, keys = offset + jnp.arange(start, stop), jnp.arange(first, last)
        mask = causal_mask(queries[:, None], keys[None, :], window)[None, None, None]
        if queries_BT is not None and keys_BS is not None:
            same = queries_BT[:, start:stop, None] == keys_BS[:, None, first:last]
            mask = mask & same[:, None, None]
        return attend(q[..., start:stop, :], k[:, :, first:last], v[:, :, first:last], mask, config)

    attend_block = jax.checkpoint(attend_block, static_argnums=0)  # saves q, k, v and not their slices
    blocks = [attend_block(start, q, k, v, segment_ids_BT, segment_ids_BS) for start in range(0, T, block)]
    out = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)
    return checkpoint_name(out, OUTPUT_NAME)


def attend_cudnn(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    segment_ids_BT: Array | None,
    window: int | None,
    config: ModelConfig,
) -> jax.Array:
    """cuDNN's flash attention on NVIDIA GPUs, in bfloat16 or float16."""
    mask = None
    if segment_ids_BT is not None:
        mask = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHh,
        k_BTKh,
        v_BTKh,
        mask=mask,
        scale=attention_scale(config),
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def attend_cudnn_packed(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    segment_ids_BT: Array | None,
    window: int | None,
    config: ModelConfig,
) -> jax.Array:
    """cuDNN's flash attention with the documents of a row as sequences of their own (Hopper and later).

    It has no bias [B, 1, T, T], and no gradient of one, which is what a mask becomes.

    The result is NaN where a row has more than PACKED_DOCUMENTS documents.
    """
    if segment_ids_BT is None or window is not None:
        return attend_cudnn(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, window, config)
    from jax._src.cudnn import fused_attention_stablehlo as fused  # jax.nn's function has no such arguments

    lengths_BM, starts_BM, number_B = documents_of(segment_ids_BT, PACKED_DOCUMENTS)
    starts_BN = jnp.pad(starts_BM, [(0, 0), (0, 1)], constant_values=-1)
    # JAX takes the offsets of keys to be those of queries, which they are with as many heads.
    k_BTHh, v_BTHh = (jnp.repeat(x, q_BTHh.shape[2] // x.shape[2], axis=2) for x in (k_BTKh, v_BTKh))
    out_BTHh = fused.dot_product_attention(
        jnp.asarray(q_BTHh),
        k_BTHh,
        v_BTHh,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BN,
        kv_offsets=starts_BN,
        scale=attention_scale(config),
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )
    return jnp.where(number_B[:, None, None, None] > PACKED_DOCUMENTS, jnp.nan, cast(jax.Array, out_BTHh))


def documents_of(segment_ids_BT: Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths and starts [B, most] of the documents of each row, -1 beyond the last, and their number [B]."""
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    document_BT = jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])
    number_B = document_BT[:, -1] + 1
    lengths_BM = jnp.sum(document_BT[:, :, None] == jnp.arange(most), axis=1, dtype=jnp.int32)
    starts_BM = jnp.cumsum(lengths_BM, axis=1, dtype=jnp.int32) - lengths_BM
    exists_BM = jnp.arange(most) < number_B[:, None]
    return jnp.where(exists_BM, lengths_BM, -1), jnp.where(exists_BM, starts_BM, -1), number_B


def attend_splash(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    segment_ids_BT: Array | None,
    window: int | None,
    config: ModelConfig,
) -> jax.Array:
    """The Splash kernel on TPUs: flash attention that skips blocks that are masked entirely.

    XLA does not partition a Pallas call: under `jax.set_mesh` each device computes its own rows and heads,
    or all of them where their number is not divisible by the axes of the mesh.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def attend_shard(
        q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segment_ids_BT: jax.Array | None
    ) -> jax.Array:
        _, T, H, _ = q_BTHh.shape
        left = None if window is None else window - 1
        block = next(size for size in (512, 256, 128) if T % size == 0)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.LocalMask((T, T), (left, 0), offset=0)] * H),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_kv_compute=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_kv_dkv_compute=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            attn_logits_soft_cap=config.attention_softcap,
            residual_checkpoint_name=OUTPUT_NAME,
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q_BTHh * attention_scale(config), k_BTKh, v_BTKh))
        segments = None if segment_ids_BT is None else splash.SegmentIds(segment_ids_BT, segment_ids_BT)
        return cast(jax.Array, jax.vmap(kernel)(q, k, v, segments)).swapaxes(1, 2)

    B, T, _, _ = q_BTHh.shape
    inputs = q_BTHh, k_BTKh, v_BTKh, segment_ids_BT
    # Padded on the right to whole blocks; the causal mask hides the padding.
    inputs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, -T % 128)] + [(0, 0)] * (x.ndim - 2)), inputs)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = ("data", "fsdp") if B % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        heads = P(rows, None, "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None)
        specs = (heads, heads, heads, P(rows))
        attend_shard = jax.shard_map(attend_shard, in_specs=specs, out_specs=heads, check_vma=False)
    return attend_shard(*inputs)[:, :T]


IMPLEMENTATIONS = {
    "xla": attend_xla,
    "cudnn": attend_cudnn,
    "cudnn_packed": attend_cudnn_packed,
    "splash": attend_splash,
}


def tokens_at(tree: Any, at_BN: Array | None) -> Any:
    """Of arrays [B, T, ...] the tokens [B, N, ...] at some indices of each row; None: all."""
    if at_BN is None:
        return tree
    return jax.tree.map(lambda x: jax.vmap(lambda row, at: row[at])(x, at_BN), tree)


def attend_cache(
    q_BTHh: Array, cache: LayerCache, positions_BT: Array, window: int | None, config: ModelConfig
) -> jax.Array:
    """Attention of queries at given positions [B, T] over the slots of a cache."""
    B, T, H, h = q_BTHh.shape
    _, K, S, _ = cache.keys_BKSh.shape
    q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    mask = causal_mask(positions_BT[:, :, None], jnp.arange(S), window)[:, None, None]
    out = attend(q, cache.keys_BKSh.astype(q.dtype), cache.values_BKSh.astype(q.dtype), mask, config)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def write_cache(cache: LayerCache, k_BTKh: Array, v_BTKh: Array, positions_BT: Array) -> LayerCache:
    """The cache with T new keys and values of each row in its slots positions[b]."""

    def scattered(slots_BKSh: jax.Array, new_BKTh: Array) -> jax.Array:
        # XLA updates a cache in place by a scatter, but copies it to update a slice of a row. It is batched
        # over the rows: a scatter by their numbers would gather the new keys of all devices.
        return jax.vmap(lambda slots, new, at: slots.at[:, at].set(new))(slots_BKSh, new_BKTh, positions_BT)

    def selected(slots_BKSh: jax.Array, new_BK1h: Array) -> jax.Array:
        here_BS = jnp.arange(slots_BKSh.shape[2]) == positions_BT
        return jnp.where(here_BS[:, None, :, None], new_BK1h, slots_BKSh)

    def write(slots_BKSh: jax.Array, new_BTKh: Array) -> jax.Array:
        new_BKTh = new_BTKh.transpose(0, 2, 1, 3).astype(slots_BKSh.dtype)
        if positions_BT.shape[1] > 1:
            return scattered(slots_BKSh, new_BKTh)
        # A TPU copies the cache to scatter into it: docs/plan.md has both.
        return jax.lax.platform_dependent(slots_BKSh, new_BKTh, tpu=selected, default=scattered)

    return LayerCache(write(cache.keys_BKSh, k_BTKh), write(cache.values_BKSh, v_BTKh))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with rotary positions or without."""

    config: ModelConfig
    kind: str  # of the layer

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: LayerCache | None,
        attend_to_cache: bool,
        at_BN: Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention's output [B, T, D], and the cache with the new keys and values in it.

        attend_to_cache: attend to all that is in the cache (decoding), and not only to the new keys
        (training, and prefill, where the cache is empty before).
        at_BN: the queries to compute, the output being [B, N, D]; None: all.
        """
        c = self.config
        queries_BTD = tokens_at(x_BTD, at_BN)

        def project(name: str, num_heads: int, x_BTD: jax.Array = x_BTD) -> jax.Array:
            projected = Linear(c, num_heads * c.head_dim, c.qkv_bias, name=name)(x_BTD)
            norm = RMSNorm(c.norm_epsilon, c.param_dtype, c.zero_centered_norm, name=f"{name}_norm")
            normed = name != "value"
            if normed and c.qk_norm == "all_heads":
                projected = norm(projected)
            heads = projected.reshape(*x_BTD.shape[:2], num_heads, c.head_dim)
            return norm(heads) if normed and c.qk_norm == "head" else heads

        q_BTHh = project("query", c.num_heads, queries_BTD)
        k_BTKh = project("key", c.num_kv_heads)
        v_BTKh = project("value", c.num_kv_heads)
        if (angles := context.angles.get(self.kind)) is not None:
            q_BTHh, k_BTKh = rotate(q_BTHh, tokens_at(angles, at_BN)), rotate(k_BTKh, angles)
        window = layer_window(c, self.kind)

        if cache is not None:
            cache = write_cache(cache, k_BTKh, v_BTKh, context.positions_BT)
        if cache is not None and attend_to_cache:
            out_BTHh = attend_cache(q_BTHh, cache, context.positions_BT, window, c)
        elif at_BN is not None:
            keys_and_values = LayerCache(k_BTKh.transpose(0, 2, 1, 3), v_BTKh.transpose(0, 2, 1, 3))
            out_BTHh = attend_cache(q_BTHh, keys_and_values, at_BN, window, c)
        else:
            implementation = IMPLEMENTATIONS[c.attention]
            if sequence.is_split():  # the kernels know of no parts
                implementation = attend_xla
            out_BTHh = implementation(q_BTHh, k_BTKh, v_BTKh, context.segment_ids_BT, window, c)
        output = Linear(c, c.width, c.output_bias, scale=0.5 / c.num_layers, name="output")
        return output(out_BTHh.reshape(*out_BTHh.shape[:2], -1)), cache
