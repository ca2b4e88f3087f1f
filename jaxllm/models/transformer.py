"""A decoder-only transformer as four pure functions over a nested dict of arrays.

Shapes: B sequences, T positions, S cache slots, D width, V vocabulary, L layers.

The blocks' parameters are stacked [L, ...] whether the layers are scanned or unrolled, so a
checkpoint does not know which it was.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.models.attention import Attention, LayerCache, keep_attention
from jaxllm.models.config import ATTENTION, ModelConfig
from jaxllm.models.layers import GatedMLP, RMSNorm, rotary_angles
from jaxllm.parallel.sharding import BATCH, P, constrain

Params = dict[str, Any]
Cache = tuple[LayerCache, ...]  # one per layer


class Model(NamedTuple):
    """What the rest of the code knows of a model. See `build_model` for the functions."""

    config: ModelConfig
    init: Callable[..., Params]
    apply: Callable[..., tuple[jax.Array, Cache | None]]
    head: Callable[[Params], jax.Array]
    unembed: Callable[[Params, jax.Array], jax.Array]
    logits: Callable[..., jax.Array]
    init_cache: Callable[..., Cache]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, angles, segment_ids_BT, cache=None, look_back=False):
        c = self.config
        normed_BTD = RMSNorm(c.norm_epsilon, c.param_dtype, name="attention_norm")(x_BTD)
        attention = Attention(c, name="attention")
        attended_BTD, cache = attention(normed_BTD, positions_BT, angles, segment_ids_BT, cache, look_back)
        x_BTD = x_BTD + attended_BTD
        x_BTD = x_BTD + GatedMLP(c, name="mlp")(
            RMSNorm(c.norm_epsilon, c.param_dtype, name="mlp_norm")(x_BTD)
        )
        return constrain(x_BTD, BATCH), cache


def unstack_layers(params: Params) -> Params:
    """The same parameters with `blocks` as a tuple of L trees: what a decode loop reads without slicing."""
    if isinstance(params["blocks"], tuple):
        return params
    leaves, structure = jax.tree.flatten(params["blocks"])
    # lax.split, whose gradient is one concatenation; indexing would add L arrays of the full size.
    layers = zip(*(jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves), strict=True)
    blocks = tuple(structure.unflatten([leaf[0] for leaf in layer]) for layer in layers)
    return {**params, "blocks": blocks}


REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": keep_attention,
}


def check_model_config(config: ModelConfig) -> None:
    """ConfigError, naming the field, where sizes and switches do not fit together."""
    for field, value in vars(config).items():
        if isinstance(value, int | float) and value is not False and value <= 0:
            raise ConfigError(f"model.{field}={value} must be above 0")
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"model.head_dim={config.head_dim} must be even: rotary positions turn pairs")
    choices = {
        "activation": ("silu", "gelu"),
        "remat": ("none", *REMAT_POLICIES),
        "attention": tuple(ATTENTION),
        "compute_dtype": ("float32", "bfloat16", "float16"),
        "param_dtype": ("float32", "bfloat16"),
    }
    for field, allowed in choices.items():
        if getattr(config, field) not in allowed:
            raise ConfigError(f"model.{field}={getattr(config, field)!r}: choose one of {', '.join(allowed)}")
    if config.rope_scaling.kind not in ("none", "llama3", "yarn"):
        raise ConfigError(
            f"model.rope_scaling.kind={config.rope_scaling.kind!r}: choose none, llama3 or yarn"
        )
    if config.attention == "cudnn" and config.attention_softcap is not None:
        raise ConfigError("model.attention=cudnn has no softcap: use model.attention=xla")
    if config.attention == "cudnn" and config.compute_dtype == "float32":
        raise ConfigError("model.attention=cudnn needs model.compute_dtype=bfloat16 or float16")


@functools.cache  # what was compiled for a shape serves every checkpoint of it
def build_model(config: ModelConfig) -> Model:
    """The functions of a decoder with this shape.

    init(key) -> params.
    apply(params, tokens[B, T], *, positions=None, segment_ids=None, cache=None, noise=None) ->
        (hidden[B, T, D], cache): the final normed states. Tokens see earlier ones of their own segment.
        noise[B, T, D] is added to the embedded tokens. A cache given without positions is filled from its
        start. With them (consecutive in each row), tokens go to the slots positions[b] and see every slot up
        to their own: prompts of different lengths are padded on the right, and the pads overwritten later.
    head(params) -> [D, V], in the compute dtype: what `linear_cross_entropy` takes.
    unembed(params, hidden[..., D]) -> float32 logits [..., V], softcapped.
    logits(params, tokens[B, T]) -> float32 [B, T, V]: the dense form, for small inputs.
    init_cache(batch, length, dtype=None) -> an empty cache.
    """
    check_model_config(config)
    block = Block(config)
    final_norm = RMSNorm(config.norm_epsilon, config.param_dtype)
    compute_dtype = jnp.dtype(config.compute_dtype)

    def init(key):
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.width), compute_dtype)
        positions = jnp.zeros((1, 1), jnp.int32)
        angles = rotary_angles(config, positions)

        def init_block(key):
            return block.init(key, x, positions, angles, None)["params"]

        normal = jax.nn.initializers.normal(0.02, jnp.dtype(config.param_dtype))
        params = {
            "embed": {"table": normal(embed_key, (config.vocab_size, config.width))},
            "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.num_layers)),
            "final_norm": final_norm.init(head_key, x)["params"],
        }
        if not config.tie_embeddings:
            params["head"] = {"kernel": normal(head_key, (config.width, config.vocab_size))}
        return params

    def apply(params, tokens, *, positions=None, segment_ids=None, cache=None, noise=None):
        look_back = cache is not None and positions is not None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        angles = rotary_angles(config, positions)
        # Whole rows for the lookup: split along D as it is stored, the result would have to be laid out anew.
        table = constrain(params["embed"]["table"].astype(compute_dtype), P("tensor", None))
        x = constrain(table[tokens], BATCH)
        if noise is not None:
            x = x + noise.astype(compute_dtype)

        def run_block(x, block_params):
            return block.apply({"params": block_params}, x, positions, angles, segment_ids)[0]

        if config.remat != "none":
            run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[config.remat])

        if cache is not None:
            layers = unstack_layers(params)["blocks"]
            updated = []
            for layer, layer_cache in zip(layers, cache, strict=True):
                x, layer_cache = block.apply(
                    {"params": layer}, x, positions, angles, segment_ids, layer_cache, look_back
                )
                updated.append(layer_cache)
            cache = tuple(updated)
        elif config.scan_layers and not isinstance(params["blocks"], tuple):
            x, _ = jax.lax.scan(lambda x, layer: (run_block(x, layer), None), x, params["blocks"])
        else:
            for layer in unstack_layers(params)["blocks"]:
                x = run_block(x, layer)
        return final_norm.apply({"params": params["final_norm"]}, x), cache

    def head(params):
        kernel = params["embed"]["table"].T if config.tie_embeddings else params["head"]["kernel"]
        return kernel.astype(compute_dtype)

    def unembed(params, hidden):
        z = jnp.matmul(hidden, head(params), preferred_element_type=jnp.float32)
        softcap = config.logit_softcap
        return z if softcap is None else softcap * jnp.tanh(z / softcap)

    def logits(params, tokens, **kwargs):
        return unembed(params, apply(params, tokens, **kwargs)[0])

    def init_cache(batch, length, dtype=None):
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        dtype = compute_dtype if dtype is None else dtype
        return tuple(
            LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
        )

    return Model(config, init, apply, head, unembed, logits, init_cache)
