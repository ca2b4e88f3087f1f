"""Sums and weights: a loss is a numerator and a denominator that stay apart until the last division.

Averages of averages change with the number of micro-batches and devices; sums of sums do not. So every
loss returns a `Weighted`, callers add them up, and `.mean` divides once.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

MODES = ("token_mean", "sequence_mean", "sequence_sum", "constant")


class Weighted(NamedTuple):
    """A sum and the weight to divide it by, float32 scalars that merge exactly.

    `a + b` and `sum([a, b, ...])` add sums and weights, over micro-batches; `jax.lax.psum` of a Weighted
    does the same over devices.

    >>> import jax.numpy as jnp
    >>> short = Weighted(sum=jnp.float32(2.0), weight=jnp.float32(1.0))
    >>> long = Weighted(sum=jnp.float32(3.0), weight=jnp.float32(3.0))
    >>> float((short + long).mean), float(sum([short, long]).mean)
    (1.25, 1.25)
    """

    sum: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """sum / weight; 0, with zero gradient, where the weight is 0.

        >>> import jax.numpy as jnp
        >>> float(Weighted(jnp.float32(0.0), jnp.float32(0.0)).mean)
        0.0
        """
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.sum / jnp.where(empty, 1.0, self.weight))

    def __add__(self, other: "Weighted | int") -> "Weighted":
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    __radd__ = __add__


def aggregate(values: jax.Array, mask: jax.Array, mode: str, *, max_length: int | None = None) -> Weighted:
    """Reduce per-token values to a sum and a weight. The weight decides who counts equally.

    With m the mask, s_b = sum_t m v and n_b = sum_t m of sequence b:

    - `"token_mean"`: sum_b s_b / sum_b n_b. Every token counts equally (DAPO, Yu et al. 2025).
    - `"sequence_mean"`: sum of s_b / n_b over sequences with n_b > 0, by their number. Every sequence counts
      equally, so tokens of long ones count less (GRPO, Shao et al. 2024).
    - `"sequence_sum"`: sum of s_b over sequences with n_b > 0, by their number (REINFORCE on whole answers).
    - `"constant"`: sum_b s_b / (B max_length), B counting every row. No dependence on length at all
      (Dr. GRPO, Liu et al. 2025).

    Masked values are replaced before anything is summed: NaN or Inf there changes neither value nor gradient.
    TRL's sequence_mean divides by all sequences, empty ones included; this one by those with a token.

    Args:
      values: [B, T].
      mask: [B, T], bool or number; non-zero counts.
      mode: one of the four above.
      max_length: tokens, used by `"constant"` only: the longest a sequence may be.

    Raises:
      ValueError: an unknown mode, or `"constant"` without max_length.

    >>> import jax.numpy as jnp
    >>> values = jnp.array([[1.0, 2.0, 3.0], [10.0, jnp.nan, jnp.nan]])
    >>> mask = jnp.array([[1, 1, 1], [1, 0, 0]])
    >>> [float(aggregate(values, mask, mode, max_length=4).mean) for mode in MODES]
    [4.0, 6.0, 8.0, 2.0]
    """
    chex.assert_rank([values, mask], 2)
    chex.assert_equal_shape([values, mask])
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode == "constant" and max_length is None:
        raise ValueError('mode="constant" divides by B * max_length: give max_length (tokens)')
    sums, counts = zero_masked(values, mask).sum(axis=1), count(mask, axis=1)
    sequences = count(counts)
    match mode:
        case "token_mean":
            return weigh(values, mask)
        case "sequence_mean":
            return Weighted((sums / jnp.maximum(counts, 1)).sum(), sequences)
        case "sequence_sum":
            return Weighted(sums.sum(), sequences)
        case "constant":
            return Weighted(sums.sum(), jnp.float32(len(values) * max_length))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the x that the mask counts, a float32 scalar; 0 where it counts nothing. Any shape.

    >>> import jax.numpy as jnp
    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([True, True, False])))
    2.0
    """
    chex.assert_equal_shape([x, mask])
    number = jnp.maximum(count(mask), 1)
    mean = zero_masked(x, mask).sum() / number
    # The rounding of a mean of large numbers would pass for variance: a second pass takes it off.
    return mean + zero_masked(x - mean, mask).sum() / number


def masked_variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The unbiased variance (n - 1) of the x that the mask counts, a float32 scalar; 0 for fewer than two.

    >>> import jax.numpy as jnp
    >>> float(masked_variance(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([True, True, False])))
    2.0
    """
    mean = masked_mean(x, mask)
    return (zero_masked(x - mean, mask) ** 2).sum() / jnp.maximum(count(mask) - 1, 1)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """(x - mean) * rsqrt(variance + epsilon), with the mean added back unless shift_mean; 0 where masked.

    Mean and variance (n - 1) are over all the mask counts. Epsilon is inside the root, as in TRL's PPO;
    where it is added to the standard deviation instead, values differ by about epsilon.

    Args:
      x: any shape.
      mask: the same shape, bool or number; non-zero counts.
      shift_mean: False scales the deviations only and keeps the mean.
      epsilon: in units of x squared.

    >>> import jax.numpy as jnp
    >>> whiten(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0])).round(3).tolist()
    [-0.7070000171661377, 0.7070000171661377, 0.0]
    """
    mean, variance = masked_mean(x, mask), masked_variance(x, mask)
    whitened = (zero_masked(x, mask) - mean) * jax.lax.rsqrt(variance + epsilon)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


def weigh(values: jax.Array, mask: jax.Array) -> Weighted:
    """The sum of the values the mask counts, and their number. Any shape: tokens, pairs or sequences.

    >>> import jax.numpy as jnp
    >>> float(weigh(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0])).mean)
    2.0
    """
    chex.assert_equal_shape([values, mask])
    return Weighted(zero_masked(values, mask).sum(), count(mask))


def zero_masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x in float32, with zeros where masked: what every loss does before its arithmetic.

    Multiplying by the mask would keep a NaN; `where` drops it, and from the gradient too.

    >>> import jax.numpy as jnp
    >>> zero_masked(jnp.array([1, 2]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    return jnp.where(jnp.asarray(mask) != 0, x, 0).astype(jnp.float32)


def count(mask: jax.Array, axis: int | None = None) -> jax.Array:
    """How many elements a mask counts, as float32.

    >>> import jax.numpy as jnp
    >>> float(count(jnp.array([True, False, True])))
    2.0
    """
    return (jnp.asarray(mask) != 0).astype(jnp.float32).sum(axis)
