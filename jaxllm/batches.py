"""The typed batches that data loaders make and objectives read. Every field is described once, here.

B sequences, T positions. A batch is a plain NamedTuple of arrays: numpy on the host, global
`jax.Array`s once the loader has placed it.
"""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax.Array on the device: the fields do not care which.


class TokenBatch(NamedTuple):
    """Next-token prediction over packed documents (pretraining and instruction fine-tuning).

    Position t of `tokens` predicts position t of `targets`: the shift is already done.
    """

    tokens: Array  # int32 [B, T], what the model reads
    targets: Array  # int32 [B, T], what it should say next
    mask: Array  # bool [B, T], True where the target counts in the loss
    segment_ids: Array  # int32 [B, T], 1, 2, ... a document within its row; 0 is padding
    positions: Array  # int32 [B, T], distance from the start of the document within its row


class PairBatch(NamedTuple):
    """Two answers to one prompt, the first of which was preferred (reward model, DPO).

    Each side holds the prompt and its answer from position 0 on, and then padding.
    """

    tokens: Array  # int32 [B, 2, T], the chosen side first
    prompt_lengths: Array  # int32 [B], tokens of the prompt, the same on both sides
    lengths: Array  # int32 [B, 2], tokens of prompt and answer, its end-of-turn token included
    margin: Array  # float32 [B], how much better the chosen answer is, in units of reward
    weight: Array  # float32 [B], how much the pair counts; 0 for what only fills a batch
    ref_log_probs: Array  # float32 [B, 2], the reference's log-probs of the answers, nats; 0 where unused


class RolloutBatch(NamedTuple):
    """Completions that the policy said, and what they were worth (PPO, GRPO).

    Each row holds a prompt and its completion from position 0 on, and then padding. Position t of every
    other field is about the token said next, tokens[:, t + 1], as in TokenBatch. None where unused.
    """

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T], True where the next token is the policy's and counts, its stop token included
    old_log_probs: Array  # float32 [B, T], the policy's before the first update on this rollout, nats
    advantages: Array  # float32 [B] (GRPO: one a completion) or [B, T] (PPO)
    ref_log_probs: Array | None = None  # float32 [B, T], the frozen reference's
    importance_weights: Array | None = None  # float32 [B, T], policy against sampler
    values: Array | None = None  # float32 [B, T], the critic's before the first update
    returns: Array | None = None  # float32 [B, T], what the critic should have said
