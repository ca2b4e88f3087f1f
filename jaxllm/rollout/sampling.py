"""How the next token is drawn from a row of logits.

Shapes: B rows, V vocabulary. The order is Hugging Face's: temperature, top-k, top-p on what top-k left,
min-p. (vLLM applies min-p before the other two.) Tokens tied with the last one kept are kept too, so
that no filter depends on the order of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.losses.language_model import token_log_probs


@dataclass(frozen=True)
class SamplingConfig:
    """None switches a filter off."""

    temperature: float  # divides the logits; 0 takes the likeliest token
    top_k: int | None  # only the k likeliest tokens
    top_p: float | None  # only the likeliest tokens that together hold this probability
    min_p: float | None  # only tokens at least this fraction as likely as the likeliest
    max_new_tokens: int  # the longest completion, its stop token included

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0, "must be 0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "must be at least 1, or None for no limit"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "must be in (0, 1], or None for no limit"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "must be in [0, 1], or None for no limit"),
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
        }
        for field, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"sampling.{field}={getattr(self, field)} {rule}")


def drop_smallest(logits: jax.Array, weights: jax.Array, allowance: float) -> jax.Array:
    """-inf for the smallest logits of each row, as many as weigh no more than `allowance` together.

    The threshold is found bit by bit, from the highest: 32 sums over the row, where sorting it takes 30
    times as long on a CPU (64 rows of 4096).
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ranks = jnp.where(bits < sign, bits | sign, ~bits)  # unsigned integers in the order of the floats

    def set_bit(i, threshold):
        raised = threshold | (sign >> i)
        dropped = jnp.sum(jnp.where(ranks < raised, weights, 0), axis=-1, keepdims=True)
        return jnp.where(dropped <= allowance, raised, threshold)

    likeliest = jnp.max(ranks, axis=-1, keepdims=True)
    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(likeliest))
    return jnp.where(ranks >= jnp.minimum(threshold, likeliest), logits, -jnp.inf)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keep the k largest logits of each row of [B, V]."""
    return drop_smallest(logits, jnp.int32(1), logits.shape[-1] - k)


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep the nucleus of each row of [B, V]: the fewest likeliest tokens whose probabilities sum to p or
    more, the one that crosses p included (Holtzman et al. 2019, arXiv:1904.09751)."""
    return drop_smallest(logits, jax.nn.softmax(logits, axis=-1), 1 - p)


def min_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep the tokens at least p times as likely as the likeliest of their row of [B, V] (Nguyen et al.
    2024, arXiv:2407.01082)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= least, logits, -jnp.inf)


def sample(logits: jax.Array, keys: jax.Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """A token for each row of logits [B, V] with its own key of keys [B], and its log-prob.

    The log-prob is log_softmax(logits / temperature) in float32, BEFORE any filter: what training under
    this temperature computes, and 0 KL to itself. Greedy tokens are given theirs at temperature 1.
    """
    if config.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        kept = logits.astype(jnp.float32) / config.temperature
        if config.top_k is not None:
            kept = top_k(kept, config.top_k)
        if config.top_p is not None:
            kept = top_p(kept, config.top_p)
        if config.min_p is not None:
            kept = min_p(kept, config.min_p)
        tokens = jax.vmap(jax.random.categorical)(keys, kept)
    temperature = 1.0 if config.temperature == 0 else config.temperature
    log_probs = token_log_probs(logits[:, None], tokens[:, None], temperature=temperature)
    return tokens.astype(jnp.int32), log_probs[:, 0]


class RowSampling(NamedTuple):
    """SamplingConfigs as arrays, one entry a row, so that rows which sample differently share a program."""

    temperature: np.ndarray  # float32 [B]
    top_k: np.ndarray  # int32 [B], at most the size of the vocabulary
    tail: np.ndarray  # float32 [B], 1 - top_p, which no float32 of top_p would give to the last bit
    min_p: np.ndarray  # float32 [B]


def row_sampling(configs: Sequence[SamplingConfig], vocab_size: int) -> RowSampling:
    """One entry for each config; a filter that is off gets the value at which it drops nothing."""
    return RowSampling(
        np.array([config.temperature for config in configs], np.float32),
        np.array([min(config.top_k or vocab_size, vocab_size) for config in configs], np.int32),
        np.array([0.0 if config.top_p is None else 1 - config.top_p for config in configs], np.float32),
        np.array([config.min_p or 0.0 for config in configs], np.float32),
    )


def sample_rows(logits: jax.Array, keys: jax.Array, rows: RowSampling) -> jax.Array:
    """The token that `sample` takes for each row, with that row's own sampling. A filter that no row wants
    costs nothing."""
    greedy = rows.temperature == 0
    temperature, k, tail, share = (x[:, None] for x in (jnp.where(greedy, 1.0, rows.temperature), *rows[1:]))
    kept = logits.astype(jnp.float32) / temperature
    V = logits.shape[-1]

    def filtered(wanted, keep, z):
        return jax.lax.cond(jnp.any(wanted), keep, lambda z: z, z)

    kept = filtered(k < V, lambda z: drop_smallest(z, jnp.int32(1), V - k), kept)
    kept = filtered(tail > 0, lambda z: drop_smallest(z, jax.nn.softmax(z, axis=-1), tail), kept)
    kept = filtered(share > 0, lambda z: min_p(z, share), kept)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
