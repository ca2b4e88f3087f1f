"""One function for the log-probs of a text: of the policy, the old policy and the reference alike."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.length_groups import by_length, cut, widths
from jaxllm.losses import Weighted, linear_token_log_probs
from jaxllm.models import Model, Params
from jaxllm.parallel.global_arrays import place, to_host
from jaxllm.parallel.sequence import by_token, num_shards
from jaxllm.parallel.sharding import batch_sharding, width_multiple


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
    counted: tuple[jax.Array, int] | None = None,
    entropy_gradient: bool = False,
    dropout_key: jax.Array | None = None,
) -> TokenScores:
    """Scores of tokens[B, T]. The last position is about nothing (it gets the first token, to be masked).

    Args:
      temperature: divides the logits, as the sampler's does.
      counted: a mask [B, T], and how many positions of a row it has at most: the output head is applied to no
        others than so many of each row, and scores are of no use where masked. None: to all.
      entropy_gradient: as in `linear_token_log_probs`.
      dropout_key: as in `Model.apply`.
    """
    output = model.apply(params, tokens, dropout_key=dropout_key)
    score = functools.partial(
        linear_token_log_probs,
        temperature=temperature,
        softcap=model.config.logit_softcap,
        entropy_gradient=entropy_gradient,
    )
    hidden, head, targets = output.hidden, model.head(params), jnp.roll(tokens, -1, axis=1)
    if counted is None or counted[1] >= tokens.shape[1] or num_shards(tokens.shape[1]) > 1:
        log_probs, entropy = by_token(score, sums=False)(hidden, head, targets)
    else:
        mask, count = counted
        positions = jnp.argsort(mask == 0, axis=1, stable=True)[:, :count]
        log_probs, entropy = score(pick(hidden, positions), head, pick(targets, positions))
        log_probs, entropy = (put(jnp.zeros(mask.shape), positions, x) for x in (log_probs, entropy))
    return TokenScores(log_probs, entropy, output.aux)


# By row, so that on a mesh each device finds the positions of its own rows.
UNIQUE = {"unique_indices": True, "mode": "promise_in_bounds"}
pick = jax.vmap(lambda row, positions: row.at[positions].get(**UNIQUE))
put = jax.vmap(lambda row, positions, values: row.at[positions].set(values, **UNIQUE))


class InBatches:
    """A function of parameters and any number of texts of up to `length` tokens, applied to `rows` of them at
    a time, or to a few more where the mesh does not divide these, by length. It compiles once for each width
    in use."""

    def __init__(self, function: Callable[..., jax.Array], rows: int, length: int, mesh: Mesh):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.function, self.sharding = jax.jit(function), batch_sharding(mesh)
        self.rows, self.widths = -(-rows // shards) * shards, widths(length, width_multiple(mesh))

    def __call__(self, params: Params, lengths: np.ndarray, *columns: np.ndarray) -> np.ndarray:
        """function(params, *columns) of columns [N, T] or [N], on the host: [N], or [N, T] with 0 beyond the
        width of a row. What it gives about the first lengths[N] positions must not depend on the others.

        Of several processes, all have whole columns, and get the whole result.
        """
        T, groups, results = self.widths[-1], [], []
        for rows, width in by_length(lengths, self.rows, self.widths):
            filled = np.resize(rows, self.rows)
            batch = place([cut(column[filled], T, width) for column in columns], self.sharding)
            groups.append(rows)
            results.append(self.function(params, *batch))
        parts = to_host(results)
        whole = np.zeros((len(lengths), *((T,) if parts[0].ndim > 1 else ())), parts[0].dtype)
        for rows, part in zip(groups, parts, strict=True):
            at = (rows, slice(part.shape[1])) if part.ndim > 1 else rows
            whole[at] = part[: len(rows)]
        return whole

    def trace(self, params: Params, *columns: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        """The function for one batch of columns [N, ...], to be compiled for the devices of the mesh."""
        shapes = [(self.rows, *column.shape[1:]) for column in columns]
        batch = [
            jax.ShapeDtypeStruct(shape, column.dtype, sharding=self.sharding)
            for shape, column in zip(shapes, columns, strict=True)
        ]
        return self.function.trace(params, *batch)


def log_probs_in_batches(
    model: Model, temperature: float, rows: int, length: int, mesh: Mesh, max_counted: int | None = None
) -> InBatches:
    """(params, lengths [N], tokens [N, T], mask [N, T]) -> log-probs [N, T] of `next_token_log_probs`, on the
    host. The mask has at most `max_counted` positions a row; None: there is none."""

    def score(params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        counted = None if mask is None or max_counted is None else (mask, max_counted)
        scores = next_token_log_probs(params, tokens, model=model, temperature=temperature, counted=counted)
        return scores.log_probs

    return InBatches(score, rows, length, mesh)
