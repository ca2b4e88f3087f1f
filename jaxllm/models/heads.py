"""A number for every position instead of logits: the reward model, and PPO's critic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import Params, build_model


class ScalarModel(NamedTuple):
    """A decoder with a scalar head. See `build_scalar_model` for the functions."""

    config: ModelConfig
    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    rewards: Callable[[Params, jax.Array, jax.Array], jax.Array]


def build_scalar_model(config: ModelConfig) -> ScalarModel:
    """The functions of a decoder that values what it reads; its head has no bias and begins at zero.

    init(key) -> the parameters of the decoder, without its vocabulary head, and `scalar_head`.
    apply(params, tokens[B, T], *, positions=None, segment_ids=None) -> float32 values [B, T], each of what
        has been read up to there.
    rewards(params, tokens[..., T], lengths[...]) -> float32 rewards [...]: the value at the last real token,
        found by length, so that neither padding nor an end-of-text token inside changes it.
    """
    model = build_model(config)

    def init(key: jax.Array) -> Params:
        params = model.init(key)
        params.pop("head", None)
        # Noise would have to be unlearnt first; at zero all rewards are equal and the loss is log 2.
        head = {"kernel": jnp.zeros((config.width, 1), jnp.dtype(config.param_dtype))}
        return {**params, "scalar_head": head}

    def apply(params: Params, tokens: jax.Array, **kwargs: Any) -> jax.Array:
        hidden, _ = model.apply(params, tokens, **kwargs)
        return jnp.matmul(hidden, params["scalar_head"]["kernel"], preferred_element_type=jnp.float32)[..., 0]

    def rewards(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        values = apply(params, tokens.reshape(-1, tokens.shape[-1]))
        last = lengths.reshape(-1, 1) - 1
        return jnp.take_along_axis(values, last, axis=1).reshape(lengths.shape)

    return ScalarModel(config, init, apply, rewards)
