"""Sums and weights: the numerator and denominator of a loss stay apart until the last division.

An average of averages depends on how the batch is split into micro-batches and over devices; a sum of sums
does not. So every loss returns a `Weighted`, callers add them up, and `.mean` divides once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # what losses take; they return jax.Array

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
        if not isinstance(other, Weighted):
            return self if other == 0 else NotImplemented  # sum() starts from 0
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    __radd__ = __add__


def aggregate(values: Array, mask: Array, mode: str, *, max_length: int | None = None) -> Weighted:
    """Reduce per-token values to a sum and a weight. The mode sets whether tokens or sequences count equally.

    With m the mask, s_b = sum_t m v and n_b = sum_t m of sequence b:

    - `"token_mean"`: sum_b s_b / sum_b n_b. Every token counts equally (DAPO, Yu et al. 2025).
    - `"sequence_mean"`: the sum of s_b / n_b over sequences with n_b > 0, divided by their number. Every
      sequence counts equally, so a token of a long one counts less (GRPO, Shao et al. 2024).
    - `"sequence_sum"`: the sum of s_b over sequences with n_b > 0, divided by their number (REINFORCE with a
      completion as the action).
    - `"constant"`: sum_b s_b / (B max_length), with B counting every row. The weight of a token does not
      depend on any length (Dr. GRPO, Liu et al. 2025).

    Masked values are replaced before anything is summed: NaN or Inf there changes neither value nor gradient.
    TRL's sequence_mean divides by the number of all sequences, empty ones included; this one by the number of
    sequences with n_b > 0.

    Args:
      values: [B, T].
      mask: [B, T], bool or number; non-zero counts.
      mode: one of the four above.
      max_length: the longest a sequence may be, in tokens; only `"constant"` uses it.

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
    sums, counts = zero_masked(values, mask).sum(axis=1), count(mask, axis=1)
    sequences = count(counts)
    match mode:
        case "token_mean":
            return masked_sum(values, mask)
        case "sequence_mean":
            return Weighted((sums / jnp.maximum(counts, 1)).sum(), sequences)
        case "sequence_sum":
            return Weighted(sums.sum(), sequences)
        case "constant" if max_length is not None:
            return Weighted(sums.sum(), jnp.float32(len(values) * max_length))
        case "constant":
            raise ValueError('mode="constant" divides by B * max_length; give max_length (tokens)')
        case _:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")


def row_weights(mask: Array, mode: str, *, max_length: int | None = None) -> Array:
    """What each row of a mask [B, T] adds to the weight that `aggregate` gives in this mode, [B].

    >>> import numpy as np
    >>> [float(x) for x in row_weights(np.array([[1, 1, 0], [0, 0, 0]]), "token_mean")]
    [2.0, 0.0]
    """
    match mode:
        case "token_mean":
            return (mask != 0).sum(1)
        case "sequence_mean" | "sequence_sum":
            return (mask != 0).any(1)
        case "constant" if max_length is not None:
            return 0 * mask[:, 0] + max_length
        case _:
            raise ValueError(f"mode={mode!r} is unknown, or needs max_length")


def add_auxiliary(
    loss: Weighted, metrics: dict[str, Weighted], aux: Mapping[str, Weighted]
) -> tuple[Weighted, dict[str, Weighted]]:
    """loss.mean + sum of the means of the auxiliary terms, as Weighted(loss.sum + sum aux.mean w, w).

    w = loss.weight stays as it is: the terms share the weight of the loss. A sum of micro-batches then has
    the mean that the whole batch has, provided that the weights of each term are proportional to those of the
    loss (equal in the simplest case). Terms come with their coefficients, for example the load-balancing loss
    of a mixture of experts (Fedus et al. 2021, arXiv:2101.03961) or a z-loss of its router.

    Args:
      loss: the main loss; scalars.
      metrics: its metrics by name. `metrics["loss"]` remains the main loss alone.
      aux: auxiliary losses by name, scalars with gradient; may be empty.

    Returns:
      The total loss, and metrics with each auxiliary term added under its name, without gradient. Without
      auxiliary terms, the arguments themselves.

    Raises:
      ValueError: a term has the name of a metric.

    >>> import jax.numpy as jnp
    >>> loss = Weighted(sum=jnp.float32(12.0), weight=jnp.float32(4.0))
    >>> balance = Weighted(sum=jnp.float32(1.0), weight=jnp.float32(2.0))
    >>> total, metrics = add_auxiliary(loss, {"loss": loss}, {"balance": balance})
    >>> float(total.mean), float(total.weight), sorted(metrics)  # 3.0 + 0.5
    (3.5, 4.0, ['balance', 'loss'])
    """
    if taken := sorted(aux.keys() & metrics.keys()):
        raise ValueError(f"aux has the name of a metric: {', '.join(taken)}; rename the auxiliary loss")
    if not aux:
        return loss, metrics
    total = loss.sum + sum(term.mean for term in aux.values()) * loss.weight
    return loss._replace(sum=total), metrics | jax.lax.stop_gradient(dict(aux))


def masked_mean(x: Array, mask: Array) -> jax.Array:
    """The mean of x where the mask is non-zero, a float32 scalar; 0 where it is zero everywhere. Any shape.

    >>> import jax.numpy as jnp
    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([True, True, False])))
    2.0
    """
    chex.assert_equal_shape([x, mask])
    number = jnp.maximum(count(mask), 1)
    mean = zero_masked(x, mask).sum() / number
    # A second pass removes the rounding error of the first, which would count as variance where x is large.
    return mean + zero_masked(x - mean, mask).sum() / number


def masked_variance(x: Array, mask: Array) -> jax.Array:
    """The unbiased variance (n - 1) of x where the mask is non-zero, a float32 scalar; 0 for fewer than two.

    >>> import jax.numpy as jnp
    >>> float(masked_variance(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([True, True, False])))
    2.0
    """
    mean = masked_mean(x, mask)
    return (zero_masked(x - mean, mask) ** 2).sum() / jnp.maximum(count(mask) - 1, 1)


def whiten(x: Array, mask: Array, *, shift_mean: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """(x - mean) * rsqrt(variance + epsilon), with the mean added back unless shift_mean; 0 where masked.

    Mean and variance (n - 1) are taken where the mask is non-zero. Epsilon is inside the root, as in TRL's
    PPO; trainers that add it to the standard deviation instead get values that differ by about epsilon.

    Args:
      x: any shape.
      mask: the same shape, bool or number; non-zero counts.
      shift_mean: False keeps the mean and scales only the deviations from it.
      epsilon: in units of x squared.

    >>> import jax.numpy as jnp
    >>> whiten(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0])).round(3).tolist()
    [-0.7070000171661377, 0.7070000171661377, 0.0]
    """
    mean, variance = masked_mean(x, mask), masked_variance(x, mask)
    whitened = (zero_masked(x, mask) - mean) * jax.lax.rsqrt(variance + epsilon)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


def masked_sum(values: Array, mask: Array) -> Weighted:
    """The sum of the values where the mask is non-zero, and their number. Any shape: tokens, pairs, rows.

    >>> import jax.numpy as jnp
    >>> float(masked_sum(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0])).mean)
    2.0
    """
    chex.assert_equal_shape([values, mask])
    return Weighted(zero_masked(values, mask).sum(), count(mask))


def zero_masked(x: Array, mask: Array) -> jax.Array:
    """x in float32, with zeros where masked. Every loss does this before its arithmetic.

    Multiplying by the mask would keep a NaN; `where` removes it, from the gradient too.

    >>> import jax.numpy as jnp
    >>> zero_masked(jnp.array([1, 2]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    return jnp.where(jnp.asarray(mask) != 0, x, 0).astype(jnp.float32)


def count(mask: Array, axis: int | None = None) -> jax.Array:
    """The number of non-zero elements of a mask, as float32.

    >>> import jax.numpy as jnp
    >>> float(count(jnp.array([True, False, True])))
    2.0
    """
    return (jnp.asarray(mask) != 0).astype(jnp.float32).sum(axis)
