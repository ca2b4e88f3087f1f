"""The interface of a model: the types that stages, rollouts and evaluation use, independent of flax.

Shapes: B sequences, T positions, S cache slots, D width, K key-value heads, h head width, V vocabulary.

Models are hashable and equal where their configs are, so they can be static arguments of `jax.jit`.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike

from jaxllm.losses import Weighted
from jaxllm.losses.aggregate import Array
from jaxllm.models.config import ModelConfig

Params = dict[str, Any]  # a nested dict of arrays; its "blocks" may be a tuple of them, one per layer
Aux = dict[str, Weighted]  # auxiliary losses by name, each with its coefficient included


class LayerCache(NamedTuple):
    """Keys and values of one layer, one slot per position."""

    keys_BKSh: jax.Array  # of all layouts, [B, K, S, h] is read fastest in a decode step
    values_BKSh: jax.Array


Cache = tuple[LayerCache, ...]  # one per layer


class Output(NamedTuple):
    """What `Model.apply` returns."""

    hidden: jax.Array  # [B, T, D], the states after the final norm, in the compute dtype
    cache: Cache | None  # the updated cache; None where none was given
    aux: Aux  # empty for a dense decoder; every stage adds these to its loss and logs them


@runtime_checkable
class Model(Protocol):
    """A causal language model: pure functions of a nested dict of arrays."""

    @property
    def config(self) -> ModelConfig: ...

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        ...

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
        """Hidden states of tokens; each token attends to itself and to earlier ones of its own segment.

        Args:
          params: from `init`, or the same with its layers unstacked.
          tokens: int [B, T].
          positions: int [B, T], for the rotary embedding; 0, 1, ..., T - 1 where not given.
          segment_ids: int [B, T], one number per packed document; one document per row where not given.
          cache: from `init_cache`. Without positions (prefill), it is filled from its first slot. With
            positions (decoding), which must be consecutive in each row, tokens are written to the slots
            positions[b] and attend to every slot up to their own. Prompts of different lengths are padded
            on the right; decoding overwrites the slots of the padding before it attends to them.
          noise: [B, T, D], added to the embedded tokens.
          dropout_key: the PRNG key of the adapters' dropout; None: no dropout.
          at: int [B, N], the tokens, by their index in the row, whose hidden states [B, N, D] are wanted;
            all where not given. Rows are then one document each, and there is no cache.
        """
        ...

    def head(self, params: Params) -> jax.Array:
        """The output matrix [D, V] in the compute dtype, as `linear_cross_entropy` takes it."""
        ...

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D], softcapped where the config says so."""
        ...

    def logits(self, params: Params, tokens: Array, **kwargs: Any) -> jax.Array:
        """Float32 logits [B, T, V] in one array, for small inputs; kwargs as for `apply`."""
        ...

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache of `length` slots, in the compute dtype or the one given."""
        ...


class ScalarOutput(NamedTuple):
    """What `ScalarModel.apply` and `ScalarModel.rewards` return."""

    values: jax.Array  # float32, [B, T] of `apply`, [...] of `rewards`
    aux: Aux  # as in `Output`


@runtime_checkable
class ScalarModel(Protocol):
    """A decoder with a scalar at every position instead of logits: a reward model, or PPO's critic."""

    @property
    def config(self) -> ModelConfig: ...

    def init(self, key: jax.Array) -> Params:
        """Random parameters of the decoder, without a vocabulary head, and a `scalar_head` of zeros."""
        ...

    def apply(
        self,
        params: Params,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> ScalarOutput:
        """Values [B, T] of tokens [B, T]: position t has the value of the text up to and including token t.

        positions, segment_ids and dropout_key: see `Model.apply`.
        """
        ...

    def rewards(
        self, params: Params, tokens: Array, lengths: Array, *, dropout_key: jax.Array | None = None
    ) -> ScalarOutput:
        """Rewards [...] of texts tokens [..., T] of lengths [...]: the value at each text's last token.

        The lengths locate that token, so neither padding nor an end-of-text token inside a text matters.
        """
        ...
