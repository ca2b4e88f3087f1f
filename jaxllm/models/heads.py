"""A decoder with a scalar head instead of a vocabulary head: the reward model, and PPO's critic."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.models.config import ModelConfig, check_model_config
from jaxllm.models.interface import Array, Model, Output, Params, ScalarModel, ScalarOutput
from jaxllm.models.transformer import build_model


@dataclass(frozen=True)
class ScalarTransformer:
    """A `ScalarModel`: value = hidden state @ scalar_head, without a bias."""

    config: ModelConfig

    def __post_init__(self) -> None:
        check_model_config(self.config)
        for name in ("init", "apply", "rewards"):  # for jax.jit: see `Transformer`
            object.__setattr__(self, name, getattr(self, name))

    @property
    def decoder(self) -> Model:
        """The model that computes the hidden states."""
        return build_model(self.config)

    def init(self, key: jax.Array) -> Params:
        """The decoder's parameters for this key, without its vocabulary head, and a head of zeros."""
        params = self.decoder.init(key)
        params.pop("head", None)
        # Training would first have to remove noise; with zeros all rewards are equal and the loss is log 2.
        # Beside frozen weights it is what trains, like the adapters.
        dtype = self.config.param_dtype if self.config.lora.rank is None else "float32"
        head = {"kernel": jnp.zeros((self.config.width, 1), jnp.dtype(dtype))}
        return {**params, "scalar_head": head}

    def apply(
        self,
        params: Params,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> ScalarOutput:
        """Float32 values [B, T]. See `ScalarModel.apply`."""
        output = self.decoder.apply(
            params, tokens, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key
        )
        return scalars(params, output)

    def rewards(
        self, params: Params, tokens: Array, lengths: Array, *, dropout_key: jax.Array | None = None
    ) -> ScalarOutput:
        """The float32 value at the last token of each text. See `ScalarModel.rewards`."""
        rows, last = tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1, 1) - 1
        values, aux = scalars(params, self.decoder.apply(params, rows, dropout_key=dropout_key, at=last))
        return ScalarOutput(values.reshape(lengths.shape), aux)


def scalars(params: Params, output: Output) -> ScalarOutput:
    """What the scalar head makes of hidden states [B, N, D]: values [B, N]."""
    kernel = params["scalar_head"]["kernel"]
    values = jnp.matmul(output.hidden, kernel, preferred_element_type=jnp.float32)[..., 0]
    return ScalarOutput(values, output.aux)


@functools.cache  # one model per config: see `build_model`
def build_scalar_model(config: ModelConfig) -> ScalarModel:
    """The scalar model of this config; ConfigError, naming the field, where the config is invalid."""
    return ScalarTransformer(config)
