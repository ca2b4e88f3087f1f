"""A decoder-only transformer: pure functions of a nested dict of arrays.

Shapes: B sequences, T positions, S cache slots, D width, V vocabulary, L layers.

The blocks' parameters are stacked [L, ...] whether the layers are scanned or unrolled, so a
checkpoint does not depend on it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxllm.models.attention import Attention, Context, attention_saveable, tokens_at
from jaxllm.models.config import ModelConfig, check_model_config, layer_kinds
from jaxllm.models.interface import Array, Aux, Cache, LayerCache, Model, Output, Params
from jaxllm.models.layers import MLP, LayerNorm, RMSNorm, layer_angles, make_norm
from jaxllm.parallel import sequence
from jaxllm.parallel.sharding import BATCH, constrain


class BlockOutput(NamedTuple):
    """What a block returns."""

    hidden: jax.Array  # [B, T, D]
    cache: LayerCache | None
    aux: Aux  # the block's auxiliary losses, as in `Output`


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or with norms on what is added, or with both."""

    config: ModelConfig
    kind: str  # one of LAYER_KINDS

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: LayerCache | None = None,
        attend_to_cache: bool = False,
        at_BN: Array | None = None,
    ) -> BlockOutput:
        """The hidden states of all tokens, or only of those at some indices of each row."""
        c = self.config
        before, after = c.norm_position != "after", c.norm_position != "before"

        def norm(x_BTD: jax.Array, name: str, wanted: bool) -> jax.Array:
            return make_norm(c, name)(x_BTD) if wanted else x_BTD

        attention = Attention(c, self.kind, name="attention")
        normed_BTD = norm(x_BTD, "attention_norm", before)
        attended_BTD, cache = attention(normed_BTD, context, cache, attend_to_cache, at_BN)
        x_BTD = tokens_at(x_BTD, at_BN) + norm(attended_BTD, "attention_output_norm", after)
        mlp_BTD = MLP(c, name="mlp")(norm(x_BTD, "mlp_norm", before))
        x_BTD = x_BTD + norm(mlp_BTD, "mlp_output_norm", after)
        return BlockOutput(constrain(x_BTD, BATCH), cache, aux={})


def unstack_layers(params: Params) -> Params:
    """The same parameters with `blocks` as a tuple of L trees, which a decode loop reads without slicing."""
    if isinstance(params["blocks"], tuple):
        return params
    leaves, structure = jax.tree.flatten(params["blocks"])
    # The gradient of lax.split is one concatenation; that of indexing would add L arrays of the full size.
    layers = zip(*(jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves), strict=True)
    blocks = tuple(structure.unflatten([leaf[0] for leaf in layer]) for layer in layers)
    return {**params, "blocks": blocks}


def layer_of(stacked: Any, i: int) -> Any:
    """Layer i of a tree of stacked parameters."""
    return jax.tree.map(lambda p: p[i], stacked)


def add_aux(total: Aux, layer: Aux) -> Aux:
    """The auxiliary losses of several layers together: sums and weights add, so the mean is over layers."""
    return {**total, **{name: value + total.get(name, 0) for name, value in layer.items()}}


REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": attention_saveable,
}


@dataclass(frozen=True)
class Transformer:
    """A dense decoder: embedding, blocks, final norm, head. `Model` describes its methods."""

    config: ModelConfig

    def __post_init__(self) -> None:
        check_model_config(self.config)
        # jax.jit recognizes a function by its identity, and each access to a method makes a new object.
        # Stored here once, jax.jit(model.apply) finds again what it has compiled for this model.
        for name in ("init", "apply", "logits"):
            object.__setattr__(self, name, getattr(self, name))

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.compute_dtype)

    @property
    def final_norm(self) -> RMSNorm | LayerNorm:
        return make_norm(self.config)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, a nested dict."""
        c = self.config
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, c.width), self.compute_dtype)
        positions = jnp.zeros((1, 1), jnp.int32)
        context = Context(positions, layer_angles(c, positions), segment_ids_BT=None)
        # The kinds of layers have the same parameters.
        block, layer_keys = Block(c, c.layer_pattern[0]), jax.random.split(blocks_key, c.num_layers)
        normal = jax.nn.initializers.normal(0.02, jnp.dtype(c.param_dtype))
        params = {
            "embed": {"table": normal(embed_key, (c.vocab_size, c.width))},
            "blocks": jax.vmap(lambda key: block.init(key, x, context)["params"])(layer_keys),
            "final_norm": self.final_norm.init(head_key, x)["params"],
        }
        if c.position_embedding == "learned":
            key = jax.random.fold_in(embed_key, 1)
            params["embed"]["positions"] = normal(key, (c.max_length, c.width))
        if not c.tie_embeddings:
            params["head"] = {"kernel": normal(head_key, (c.width, c.vocab_size))}
        return params

    def apply(
        self,
        params: Params,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: Cache | None = None,
        noise: Array | None = None,
        dropout_key: jax.Array | None = None,
        at: Array | None = None,
    ) -> Output:
        """Hidden states [B, T, D] of tokens [B, T]. See `Model.apply`."""
        attend_to_cache = cache is not None and positions is not None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        context = Context(positions, layer_angles(self.config, positions), segment_ids)
        x = self.embed(params, tokens)
        if self.config.position_embedding == "learned":
            x = x + self.embed_positions(params, positions, segment_ids)
        if noise is not None:
            x = x + noise.astype(self.compute_dtype)
        if cache is None:
            x, aux = self.run_split_blocks(params, x, context, dropout_key, at)
        else:
            x, cache, aux = self.run_blocks_with_cache(params, x, context, cache, attend_to_cache)
        hidden = cast(jax.Array, self.final_norm.apply({"params": params["final_norm"]}, x))
        return Output(hidden, cache, aux)

    def embed(self, params: Params, tokens: Array) -> jax.Array:
        """The rows [B, T, D] of the embedding table for tokens [B, T]."""
        # Gather whole rows: from a table split along D, XLA would have to reshard the result. Only these are
        # cast: the gradient of a cast table would add up in the compute dtype, where 256 + 1 = 256.
        table = constrain(params["embed"]["table"], P("tensor", None))
        x = table[tokens].astype(self.compute_dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.width**0.5, self.compute_dtype)
        return constrain(x, BATCH)

    def embed_positions(self, params: Params, positions: Array, segment_ids: Array | None) -> jax.Array:
        """The rows of the table of learned positions; those of a packed document begin with the first."""
        if segment_ids is not None:
            same = segment_ids[:, 1:] == segment_ids[:, :-1]
            first = jnp.where(jnp.pad(same, [(0, 0), (1, 0)]), 0, positions)
            positions = positions - jax.lax.cummax(first, axis=1)
        return params["embed"]["positions"][positions].astype(self.compute_dtype)

    def run_block(
        self,
        kind: str,
        layer: Params,
        x: jax.Array,
        context: Context,
        cache: LayerCache | None = None,
        attend_to_cache: bool = False,
        dropout_key: jax.Array | None = None,
        at: Array | None = None,
    ) -> BlockOutput:
        """One block with its parameters."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        block = Block(self.config, kind)
        output = block.apply({"params": layer}, x, context, cache, attend_to_cache, at, rngs=rngs)
        return cast(BlockOutput, output)

    def run_split_blocks(
        self,
        params: Params,
        x: jax.Array,
        context: Context,
        dropout_key: jax.Array | None,
        at: Array | None,
    ) -> tuple[jax.Array, Aux]:
        """`run_blocks`, with the tokens of each row split where the mesh says so."""
        if sequence.num_shards(x.shape[1]) == 1:
            return self.run_blocks(params, x, context, dropout_key, at)

        def run(
            blocks: Params, x: jax.Array, context: Context, key: jax.Array | None
        ) -> tuple[jax.Array, Aux]:
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(sequence.AXIS))
            x, aux = self.run_blocks({"blocks": blocks}, x, context, key)
            return x, jax.lax.psum(aux, sequence.AXIS)

        tokens = sequence.TOKENS
        run = sequence.split(run, (P(), tokens, jax.tree.map(lambda _: tokens, context), P()), (tokens, P()))
        x, aux = run(params["blocks"], x, context, dropout_key)
        return tokens_at(x, at), aux

    def run_blocks(
        self,
        params: Params,
        x: jax.Array,
        context: Context,
        dropout_key: jax.Array | None,
        at: Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """All blocks in order, scanned or unrolled; remat says what the backward pass recomputes.

        Unrolled, the last block computes only the tokens at `at`: with four layers a fifth of a reward model.
        """

        def run(
            kind: str, x: jax.Array, layer: Params, key: jax.Array | None, at: Array | None
        ) -> tuple[jax.Array, Aux]:
            output = self.run_block(kind, layer, x, context, dropout_key=key, at=at)
            return output.hidden, output.aux

        if self.config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.config.remat], static_argnums=0)

        def run_layers(
            x: jax.Array,
            kinds: Sequence[str],
            layers: Sequence[Params],
            keys: Sequence[jax.Array | None],
            *,
            at: Array | None = None,
        ) -> tuple[jax.Array, Aux]:
            aux: Aux = {}
            for i, (kind, layer, key) in enumerate(zip(kinds, layers, keys, strict=True), 1):
                x, layer_aux = run(kind, x, layer, key, at if i == len(kinds) else None)
                aux = add_aux(aux, layer_aux)
            return x, aux

        kinds, pattern = layer_kinds(self.config), self.config.layer_pattern
        keys = None if dropout_key is None else jax.random.split(dropout_key, len(kinds))
        if not self.config.scan_layers or isinstance(params["blocks"], tuple):
            layer_keys = [None] * len(kinds) if keys is None else list(keys)
            return run_layers(x, kinds, unstack_layers(params)["blocks"], layer_keys, at=at)
        blocks = (params["blocks"], keys)

        def run_pattern(x: jax.Array, layers: Any) -> tuple[jax.Array, Aux]:
            each = [layer_of(layers, i) for i in range(len(pattern))]
            return run_layers(x, pattern, *zip(*each, strict=True))

        repeats = len(kinds) // len(pattern)
        whole = repeats * len(pattern)
        patterns = jax.tree.map(lambda p: p[:whole].reshape(repeats, len(pattern), *p.shape[1:]), blocks)
        x, aux = jax.lax.scan(run_pattern, x, patterns)
        aux = jax.tree.map(lambda per_repeat: per_repeat.sum(axis=0), aux)
        rest = [layer_of(blocks, i) for i in range(whole, len(kinds))]  # of a pattern cut short
        if rest:
            x, rest_aux = run_layers(x, kinds[whole:], *zip(*rest, strict=True))
            aux = add_aux(aux, rest_aux)
        return tokens_at(x, at), aux

    def run_blocks_with_cache(
        self, params: Params, x: jax.Array, context: Context, cache: Cache, attend_to_cache: bool
    ) -> tuple[jax.Array, Cache, Aux]:
        """All blocks in order, each with its layer of the cache; unrolled and without remat."""
        updated: list[Any] = []
        aux: Aux = {}
        layers = unstack_layers(params)["blocks"]
        for kind, layer, layer_cache in zip(layer_kinds(self.config), layers, cache, strict=True):
            x, layer_cache, layer_aux = self.run_block(kind, layer, x, context, layer_cache, attend_to_cache)
            updated.append(layer_cache)
            aux = add_aux(aux, layer_aux)
        return x, tuple(updated), aux

    def head(self, params: Params) -> jax.Array:
        """The output matrix [D, V] in the compute dtype."""
        tied = self.config.tie_embeddings
        return (params["embed"]["table"].T if tied else params["head"]["kernel"]).astype(self.compute_dtype)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D], softcapped."""
        z = jnp.matmul(hidden, self.head(params), preferred_element_type=jnp.float32)
        softcap = self.config.logit_softcap
        return z if softcap is None else softcap * jnp.tanh(z / softcap)

    def logits(self, params: Params, tokens: Array, **kwargs: Any) -> jax.Array:
        """Float32 logits [B, T, V]; kwargs as for `apply`."""
        return self.unembed(params, self.apply(params, tokens, **kwargs).hidden)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
        """Zeros, one `LayerCache` per layer."""
        c = self.config
        shape = (batch, c.num_kv_heads, length, c.head_dim)
        dtype = self.compute_dtype if dtype is None else dtype
        return tuple(
            LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(c.num_layers)
        )


@functools.cache  # so that a function compiled for a config serves every checkpoint of it
def build_model(config: ModelConfig) -> Model:
    """The model of this config; ConfigError, naming the field, where the config is invalid."""
    return Transformer(config)
