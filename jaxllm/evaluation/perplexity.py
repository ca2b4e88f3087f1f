"""How well a model predicts held-out text: loss, bits per byte, accuracy, with standard errors."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.batches import TokenBatch
from jaxllm.losses import linear_cross_entropy

LOGITS_BYTES = 512 * 2**20  # of logits that may exist at once


class RowSums(NamedTuple):
    """Sums over the counted targets of each row, float32 [B]."""

    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    correct: jax.Array


def row_sums(params: Any, batch: TokenBatch, byte_lengths: Any, *, model: Any) -> RowSums:
    """Score a batch. byte_lengths int32 [V]: bytes of text that each token stands for."""
    hidden, _ = model.apply(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    head, byte_lengths = model.head(params), jnp.asarray(byte_lengths)
    rows, length = batch.tokens.shape
    positions = max(1, LOGITS_BYTES // (4 * rows * head.shape[1]))  # of each row, since rows are scored apart

    def score(hidden_TD: jax.Array, targets_T: jax.Array, mask_T: jax.Array) -> RowSums:
        loss, metrics = linear_cross_entropy(
            hidden_TD[None],
            head,
            targets_T[None],
            mask_T[None],
            softcap=model.config.logit_softcap,
            block_size=min(positions, length),
        )
        num_bytes = jnp.sum(jnp.where(mask_T, byte_lengths[targets_T], 0)).astype(jnp.float32)
        return RowSums(loss.sum, loss.weight, num_bytes, metrics["accuracy"].sum)

    return jax.vmap(score)(hidden, batch.targets, batch.mask)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """sum / sum over rows, and its standard error with rows as the independent units (delta method)."""
    n, mean = len(numerators), float(numerators.sum() / denominators.sum())
    residuals = numerators - mean * denominators
    spread = np.sqrt((residuals**2).sum() / (n - 1) / n) if n > 1 else np.nan
    return mean, float(spread / denominators.mean())


def evaluate(
    params: Any,
    batches: Iterable[TokenBatch],
    score: Callable[[Any, TokenBatch], RowSums],
    check: Callable[[], None],
) -> dict[str, float]:
    """`eval/loss` (nats a token), `eval/bits_per_byte`, each with `_se`, and `eval/accuracy`.

    Bits per byte do not depend on the tokenizer: all nats, those of the end of a document included,
    over the bytes of text. `check` is called before every batch and may raise to end it early.
    """
    rows = []
    for batch in batches:
        check()
        rows.append(jax.device_get(score(params, batch)))
    sums = RowSums(*(np.concatenate(column).astype(np.float64) for column in zip(*rows, strict=True)))
    sums = RowSums(*(column[sums.tokens > 0] for column in sums))  # rows that only fill the last batch
    loss, loss_se = ratio(sums.nats, sums.tokens)
    bits, bits_se = ratio(sums.nats / np.log(2), sums.bytes)
    return {
        "eval/loss": loss,
        "eval/loss_se": loss_se,
        "eval/bits_per_byte": bits,
        "eval/bits_per_byte_se": bits_se,
        "eval/accuracy": ratio(sums.correct, sums.tokens)[0],
    }
