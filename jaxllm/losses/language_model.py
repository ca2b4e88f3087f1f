"""Log-probs, entropy and cross-entropy of a language model, from logits or straight from hidden states.

The `linear_*` functions apply the output head themselves, a block of positions at a time, and recompute each
block's logits in the backward pass, so that no [B, T, V] array ever exists: at V = 150,000 that array is
the largest of the whole step. Every stage trains and scores through them.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Weighted, aggregate, zero_masked

BLOCK_BYTES = 128 * 2**20  # float32 logits held at once where block_size is None


class TokenStatistics(NamedTuple):
    """What the losses need to know of the V logits at each position. All [B, T] float32, in nats."""

    log_probs: jax.Array  # log_softmax at the target
    mean_log_probs: jax.Array  # log_softmax averaged over the vocabulary
    logsumexp: jax.Array
    entropy: jax.Array
    correct: jax.Array  # 1 where the target has the highest logit; a tie is wrong


def token_log_probs(logits: jax.Array, targets: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """log_softmax(logits / temperature) at the targets, float32 [B, T], in nats.

    Args:
      logits: [B, T, V]; logits[b, t] predicts targets[b, t].
      targets: [B, T], integers. One outside [0, V) gives NaN, for a mask to hide.
      temperature: divides the logits, as the sampler does.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[[0.75, 0.25]]]))
    >>> jnp.exp(token_log_probs(logits, jnp.array([[0]]))).tolist()
    [[0.75]]
    """
    chex.assert_rank([logits, targets], [3, 2])
    return _statistics(logits.astype(jnp.float32) / temperature, targets).log_probs


def token_entropy(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), float32 [B, T], in nats.

    A logit of -inf is a token that cannot occur: it adds nothing, to the gradient either.

    >>> import jax.numpy as jnp
    >>> float(jnp.exp(token_entropy(jnp.zeros((1, 1, 8)))).round(4)[0, 0])
    8.0
    """
    chex.assert_rank(logits, 3)
    any_target = jnp.zeros(logits.shape[:2], jnp.int32)
    return _statistics(logits.astype(jnp.float32) / temperature, any_target).entropy


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
      targets: [B, T], integers. One outside [0, V) gives NaN, for a mask to hide.
      temperature: divides the logits, as the sampler does.
      softcap: None is no cap.
      block_size: positions of T at a time; B is never cut, so that it may be sharded. None chooses: all of T
        where the logits are small, which is fastest, else as many as keep them to 128 MiB.

    Returns:
      (log_probs, entropy), float32 [B, T], in nats, both differentiable.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((1, 1, 4)), jnp.zeros((4, 8))
    >>> log_probs, entropy = linear_token_log_probs(hidden, head, jnp.array([[3]]))
    >>> float(jnp.exp(-log_probs[0, 0]).round(4)), float(jnp.exp(entropy[0, 0]).round(4))
    (8.0, 8.0)
    """
    chex.assert_rank([hidden, head, targets], [3, 2, 2])
    statistics = _linear_statistics(hidden, head, targets, temperature, softcap, block_size)
    return statistics.log_probs, statistics.entropy


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

    The formula, masks, metrics and errors are those of `cross_entropy`; hidden, head, softcap and block_size
    those of `linear_token_log_probs`.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
    >>> targets, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3))
    >>> loss, metrics = linear_cross_entropy(hidden, head, targets, mask, block_size=2)
    >>> float(jnp.exp(loss.mean).round(4)), float(loss.weight)
    (8.0, 6.0)
    """
    chex.assert_rank([hidden, head, targets, mask], [3, 2, 2, 2])
    hidden, targets = jnp.where(mask[..., None] != 0, hidden, 0), jnp.where(mask != 0, targets, 0)
    statistics = _linear_statistics(hidden, head, targets, 1.0, softcap, block_size)
    return _cross_entropy(statistics, mask, label_smoothing, z_loss)


def _cross_entropy(
    statistics: TokenStatistics, mask: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[Weighted, dict[str, Weighted]]:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")

    def token_mean(values: jax.Array) -> Weighted:
        return aggregate(values, mask, "token_mean")

    nll = -statistics.log_probs
    metrics = {"loss": token_mean(nll), "accuracy": token_mean(statistics.correct)}
    per_token = nll
    if label_smoothing:
        per_token = (1 - label_smoothing) * nll - label_smoothing * statistics.mean_log_probs
    if z_loss:
        penalty = z_loss * statistics.logsumexp**2
        per_token = per_token + penalty
        metrics["z_loss"] = token_mean(penalty)
    return token_mean(per_token), jax.lax.stop_gradient(metrics)


def _statistics(logits: jax.Array, targets: jax.Array) -> TokenStatistics:
    """All by reductions over V, which stay local to each device where V is sharded (a gather would not)."""
    vocab_size = logits.shape[-1]
    is_target = jnp.arange(vocab_size) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0).sum(-1)
    target_logit = jnp.where((targets >= 0) & (targets < vocab_size), target_logit, jnp.nan)
    rival_logit = jnp.where(is_target, -jnp.inf, logits).max(-1)
    top_logit = jax.lax.stop_gradient(jnp.fmax(target_logit, rival_logit))
    centred = logits - top_logit[..., None]
    unnormalised = jnp.exp(centred)
    normaliser = unnormalised.sum(-1)
    logsumexp = top_logit + jnp.log(normaliser)
    energy = unnormalised * jnp.where(unnormalised > 0, centred, 0)  # 0, not 0 * -inf, where p is 0
    return TokenStatistics(
        log_probs=target_logit - logsumexp,
        mean_log_probs=logits.mean(-1) - logsumexp,
        logsumexp=logsumexp,
        entropy=jnp.log(normaliser) - energy.sum(-1) / normaliser,
        correct=(target_logit > rival_logit).astype(jnp.float32),
    )


def _linear_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    softcap: float | None,
    block_size: int | None,
) -> TokenStatistics:
    if hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"head must be [D, V] with D = {hidden.shape[-1]} of hidden, got {head.shape}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 position, or None to choose")
    batch, length = targets.shape
    if block_size is None:
        block_size = max(1, BLOCK_BYTES // (4 * batch * head.shape[1]))
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    hidden, head = hidden.astype(dtype), head.astype(dtype)
    # Under shard_map both must vary over the same mesh axes, so that a replicated head's gradient is summed.
    hidden, head = hidden + _varying_zero(head), head + _varying_zero(hidden)
    return _blockwise_statistics(hidden, head, targets, temperature, softcap, min(block_size, length))


def _varying_zero(x: jax.Array) -> jax.Array:
    """0, varying over the mesh axes of shard_map as x does: the sum of no elements of x."""
    return x[:0].sum()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _blockwise_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    softcap: float | None,
    block_size: int,
) -> TokenStatistics:
    return _forward(hidden, head, targets, temperature, softcap, block_size)[0]


def _forward(hidden, head, targets, temperature, softcap, block_size):
    def block(inputs):
        hidden, targets = inputs
        return _statistics(_logits(hidden, head, temperature, softcap), targets)

    if block_size == targets.shape[1]:  # one block: its logits are small enough to keep
        logits = _logits(hidden, head, temperature, softcap)
        statistics = _statistics(logits, targets)
    else:
        logits = None
        blocks = jax.lax.map(block, _split((hidden, targets), block_size))
        statistics = _join(blocks, targets.shape[1])
    return statistics, (hidden, head, targets, logits, statistics.logsumexp, statistics.entropy)


def _backward(temperature, softcap, block_size, residuals, cotangents):
    hidden, head, targets, logits, logsumexp, entropy = residuals
    length = targets.shape[1]

    def block(head_gradient, inputs, logits=None):
        hidden, targets, logsumexp, entropy, cotangents = inputs
        if logits is None:
            logits = _logits(hidden, head, temperature, softcap)
        d_logits = _d_logits(logits, targets, logsumexp, entropy, cotangents)
        if softcap is not None:
            d_logits = d_logits * (1 - (logits * temperature / softcap) ** 2)
        d_logits = (d_logits / temperature).astype(head.dtype).reshape(-1, head.shape[1])
        d_hidden = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
        d_head = jnp.dot(_rows(hidden).T, d_logits, preferred_element_type=jnp.float32)
        return head_gradient + d_head, d_hidden.reshape(hidden.shape).astype(hidden.dtype)

    inputs = hidden, targets, logsumexp, entropy, cotangents
    zeros = jnp.zeros(head.shape, jnp.float32) + _varying_zero(head)
    if logits is not None:
        d_head, d_hidden = block(zeros, inputs, logits)
    else:
        d_head, blocks = jax.lax.scan(block, zeros, _split(inputs, block_size))
        d_hidden = _join(blocks, length)
    return d_hidden, d_head.astype(head.dtype), None


_blockwise_statistics.defvjp(_forward, _backward)


def _d_logits(logits, targets, logsumexp, entropy, cotangents):
    """The gradient of the statistics by the (scaled) logits, from p = exp(logits - logsumexp) alone."""
    d = TokenStatistics(*(c[..., None] for c in cotangents))
    log_p = logits - logsumexp[..., None]
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    from_softmax = d.logsumexp - d.log_probs - d.mean_log_probs - d.entropy * (log_p + entropy[..., None])
    return jnp.exp(log_p) * from_softmax + d.mean_log_probs / logits.shape[-1] + is_target * d.log_probs


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B * T, D]: XLA on CPU multiplies two dimensions a third faster than three."""
    return x.reshape(-1, x.shape[-1])


def _logits(hidden, head, temperature, softcap):
    logits = jnp.dot(_rows(hidden), head, preferred_element_type=jnp.float32)
    logits = logits.reshape(*hidden.shape[:2], -1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits / temperature


def _split(tree, block_size):
    """Each [B, T, ...] as blocks [T / block_size, B, block_size, ...], T filled up with zeros."""

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block_size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, block_size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _join(tree, length):
    """The inverse of `_split`."""

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)
