"""How well a model predicts held-out text: loss, bits per byte, accuracy, with standard errors."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxllm.batches import TokenBatch
from jaxllm.losses import linear_cross_entropy
from jaxllm.models import Model, Params
from jaxllm.models.interface import Array
from jaxllm.parallel.global_arrays import to_host

LOGITS_BYTES = 512 * 2**20  # of logits that may exist at once


class RowSums(NamedTuple):
    """Sums over the counted targets of each row, float32 [B]."""

    nats: Array
    tokens: Array
    bytes: Array
    correct: Array


def row_sums(params: Params, batch: TokenBatch, byte_lengths: ArrayLike, *, model: Model) -> RowSums:
    """Score a batch. byte_lengths int32 [V]: bytes of text that each token stands for."""
    output = model.apply(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
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

    return jax.vmap(score)(output.hidden, batch.targets, batch.mask)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """sum / sum over rows, and its standard error with rows as the independent units (delta method)."""
    n, mean = len(numerators), float(numerators.sum() / denominators.sum())
    residuals = numerators - mean * denominators
    spread = np.sqrt((residuals**2).sum() / (n - 1) / n) if n > 1 else np.nan
    return mean, float(spread / denominators.mean())


def evaluate(
    params: Params,
    batches: Iterable[TokenBatch],
    score: Callable[[Params, TokenBatch], RowSums],
    check: Callable[[], None],
) -> dict[str, float]:
    """`eval/loss` (nats a token), `eval/bits_per_byte`, each with `_se`, and `eval/accuracy`.

    Bits per byte do not depend on the tokenizer: all nats, those of the end of a document included,
    over the bytes of text. `check` is called before every batch and may raise to end it early.
    """
    rows = []
    for batch in batches:
        check()
        rows.append(to_host(score(params, batch)))
    columns = [np.concatenate(column).astype(np.float64) for column in zip(*rows, strict=True)]
    counted = columns[1] > 0  # not the rows that only fill the last batch
    nats, tokens, num_bytes, correct = (column[counted] for column in columns)
    loss, loss_se = ratio(nats, tokens)
    bits, bits_se = ratio(nats / np.log(2), num_bytes)
    return {
        "eval/loss": loss,
        "eval/loss_se": loss_se,
        "eval/bits_per_byte": bits,
        "eval/bits_per_byte_se": bits_se,
        "eval/accuracy": ratio(correct, tokens)[0],
    }
