"""How the next token is sampled from a row of logits.

Shapes: B rows, V vocabulary. The order is that of Hugging Face: temperature, top-k, top-p of the remaining
tokens, min-p. (vLLM applies min-p before the other two.) Tokens tied with the last one kept are kept too, so
that no filter depends on the order of the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxllm.errors import ConfigError
from jaxllm.losses.language_model import token_log_probs

# A lower temperature is greedy: float32 logits divided by it may overflow, and differences between the most
# likely tokens are far beyond the noise that is added to sample. vLLM has the same threshold.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample completions; None disables a filter."""

    temperature: float  # divides the logits; 0, or below GREEDY_BELOW: greedy
    top_k: int | None  # sample from the k most likely tokens only
    top_p: float | None  # from the most likely tokens whose probabilities sum to top_p only
    min_p: float | None  # from tokens with at least min_p times the probability of the most likely one only
    max_new_tokens: int  # maximum length of a completion, with its stop token

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "must be 0 (greedy) or more, and finite"),
            "top_k": (self.top_k is None or self.top_k >= 1, "must be at least 1, or none for no limit"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "must be in (0, 1], or none for no limit"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "must be in [0, 1], or none for no limit"),
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
        }
        for field, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"sampling.{field}={getattr(self, field)} {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without sampling."""
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> dict[str, float]:
        """The filters that are on, by name. With one, some tokens are never sampled and the others more often
        than the model's probability: log-probs of the model then give no KL and no importance weight."""
        fields = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        off = {"top_p": 1.0, "min_p": 0.0}
        return {name: x for name, x in fields.items() if x is not None and x != off.get(name)}


def drop_smallest(logits: jax.Array, weights: jax.Array, max_weight: ArrayLike) -> jax.Array:
    """-inf for the smallest logits of each row [B, V]: as many as have a total weight of at most max_weight.

    The threshold is found bit by bit, from the highest: 32 sums over the row, where sorting the row takes 30
    times as long on a CPU (64 rows of 4096).
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ranks = jnp.where(bits < sign, bits | sign, ~bits)  # unsigned integers in the order of the floats

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        raised = threshold | (sign >> i)
        dropped = jnp.sum(jnp.where(ranks < raised, weights, 0), axis=-1, keepdims=True)
        return jnp.where(dropped <= max_weight, raised, threshold)

    largest = jnp.max(ranks, axis=-1, keepdims=True)
    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(largest))
    return jnp.where(ranks >= jnp.minimum(threshold, largest), logits, -jnp.inf)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keep the k largest logits of each row of [B, V]."""
    return drop_smallest(logits, jnp.int32(1), logits.shape[-1] - k)


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep the nucleus of each row of [B, V]: the fewest most likely tokens whose probabilities sum to p or
    more (Holtzman et al. 2019, arXiv:1904.09751)."""
    return drop_smallest(logits, jax.nn.softmax(logits, axis=-1), 1 - p)


def min_p(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """Keep the tokens at least p times as likely as the most likely one of their row of [B, V] (Nguyen et al.
    2024, arXiv:2407.01082)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= least, logits, -jnp.inf)


def within_vocabulary(logits: jax.Array, vocab_size: int | None) -> jax.Array:
    """-inf for the logits [B, V] of rows that pad an embedding beyond the vocab_size tokens of the tokenizer.

    None: there are none. Only what is drawn depends on it, never a log-prob: see docs/algorithms.md.
    """
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def relative_probabilities(logits: jax.Array) -> jax.Array:
    """softmax(logits) over the last axis, before the division by its sum: the largest is 1."""
    return jnp.exp(logits - logits.max(-1, keepdims=True))


BLOCK = 128  # tokens whose probabilities are summed before the sums are


def draw(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """A token for each row of weights [B, V] (at least 0, not all 0), with this probability before the sum.

    By the inverse of the cumulative distribution: first a block of tokens, then a token of it, with a uniform
    number each, so that only short rows are accumulated. Gumbel noise would need a number for every logit,
    which takes longer than all else. A token of weight 0 is never drawn.
    """
    B, V = weights.shape
    blocks = jnp.pad(weights, [(0, 0), (0, -V % BLOCK)]).reshape(B, -1, BLOCK)
    first, second = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    block = invert(blocks.sum(-1), first)
    within = invert(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], second)
    return jnp.minimum(block * BLOCK + within, V - 1)  # where weights are NaN


def invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first entry of each row [B, N] at which the cumulative weight exceeds a fraction [B] of all."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # Sums round: they may step over an entry of weight 0, and none may exceed the target.
    found = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(found.any(-1), jnp.argmax(found, axis=-1), last)


def sample(
    logits: jax.Array, keys: jax.Array, config: SamplingConfig, vocab_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """A token for each row of logits [B, V] with its own key of keys [B], and its log-prob.

    The log-prob is log_softmax(logits / temperature) in float32, BEFORE any filter, as training at this
    temperature computes it: the KL of a policy to itself is 0. Greedy tokens have their log-prob at
    temperature 1. `vocab_size` is as in `within_vocabulary`.
    """
    drawn = within_vocabulary(logits, vocab_size)
    if config.greedy:
        tokens = jnp.argmax(drawn, axis=-1)
    else:
        kept = drawn.astype(jnp.float32) / config.temperature
        if config.top_k is not None:
            kept = top_k(kept, config.top_k)
        if config.top_p is not None:
            kept = top_p(kept, config.top_p)
        if config.min_p is not None:
            kept = min_p(kept, config.min_p)
        tokens = draw(relative_probabilities(kept), keys)
    temperature = 1.0 if config.greedy else config.temperature
    log_probs = token_log_probs(logits[:, None], tokens[:, None], temperature=temperature)
    return tokens.astype(jnp.int32), log_probs[:, 0]


class RowSampling(NamedTuple):
    """SamplingConfigs as arrays with an entry a row: one program serves rows that sample differently."""

    temperature: np.ndarray  # float32 [B]; 0 where greedy
    top_k: np.ndarray  # int32 [B], at most the size of the vocabulary
    tail: np.ndarray  # float32 [B], 1 - top_p, rounded after the subtraction as in `top_p`
    min_p: np.ndarray  # float32 [B]


def row_sampling(configs: Sequence[SamplingConfig], vocab_size: int) -> RowSampling:
    """One entry for each config; a disabled filter gets the value at which it drops nothing."""
    return RowSampling(
        np.array([0.0 if config.greedy else config.temperature for config in configs], np.float32),
        np.array([min(config.top_k or vocab_size, vocab_size) for config in configs], np.int32),
        np.array([0.0 if config.top_p is None else 1 - config.top_p for config in configs], np.float32),
        np.array([config.min_p or 0.0 for config in configs], np.float32),
    )


def sample_rows(
    logits: jax.Array, keys: jax.Array, rows: RowSampling, vocab_size: int | None = None
) -> jax.Array:
    """The token that `sample` takes for each row, with the sampling of that row. Filters that no row uses are
    skipped."""
    logits = within_vocabulary(logits, vocab_size)
    greedy = rows.temperature == 0
    temperature, k, tail, share = (x[:, None] for x in (jnp.where(greedy, 1.0, rows.temperature), *rows[1:]))
    kept = logits.astype(jnp.float32) / temperature
    V = logits.shape[-1]

    def where_used(used: ArrayLike, keep: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(used), keep, lambda z: z, z)

    kept = where_used(k < V, lambda z: drop_smallest(z, jnp.int32(1), V - k), kept)
    kept = where_used(tail > 0, lambda z: drop_smallest(z, jax.nn.softmax(z, axis=-1), tail), kept)
    kept = where_used(share > 0, lambda z: min_p(z, share), kept)
    drawn = draw(relative_probabilities(kept), keys)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
