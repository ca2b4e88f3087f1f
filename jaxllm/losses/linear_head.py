"""Log-probs, entropy and cross-entropy straight from hidden states: the output head, applied blockwise.

The head is applied to a slice of the vocabulary at a time, and each slice's logits are computed again in the
backward pass, so that no [B, T, V] array ever exists unless it is small: at V = 150,000 it would be the
largest of the whole train step. Every stage trains and scores through these functions.

Why slices of V and not of T: each column of the head's gradient is then finished in one product over all
tokens, so no array of the head's size is accumulated in float32 or, on a mesh, reduced more than once.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Weighted
from jaxllm.losses.language_model import LogitStatistics, cross_entropy_of, log_probs_of, logit_statistics

# Where block_size is None, one slice of float32 logits takes at most SLICE_BYTES, unless it would then have
# fewer columns than SLICE_WIDTH: matrix products need that many to be efficient, and the hidden states are
# then as large as the slice.
SLICE_BYTES = 512 * 2**20
SLICE_WIDTH = 1024


def linear_token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = True,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` and `token_entropy` of `hidden @ head`, without its [B, T, V] logits.

    logits = hidden @ head, then softcap * tanh(logits / softcap) if given (Gemma 2, 2024), then divided by
    the temperature. Values and gradients equal those of the dense form. Products accumulate in float32, and
    so does the head's gradient. Temporaries are O(B block_size V + D V), forward and backward.

    Args:
      hidden: [B, T, D], the states that the output head is applied to.
      head: [D, V].
      targets: [B, T], integers. One outside [0, V) gives -inf, which the caller has to mask.
      temperature: divides the logits, as in sampling.
      softcap: None is no cap.
      entropy_gradient: False makes the entropy a constant, which the backward pass need not read.
      block_size: number of positions of T whose logits may exist at once. None chooses: all positions where
        their logits are small, which is fastest, else 512 MiB of logits. The slices are cut from V, which
        gives T / block_size of them, so B and T may be sharded and need not be divisible by anything.

    Returns:
      (log_probs, entropy), float32 [B, T], in nats, both differentiable (the entropy with entropy_gradient).

    Raises:
      ValueError: block_size below 1, a head that does not have the D of hidden.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((1, 1, 4)), jnp.zeros((4, 8))
    >>> log_probs, entropy = linear_token_log_probs(hidden, head, jnp.array([[3]]))
    >>> float(jnp.exp(-log_probs[0, 0]).round(4)), float(jnp.exp(entropy[0, 0]).round(4))
    (8.0, 8.0)
    """
    chex.assert_rank([hidden, head, targets], [3, 2, 2])
    width = _slice_width(targets, head, block_size)
    options = _Options(temperature, softcap, width, entropy=True, entropy_gradient=entropy_gradient)
    statistics = _linear_statistics(hidden, head, targets, options)
    assert statistics.entropy is not None
    return log_probs_of(statistics, options.divisor), statistics.entropy


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    block_size: int | None = None,
) -> tuple[Weighted, dict[str, Weighted]]:
    """`cross_entropy` of `hidden @ head`, without its [B, T, V] logits.

    Formula and metrics are those of `cross_entropy`.

    Args:
      hidden, head, softcap, block_size: see `linear_token_log_probs`; hidden may have any value where masked.
      targets, mask, label_smoothing, z_loss: see `cross_entropy`.

    Raises:
      ValueError: as `cross_entropy` and `linear_token_log_probs`.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
    >>> targets, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3))
    >>> loss, metrics = linear_cross_entropy(hidden, head, targets, mask, block_size=2)
    >>> float(jnp.exp(loss.mean).round(4)), float(loss.weight)
    (8.0, 6.0)
    """
    chex.assert_rank([hidden, head, targets, mask], [3, 2, 2, 2])
    hidden, targets = jnp.where(mask[..., None] != 0, hidden, 0), jnp.where(mask != 0, targets, 0)
    options = _Options(1.0, softcap, _slice_width(targets, head, block_size), entropy=False)
    statistics = _linear_statistics(hidden, head, targets, options)
    return cross_entropy_of(statistics, mask, label_smoothing, z_loss, temperature=options.divisor)


class _Options(NamedTuple):
    """How logits are computed from hidden states and head; static under jit."""

    temperature: float
    softcap: float | None
    width: int  # columns of V whose logits exist at once
    entropy: bool
    entropy_gradient: bool = False

    @property
    def divisor(self) -> float:
        """What divides z, the output of `_logits`.

        z leaves out the factor softcap: with it inside, XLA may fuse softcap * tanh - top into one
        multiply-add, in which the highest logit is rounded and the others are not.
        """
        return self.temperature if self.softcap is None else self.temperature / self.softcap


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass."""

    hidden: jax.Array  # [B, T, D]
    head: jax.Array  # [D, V]
    targets: jax.Array  # [B, T]
    logits: jax.Array | None  # [B, T, V] where V is one slice; None where they are computed again
    top: jax.Array  # [B, T], and so the next two: see `LogitStatistics`
    log_sum: jax.Array
    entropy: jax.Array | None  # None without gradient


def _slice_width(targets: jax.Array, head: jax.Array, block_size: int | None) -> int:
    """The number of columns of V in a slice: as many logits at all positions as V has at block_size of them.

    It is all of V, or else a multiple of 8, which the sizes of mesh axes usually divide.
    """
    (batch, length), vocab_size = targets.shape, head.shape[1]
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 position, or None to choose")
    if block_size is None:
        slices = -(-4 * batch * length * vocab_size // SLICE_BYTES)
        slices = min(1 << (slices - 1).bit_length(), vocab_size // SLICE_WIDTH)  # powers of 2 divide most V
    else:
        slices = -(-length // block_size)
    return vocab_size if slices <= 1 else min(vocab_size, max(8, vocab_size // slices // 8 * 8))


def _linear_statistics(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, options: _Options
) -> LogitStatistics:
    if hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"head must be [D, V] with the D of hidden, {hidden.shape[-1]}; got {head.shape}")
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    hidden, head = hidden.astype(dtype), head.astype(dtype)
    # Under shard_map both must vary over the same mesh axes, so that a replicated head's gradient is summed.
    hidden, head = hidden + _varying_zero(head), head + _varying_zero(hidden)
    return _sliced_statistics(hidden, head, targets, options)


def _varying_zero(x: jax.Array) -> jax.Array:
    """0, as the sum of no elements of x, so that under shard_map it varies over the same mesh axes as x."""
    return x[:0].sum()


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sliced_statistics(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, options: _Options
) -> LogitStatistics:
    return _forward(hidden, head, targets, options)[0]


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, options: _Options
) -> tuple[LogitStatistics, _Residuals]:
    vocab_size = head.shape[1]
    (first, head_of_first), others = _cut(head, options.width)

    divisor = options.divisor
    if divisor != 1:  # XLA on CPU would write a constant divisor out at the size of the logits
        divisor = jax.lax.optimization_barrier(jnp.full((*targets.shape, 1), divisor))

    def statistics(j, head):
        logits = _logits(hidden, head, options)
        positions = _positions(targets, vocab_size, options.width, j)
        return logit_statistics(logits, positions, temperature=divisor, entropy=options.entropy), logits

    def add_slice(total, inputs):
        return _merge(total, statistics(*inputs)[0], options.divisor), None

    total, logits = statistics(first, head_of_first)
    if options.width < vocab_size:
        total, _ = jax.lax.scan(add_slice, total, others)
        logits = None  # computed again in the backward pass
    entropy = total.entropy if options.entropy_gradient else None
    return total, _Residuals(hidden, head, targets, logits, total.top, total.log_sum, entropy)


def _merge(a: LogitStatistics, b: LogitStatistics, temperature: float) -> LogitStatistics:
    """The statistics of two sets of columns together."""
    top = jnp.maximum(a.top, b.top)
    a_shift, b_shift = (a.top - top) / temperature, (b.top - top) / temperature
    log_sum = jnp.logaddexp(a.log_sum + a_shift, b.log_sum + b_shift)
    columns = a.columns + b.columns
    if a.entropy is None or b.entropy is None:
        entropy = None
    else:  # the chain rule: sum over both parts of P(part) (-log P(part) + the entropy within the part)
        a_nll, b_nll = log_sum - (a.log_sum + a_shift), log_sum - (b.log_sum + b_shift)
        entropy = jnp.exp(-a_nll) * (a_nll + a.entropy) + jnp.exp(-b_nll) * (b_nll + b.entropy)
    return LogitStatistics(
        target=jnp.maximum(a.target, b.target),
        top=top,
        mean=(a.columns * (a.mean + a_shift) + b.columns * (b.mean + b_shift)) / columns,
        log_sum=log_sum,
        entropy=entropy,
        columns=columns,
    )


def _backward(
    options: _Options, residuals: _Residuals, cotangents: LogitStatistics
) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, logits, top, log_sum, entropy = residuals
    d = jax.tree.map(lambda x: x[..., None], cotangents)  # those of top and columns are not used
    vocab_size = head.shape[1]
    (first, head_of_first), others = _cut(head, options.width)

    def gradients(j, head, logits=None):
        if logits is None:
            logits = _logits(hidden, head, options)
        x = (logits - top[..., None]) / options.divisor
        log_p = x - log_sum[..., None]
        d_log_sum = d.log_sum
        if entropy is not None:
            d_log_sum = d_log_sum - d.entropy * (log_p + entropy[..., None])
        is_target = jnp.arange(head.shape[1]) == _positions(targets, vocab_size, options.width, j)[..., None]
        d_x = jnp.exp(log_p) * d_log_sum + d.mean / vocab_size
        d_logits = d_x / options.divisor + jnp.where(is_target, d.target, 0)
        if options.softcap is not None:
            # `logits` once more, from x: keeping both would take one more array of their size.
            tanh = ((top / options.divisor)[..., None] + x) * options.divisor
            d_logits = d_logits * (1 - tanh**2) / options.softcap
        d_logits = _rows(d_logits).astype(head.dtype)
        d_hidden = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
        d_head = jnp.dot(_rows(hidden).T, d_logits, preferred_element_type=jnp.float32)
        return d_hidden.reshape(hidden.shape), d_head.astype(head.dtype)

    def add_slice(d_hidden, inputs):
        more, d_head = gradients(*inputs)
        return d_hidden + more, d_head

    d_hidden, d_first = gradients(first, head_of_first, logits)
    d_hidden, d_others = jax.lax.scan(add_slice, d_hidden, others)
    return d_hidden.astype(hidden.dtype), _join(d_first, d_others), None


_sliced_statistics.defvjp(_forward, _backward)


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B * T, D]: XLA on CPU multiplies two dimensions a third faster than three."""
    return x.reshape(-1, x.shape[-1])


def _logits(hidden: jax.Array, head: jax.Array, options: _Options) -> jax.Array:
    """Float32 [B, T, columns], softcapped, to be divided by `options.divisor`."""
    logits = jnp.dot(_rows(hidden), head, preferred_element_type=jnp.float32)
    logits = logits.reshape(*hidden.shape[:2], -1)
    return logits if options.softcap is None else jnp.tanh(logits / options.softcap)


def _cut(head: jax.Array, width: int) -> tuple[tuple[int, jax.Array], tuple[jax.Array, jax.Array]]:
    """[D, V] as (number, columns) of a first slice, and numbers and columns [slices, D, width] of the others.

    Slice j of n has columns j, j + n, j + 2 n, ...: where V is sharded, each device finds its share of every
    slice in its own columns. The remainder, the columns of V from n * width on, is the first slice if there
    is one, with number n.
    """
    n = head.shape[1] // width
    even, remainder = head[:, : n * width], head[:, n * width :]
    slices = jnp.moveaxis(even.reshape(len(head), width, n), 2, 0)
    if remainder.shape[1]:
        return (n, remainder), (jnp.arange(n), slices)
    return (0, slices[0]), (jnp.arange(1, n), slices[1:])


def _join(first: jax.Array, others: jax.Array) -> jax.Array:
    """The inverse of `_cut`: the columns [D, V] in their order."""
    if first.shape[1] == others.shape[2]:  # slice 0; a remainder has fewer columns
        others, first = jnp.concatenate([first[None], others]), first[:, :0]
    even = jnp.moveaxis(others, 0, 2).reshape(len(first), -1)
    return jnp.concatenate([even, first], axis=1)


def _positions(targets: jax.Array, vocab_size: int, width: int, j: jax.Array | int) -> jax.Array:
    """The columns of the targets within slice j of `_cut`; -1 for those that are not in it."""
    n = vocab_size // width
    in_remainder = targets >= n * width
    in_slice = jnp.where(in_remainder, n, targets % n) == j
    return jnp.where(in_slice, jnp.where(in_remainder, targets - n * width, targets // n), -1)
