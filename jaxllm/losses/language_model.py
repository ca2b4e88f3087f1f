"""Log-probs, entropy and cross-entropy of a language model, from logits or straight from hidden states.

The `linear_*` functions apply the output head themselves, a slice of the vocabulary at a time, and recompute
each slice's logits in the backward pass, so that no [B, T, V] array ever exists: at V = 150,000 it would be
the largest of the whole step. Every stage trains and scores through them.

Why slices of V and not of T: each column of the head's gradient is then finished in one product over all
tokens, so nothing of the head's size is accumulated in float32 or, on a mesh, reduced more than once.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Weighted, weigh, zero_masked

# Where block_size is None, one slice of float32 logits takes at most SLICE_BYTES, unless its columns would be
# fewer than SLICE_WIDTH: products want that many, and hidden states are then as large as the slice.
SLICE_BYTES = 512 * 2**20
SLICE_WIDTH = 1024


class LogitStatistics(NamedTuple):
    """What the losses need to know of the logits at each position. All [B, T] float32."""

    target: jax.Array  # the target's logit; -inf where it is not among the logits
    top: jax.Array  # the highest logit, no gradient
    mean: jax.Array  # of the logits
    logsumexp: jax.Array
    entropy: jax.Array | None  # of softmax(logits), in nats; None where nobody asked


def token_log_probs(logits: jax.Array, targets: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """log_softmax(logits / temperature) at the targets, float32 [B, T], in nats.

    Args:
      logits: [B, T, V]; logits[b, t] predicts targets[b, t].
      targets: [B, T], integers. One outside [0, V) gives -inf, for a mask to hide.
      temperature: divides the logits, as the sampler does.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[[0.75, 0.25]]]))
    >>> jnp.exp(token_log_probs(logits, jnp.array([[0]]))).tolist()
    [[0.75]]
    """
    chex.assert_rank([logits, targets], [3, 2])
    statistics = _statistics(logits.astype(jnp.float32) / temperature, targets)
    return statistics.target - statistics.logsumexp


def token_entropy(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), float32 [B, T], in nats.

    A logit of -inf is a token that cannot occur: it adds nothing, to the gradient either.

    >>> import jax.numpy as jnp
    >>> float(jnp.exp(token_entropy(jnp.zeros((1, 1, 8)))).round(4)[0, 0])
    8.0
    """
    chex.assert_rank(logits, 3)
    logits = jnp.maximum(logits.astype(jnp.float32) / temperature, -1e30)  # 0 * -inf would be NaN
    log_probs = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_probs) * log_probs).sum(-1)


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The token mean of (1 - e)(-log p_target) + e mean_v(-log p_v) + z_loss logsumexp(logits)^2.

    e is label_smoothing (Szegedy et al. 2016); it spreads over all V tokens, the target included, as
    torch's does. The z-loss keeps the normaliser near 1 (PaLM, Chowdhery et al. 2022, with 1e-4).

    Args:
      logits: [B, T, V]; logits[b, t] predicts targets[b, t].
      targets: [B, T], integers; anything where masked.
      mask: [B, T], bool or number; non-zero counts.
      label_smoothing: in [0, 1).
      z_loss: coefficient.

    Returns:
      The loss, and metrics: `loss`, the plain -log p_target (nats a token, whatever the smoothing),
      `accuracy` (target strictly the likeliest) and, where used, `z_loss` with its coefficient.

    Raises:
      ValueError: label_smoothing outside [0, 1).

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [jnp.nan, jnp.nan, jnp.nan]]]))
    >>> loss, metrics = cross_entropy(logits, jnp.array([[0, -100]]), jnp.array([[1, 0]]))
    >>> float(jnp.exp(-loss.mean)), float(metrics["accuracy"].mean)
    (0.5, 1.0)
    """
    chex.assert_rank([logits, targets, mask], [3, 2, 2])
    logits, targets = zero_masked(logits, mask[..., None]), jnp.where(mask != 0, targets, 0)
    return _cross_entropy(_statistics(logits, targets), mask, label_smoothing, z_loss)


def linear_token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` and `token_entropy` of `hidden @ head`, without its [B, T, V] logits.

    logits = hidden @ head, then softcap * tanh(logits / softcap) if given (Gemma 2, 2024), then divided by
    the temperature. Values and gradients equal the dense form's; products accumulate in float32, and so does
    the head's gradient. Temporaries are O(B block_size V + D V), forward and backward.

    Args:
      hidden: [B, T, D], what the model says before its head.
      head: [D, V].
      targets: [B, T], integers. One outside [0, V) gives -inf, for a mask to hide.
      temperature: divides the logits, as the sampler does.
      softcap: None is no cap.
      block_size: positions of T whose logits may exist at once. None chooses: all where they are small, which
        is fastest, else half a GiB of them. The cut runs through V, into T / block_size slices, so B and T
        may be sharded and need not divide.

    Returns:
      (log_probs, entropy), float32 [B, T], in nats, both differentiable.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((1, 1, 4)), jnp.zeros((4, 8))
    >>> log_probs, entropy = linear_token_log_probs(hidden, head, jnp.array([[3]]))
    >>> float(jnp.exp(-log_probs[0, 0]).round(4)), float(jnp.exp(entropy[0, 0]).round(4))
    (8.0, 8.0)
    """
    chex.assert_rank([hidden, head, targets], [3, 2, 2])
    form = _Form(temperature, softcap, _width(targets, head, block_size), entropy=True)
    statistics = _linear_statistics(hidden, head, targets, form)
    return statistics.target - statistics.logsumexp, statistics.entropy


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

    Formula, metrics and errors are those of `cross_entropy`.

    Args:
      hidden, head, softcap, block_size: see `linear_token_log_probs`; hidden may be anything where masked.
      targets, mask, label_smoothing, z_loss: see `cross_entropy`.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
    >>> targets, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3))
    >>> loss, metrics = linear_cross_entropy(hidden, head, targets, mask, block_size=2)
    >>> float(jnp.exp(loss.mean).round(4)), float(loss.weight)
    (8.0, 6.0)
    """
    chex.assert_rank([hidden, head, targets, mask], [3, 2, 2, 2])
    hidden, targets = jnp.where(mask[..., None] != 0, hidden, 0), jnp.where(mask != 0, targets, 0)
    form = _Form(1.0, softcap, _width(targets, head, block_size), entropy=False)
    return _cross_entropy(_linear_statistics(hidden, head, targets, form), mask, label_smoothing, z_loss)


def _cross_entropy(
    statistics: LogitStatistics, mask: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[Weighted, dict[str, Weighted]]:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
    target, top, mean, logsumexp, _ = statistics
    correct = (target == top) & (target > mean)  # an untrained head, all logits equal, predicts nothing
    nll = per_token = logsumexp - target
    metrics = {"loss": weigh(nll, mask), "accuracy": weigh(correct, mask)}
    if label_smoothing:
        per_token = (1 - label_smoothing) * nll + label_smoothing * (logsumexp - mean)
    if z_loss:
        penalty = z_loss * logsumexp**2
        per_token = per_token + penalty
        metrics["z_loss"] = weigh(penalty, mask)
    return weigh(per_token, mask), jax.lax.stop_gradient(metrics)


def _statistics(
    logits: jax.Array, positions: jax.Array, vocab_size: int | None = None, *, entropy: bool = False
) -> LogitStatistics:
    """Of the logits of some columns of V, the target's at `positions` if inside; `mean` is their share.

    Written as XLA on CPU likes it: each reduction reads the logits and writes nothing of their size.
    """
    width = logits.shape[-1]
    inside = (positions >= 0) & (positions < width)
    target = jnp.take_along_axis(logits, jnp.where(inside, positions, 0)[..., None], axis=-1)[..., 0]
    top = jax.lax.stop_gradient(logits.max(-1))
    logsumexp = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    log_p = logits - logsumexp[..., None]
    return LogitStatistics(
        target=jnp.where(inside, target, -jnp.inf),
        top=top,
        mean=logits.sum(-1) / (vocab_size or width),
        logsumexp=logsumexp,
        entropy=-(jnp.exp(log_p) * log_p).sum(-1) if entropy else None,
    )


def _merge(a: LogitStatistics, b: LogitStatistics) -> LogitStatistics:
    """The statistics of two sets of columns together."""
    logsumexp = jnp.logaddexp(a.logsumexp, b.logsumexp)

    def entropy(part: LogitStatistics) -> jax.Array:  # of the choice of this part, then of the choice within
        surprise = logsumexp - part.logsumexp
        return jnp.exp(-surprise) * (surprise + part.entropy)

    return LogitStatistics(
        target=jnp.maximum(a.target, b.target),
        top=jnp.maximum(a.top, b.top),
        mean=a.mean + b.mean,
        logsumexp=logsumexp,
        entropy=None if a.entropy is None else entropy(a) + entropy(b),
    )


class _Form(NamedTuple):
    """How logits come from hidden states and head: all of it known while tracing."""

    temperature: float
    softcap: float | None
    width: int  # columns of V whose logits exist at once
    entropy: bool


def _width(targets: jax.Array, head: jax.Array, block_size: int | None) -> int:
    """How many columns of V have, at all positions, as many logits as V has at block_size positions.

    All of V, or else a multiple of 8, which mesh axes divide.
    """
    (batch, length), vocab_size = targets.shape, head.shape[1]
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 position, or None to choose")
    if block_size is None:
        cuts = -(-4 * batch * length * vocab_size // SLICE_BYTES)
        cuts = min(1 << (cuts - 1).bit_length(), vocab_size // SLICE_WIDTH)  # powers of two divide most V
    else:
        cuts = -(-length // block_size)
    return vocab_size if cuts <= 1 else min(vocab_size, max(8, vocab_size // cuts // 8 * 8))


def _linear_statistics(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, form: _Form
) -> LogitStatistics:
    if hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"head must be [D, V] with the D of hidden, {hidden.shape[-1]}; got {head.shape}")
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    hidden, head = hidden.astype(dtype), head.astype(dtype)
    # Under shard_map both must vary over the same mesh axes, so that a replicated head's gradient is summed.
    hidden, head = hidden + _varying_zero(head), head + _varying_zero(hidden)
    return _sliced_statistics(hidden, head, targets, form)


def _varying_zero(x: jax.Array) -> jax.Array:
    """0, varying over the mesh axes of shard_map as x does: the sum of no elements of x."""
    return x[:0].sum()


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sliced_statistics(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, form: _Form
) -> LogitStatistics:
    return _forward(hidden, head, targets, form)[0]


def _forward(hidden, head, targets, form):
    vocab_size = head.shape[1]
    (first, head_of_first), others = _cut(head, form.width)

    def statistics(j, head):
        logits = _logits(hidden, head, form)
        positions = _positions(targets, vocab_size, form.width, j)
        return _statistics(logits, positions, vocab_size, entropy=form.entropy), logits

    def add_slice(total, inputs):
        return _merge(total, statistics(*inputs)[0]), None

    total, logits = statistics(first, head_of_first)
    if form.width < vocab_size:
        total, _ = jax.lax.scan(add_slice, total, others)
        logits = None  # recomputed in the backward pass
    return total, (hidden, head, targets, logits, total.logsumexp, total.entropy)


def _backward(form, residuals, cotangents):
    hidden, head, targets, logits, logsumexp, entropy = residuals
    d = jax.tree.map(lambda x: x[..., None], cotangents)
    vocab_size = head.shape[1]
    (first, head_of_first), others = _cut(head, form.width)

    def gradients(j, head, logits=None):
        if logits is None:
            logits = _logits(hidden, head, form)
        log_p = logits - logsumexp[..., None]
        d_logsumexp = d.logsumexp
        if form.entropy:
            d_logsumexp = d_logsumexp - d.entropy * (log_p + entropy[..., None])
        is_target = jnp.arange(head.shape[1]) == _positions(targets, vocab_size, form.width, j)[..., None]
        d_logits = jnp.exp(log_p) * d_logsumexp + d.mean / vocab_size + jnp.where(is_target, d.target, 0)
        if form.softcap is not None:
            d_logits = d_logits * (1 - (logits * form.temperature / form.softcap) ** 2)
        d_logits = _rows(d_logits / form.temperature).astype(head.dtype)
        d_hidden = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
        d_head = jnp.dot(_rows(hidden).T, d_logits, preferred_element_type=jnp.float32)
        return d_hidden.reshape(hidden.shape), d_head.astype(head.dtype)

    def add_slice(d_hidden, inputs):
        more, d_head = gradients(*inputs)
        return d_hidden + more, d_head

    d_hidden, d_first = gradients(first, head_of_first, logits)
    d_hidden, d_others = jax.lax.scan(add_slice, d_hidden, others)
    return d_hidden.astype(hidden.dtype), _uncut(d_first, d_others), None


_sliced_statistics.defvjp(_forward, _backward)


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B * T, D]: XLA on CPU multiplies two dimensions a third faster than three."""
    return x.reshape(-1, x.shape[-1])


def _logits(hidden, head, form):
    logits = jnp.dot(_rows(hidden), head, preferred_element_type=jnp.float32)
    logits = logits.reshape(*hidden.shape[:2], -1)
    if form.softcap is not None:
        logits = form.softcap * jnp.tanh(logits / form.softcap)
    return logits / form.temperature


def _cut(head: jax.Array, width: int) -> tuple[tuple[int, jax.Array], tuple[jax.Array, jax.Array]]:
    """[D, V] as a first slice, numbered, and the numbers and columns [slices, D, width] of the others.

    Slice j of n has columns j, j + n, j + 2 n, ...: where V is sharded, each device finds its share of every
    slice in its own columns. What V has beyond n * width columns comes first and has number n.
    """
    n = head.shape[1] // width
    even, odd = head[:, : n * width], head[:, n * width :]
    slices = jnp.moveaxis(even.reshape(len(head), width, n), 2, 0)
    if odd.shape[1]:
        return (n, odd), (jnp.arange(n), slices)
    return (0, slices[0]), (jnp.arange(1, n), slices[1:])


def _uncut(first: jax.Array, others: jax.Array) -> jax.Array:
    """The columns of `_cut` in their places again."""
    if first.shape[1] == others.shape[2]:  # slice 0; odd columns are fewer
        others, first = jnp.concatenate([first[None], others]), first[:, :0]
    even = jnp.moveaxis(others, 0, 2).reshape(len(first), -1)
    return jnp.concatenate([even, first], axis=1)


def _positions(targets: jax.Array, vocab_size: int, width: int, j: jax.Array | int) -> jax.Array:
    """Where the targets are in slice j of `_cut`, -1 where they are not in it."""
    n = vocab_size // width
    is_odd = targets >= n * width
    in_slice = jnp.where(is_odd, n, targets % n) == j
    return jnp.where(in_slice, jnp.where(is_odd, targets - n * width, targets // n), -1)
