"""Log-probs, entropy and cross-entropy of a language model from its logits.

`linear_head.py` computes the same from hidden states and output head, without [B, T, V] logits.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Weighted, masked_sum, zero_masked


class LogitStatistics(NamedTuple):
    """What the losses need of the logits z at each position, [B, T] float32 except for `columns`.

    mean, log_sum and entropy are those of x = (z - top) / temperature: where logits are large, a logsumexp of
    z itself has lost the digits that a difference from it needs. logsumexp(z / temperature) is
    top / temperature + log_sum.
    """

    target: jax.Array  # z of the target; -inf where the target is not among these columns
    top: jax.Array  # the highest z, without gradient
    mean: jax.Array  # mean_v x_v
    log_sum: jax.Array  # log sum_v exp(x_v)
    entropy: jax.Array | None  # of softmax(x), in nats; None where it is not used
    columns: jax.Array  # the number of columns of V that these are the statistics of, a float32 scalar


def token_log_probs(logits: jax.Array, targets: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """log_softmax(logits / temperature) at the targets, float32 [B, T], in nats.

    Args:
      logits: [B, T, V]; logits[b, t] predicts targets[b, t].
      targets: [B, T], integers. One outside [0, V) gives -inf, which the caller has to mask.
      temperature: divides the logits, as in sampling.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[[0.75, 0.25]]]))
    >>> jnp.exp(token_log_probs(logits, jnp.array([[0]]))).tolist()
    [[0.75]]
    """
    chex.assert_rank([logits, targets], [3, 2])
    statistics = logit_statistics(logits.astype(jnp.float32), targets, temperature=temperature)
    return log_probs_of(statistics, temperature)


def token_entropy(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), float32 [B, T], in nats.

    A logit of -inf is a token that cannot occur: it adds nothing to the value or the gradient.

    Args:
      logits: [B, T, V].
      temperature: divides the logits, as in sampling.

    >>> import jax.numpy as jnp
    >>> float(jnp.exp(token_entropy(jnp.zeros((1, 1, 8)))).round(4)[0, 0])
    8.0
    """
    chex.assert_rank(logits, 3)
    logits = jnp.maximum(logits.astype(jnp.float32), -1e30)  # 0 * -inf would be NaN
    top = jax.lax.stop_gradient(logits.max(-1))
    log_sum = jnp.log(jnp.exp((logits - top[..., None]) / temperature).sum(-1))
    return _entropy(logits, top, log_sum, temperature)


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The token mean of (1 - e)(-log p_target) + e mean_v(-log p_v) + z_loss logsumexp(logits)^2.

    e is label_smoothing (Szegedy et al. 2016). It is spread over all V tokens, the target included, as in
    PyTorch. The z-loss keeps the normalizer near 1 (PaLM, Chowdhery et al. 2022, with 1e-4).

    Args:
      logits: [B, T, V]; logits[b, t] predicts targets[b, t].
      targets: [B, T], integers; any value where masked.
      mask: [B, T], bool or number; non-zero counts.
      label_smoothing: in [0, 1).
      z_loss: coefficient.

    Returns:
      The loss, and metrics: `loss`, the plain -log p_target (nats per token, whatever the smoothing),
      `accuracy` (the target has the highest logit, and not all logits are equal) and, if used, `z_loss` with
      its coefficient.

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
    return cross_entropy_of(logit_statistics(logits, targets), mask, label_smoothing, z_loss)


def cross_entropy_of(
    statistics: LogitStatistics,
    mask: jax.Array,
    label_smoothing: float,
    z_loss: float,
    *,
    temperature: float = 1.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """`cross_entropy` of logits / temperature from the statistics of all V columns; `mask` is [B, T].

    >>> import jax.numpy as jnp
    >>> statistics = logit_statistics(jnp.zeros((1, 1, 4)), jnp.array([[2]]))
    >>> loss, _ = cross_entropy_of(statistics, jnp.ones((1, 1)), label_smoothing=0.0, z_loss=0.0)
    >>> float(jnp.exp(loss.mean).round(4))
    4.0
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
    target, top, mean, log_sum = statistics[:4]
    correct = (target == top) & (mean < 0)  # an untrained head whose logits are all equal predicts nothing
    nll = per_token = -log_probs_of(statistics, temperature)
    metrics = {"loss": masked_sum(nll, mask), "accuracy": masked_sum(correct, mask)}
    if label_smoothing:
        per_token = (1 - label_smoothing) * nll + label_smoothing * (log_sum - mean)
    if z_loss:
        penalty = z_loss * (top / temperature + log_sum) ** 2
        per_token = per_token + penalty
        metrics["z_loss"] = masked_sum(penalty, mask)
    return masked_sum(per_token, mask), jax.lax.stop_gradient(metrics)


def log_probs_of(statistics: LogitStatistics, temperature: float) -> jax.Array:
    """log_softmax(logits / temperature) at the targets, [B, T], from the statistics of all V columns.

    >>> import jax.numpy as jnp
    >>> statistics = logit_statistics(jnp.full((1, 1, 4), 3e4), jnp.array([[2]]), temperature=0.5)
    >>> float(jnp.exp(-log_probs_of(statistics, temperature=0.5)).round(4)[0, 0])
    4.0
    """
    return (statistics.target - statistics.top) / temperature - statistics.log_sum


def logit_statistics(
    logits: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    entropy: bool = False,
) -> LogitStatistics:
    """The statistics of float32 logits [B, T, columns]; `targets` [B, T] index these columns.

    `temperature` may be [B, T, 1]. Written so that XLA on CPU fuses it: each reduction reads the logits and
    writes no array of their size.

    >>> import jax.numpy as jnp
    >>> statistics = logit_statistics(jnp.full((1, 1, 4), 3e4), jnp.array([[2]]), temperature=0.5)
    >>> float(statistics.top[0, 0]), float(jnp.exp(statistics.log_sum[0, 0]).round(4))
    (30000.0, 4.0)
    """
    columns = logits.shape[-1]
    inside = (targets >= 0) & (targets < columns)
    target = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[..., None], axis=-1)[..., 0]
    top = jax.lax.stop_gradient(logits.max(-1))
    x = (logits - top[..., None]) / temperature
    log_sum = jnp.log(jnp.exp(x).sum(-1))
    return LogitStatistics(
        target=jnp.where(inside, target, -jnp.inf),
        top=top,
        mean=x.sum(-1) / columns,
        log_sum=log_sum,
        entropy=_entropy(logits, top, log_sum, temperature) if entropy else None,
        columns=jnp.float32(columns),
    )


def _entropy(
    logits: jax.Array, top: jax.Array, log_sum: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """-sum_v p_v log p_v [B, T] from the logits and the fields of their `LogitStatistics`.

    The barrier keeps XLA from seeing that x was computed before: it would store x, at the size of the logits.
    """
    x = (logits - jax.lax.optimization_barrier(top)[..., None]) / temperature
    log_p = x - log_sum[..., None]
    return -(jnp.exp(log_p) * log_p).sum(-1)
