"""The typed batches that data loaders produce and losses read. Every field is described once, here.

B sequences, T positions. A batch is a plain NamedTuple of arrays: numpy on the host, global
`jax.Array`s once the loader has placed it on the devices.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # np.ndarray, jax.Array, or the jax.ShapeDtypeStruct of either: no field depends on which


class TokenBatch(NamedTuple):
    """Next-token prediction over packed documents (pretraining and instruction fine-tuning).

    Position t of `tokens` predicts position t of `targets`: the shift is already done.
    """

    tokens: Array  # int32 [B, T], the model's input
    targets: Array  # int32 [B, T], the next token at each position
    mask: Array  # bool [B, T], the loss mask: True where the target counts in the loss
    segment_ids: Array  # int32 [B, T], 1, 2, ... for the documents of a row; 0 is padding
    positions: Array  # int32 [B, T], offset from the start of the document within its row


class PairBatch(NamedTuple):
    """Two completions of one prompt, the first of which is preferred (reward model, DPO).

    Each side holds the prompt and its completion from position 0 on, and then padding.
    """

    tokens: Array  # int32 [B, 2, T], the chosen side first
    prompt_lengths: Array  # int32 [B], tokens of the prompt, the same on both sides
    lengths: Array  # int32 [B, 2], tokens of prompt and completion, end-of-turn token included
    margin: Array  # float32 [B], by how much the chosen completion is better, in units of reward
    weight: Array  # float32 [B], weight of the pair in the loss; 0 for pairs that only fill up a batch
    ref_log_probs: Array  # float32 [B, 2], log-probs of the completions under the reference, nats; else 0

    @property
    def row_lengths(self) -> np.ndarray:
        """Int [B]: positions that are not padding."""
        return self.lengths.max(1)


class RolloutBatch(NamedTuple):
    """Completions sampled from the policy, with their advantages (PPO, GRPO).

    Each row holds a prompt and its completion from position 0 on, and then padding. Position t of every
    other field is about the next token, tokens[:, t + 1], as in TokenBatch. None where unused.
    """

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T], True where the policy sampled the next token and it counts; EOS included
    old_log_probs: Array | None  # float32 [B, T], the policy's before the first update on this rollout, nats
    advantages: Array  # float32 [B] (GRPO: one per completion) or [B, T] (PPO)
    ref_log_probs: Array | None = None  # float32 [B, T], the frozen reference's, nats
    importance_weights: Array | None = None  # float32 [B, T], policy probability over sampler probability
    sampler_log_probs: Array | None = None  # float32 [B, T], nats; where the step makes the two fields above
    values: Array | None = None  # float32 [B, T], the critic's before the first update
    returns: Array | None = None  # float32 [B, T], the critic's targets
    extra_weight: Array | None = None  # float32 [B], added to the loss's: of rows without gradient, left out

    @property
    def row_lengths(self) -> np.ndarray:
        """Int [B]: positions up to the last token that counts."""
        return counted_lengths(self.mask)


def counted_lengths(mask: np.ndarray) -> np.ndarray:
    """Int [B], at least 1: the positions of rows that a loss with this mask [B, T] reads. Position t of the
    mask is about the next token."""
    return np.where(mask.any(1), mask.shape[1] + 1 - np.argmax(mask[:, ::-1], axis=1), 1)


def positions(batch: Any) -> int:
    """Number of tokens, padding included, of a batch or of a list of micro-batches."""
    return sum(each.tokens.size for each in (batch if isinstance(batch, list) else [batch]))
