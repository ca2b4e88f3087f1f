"""One function for the log-probs of a text: of the policy, the old policy and the reference alike."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.losses import Weighted, linear_token_log_probs
from jaxllm.models import Model, Params
from jaxllm.parallel.global_arrays import place, to_host
from jaxllm.parallel.sequence import by_token
from jaxllm.parallel.sharding import batch_sharding


class TokenScores(NamedTuple):
    """What a model makes of a text; position t is about tokens[:, t + 1], as in every batch."""

    log_probs: jax.Array  # float32 [B, T], nats
    entropy: jax.Array  # float32 [B, T], nats
    aux: dict[str, Weighted]  # the model's auxiliary losses


def next_token_log_probs(
    params: Params,
    tokens: jax.Array,
    *,
    model: Model,
    temperature: float = 1.0,
    dropout_key: jax.Array | None = None,
) -> TokenScores:
    """Scores of tokens[B, T]. The last position is about nothing (it gets the first token, to be masked).

    The temperature divides the logits, as the sampler's does. dropout_key: as in `Model.apply`.
    """
    output = model.apply(params, tokens, dropout_key=dropout_key)
    scores = functools.partial(
        linear_token_log_probs, temperature=temperature, softcap=model.config.logit_softcap
    )
    targets = jnp.roll(tokens, -1, axis=1)
    log_probs, entropy = by_token(scores, sums=False)(output.hidden, model.head(params), targets)
    return TokenScores(log_probs, entropy, output.aux)


class InBatches:
    """A function of parameters and any number of rows, applied to `rows` rows at a time, or to a few more
    where the mesh does not divide these: it compiles once."""

    def __init__(self, function: Callable[..., jax.Array], rows: int, mesh: Mesh):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.function, self.sharding = jax.jit(function), batch_sharding(mesh)
        self.rows = -(-rows // shards) * shards

    def __call__(self, params: Params, *columns: np.ndarray) -> np.ndarray:
        """function(params, *columns) for columns [N, ...], on the host: [N, ...]. Of several processes, all
        have whole columns, and get the whole result."""
        number, parts = len(columns[0]), []
        for first in range(0, number, self.rows):
            rows = np.minimum(np.arange(first, first + self.rows), number - 1)  # the last row fills it up
            batch = place([column[rows] for column in columns], self.sharding)
            parts.append(self.function(params, *batch))
        return np.concatenate(to_host(parts))[:number]

    def trace(self, params: Params, *columns: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        """The function for one batch of columns [N, ...], to be compiled for the devices of the mesh."""
        shapes = [(self.rows, *column.shape[1:]) for column in columns]
        batch = [
            jax.ShapeDtypeStruct(shape, column.dtype, sharding=self.sharding)
            for shape, column in zip(shapes, columns, strict=True)
        ]
        return self.function.trace(params, *batch)


def log_probs_in_batches(model: Model, temperature: float, rows: int, mesh: Mesh) -> InBatches:
    """(params, tokens [N, T]) -> log-probs [N, T] of `next_token_log_probs`, on the host."""
    return InBatches(
        lambda params, tokens: (
            next_token_log_probs(params, tokens, model=model, temperature=temperature).log_probs
        ),
        rows,
        mesh,
    )
