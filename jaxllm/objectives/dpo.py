"""Preference optimisation without a reward model: DPO and its relatives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.batches import PairBatch
from jaxllm.losses import Weighted, dpo_loss
from jaxllm.objectives.reward_model import weigh_pairs
from jaxllm.rollout.score import next_token_log_probs


def loss_fn(
    params: Any,
    batch: PairBatch,
    key: jax.Array,
    *,
    model: Any,
    beta: float,
    variant: str,
    label_smoothing: float,
    length_normalized: bool,
) -> tuple[Weighted, dict[str, Weighted]]:
    """The variant's loss a pair. `model` is a tuple of functions as `build_model` returns; the reference's
    log-probs come with the batch. length_normalized: `ipo` with log-probs a token instead of summed."""
    del key  # nothing here is random
    log_probs = answer_log_probs(params, batch, model=model)
    return pair_loss(
        log_probs,
        batch,
        beta=beta,
        variant=variant,
        label_smoothing=label_smoothing,
        length_normalized=length_normalized,
    )


def pair_loss(
    log_probs: jax.Array, batch: PairBatch, *, length_normalized: bool, **options: Any
) -> tuple[Weighted, dict[str, Weighted]]:
    """The loss of log_probs[B, 2] of the answers, whatever model gave them."""
    answers = batch.lengths - batch.prompt_lengths[:, None]
    lengths = {"chosen_length": answers[:, 0], "rejected_length": answers[:, 1]} if length_normalized else {}
    sides = (log_probs[:, 0], log_probs[:, 1], batch.ref_log_probs[:, 0], batch.ref_log_probs[:, 1])
    return weigh_pairs(partial(dpo_loss, **options), batch.weight, *sides, **lengths)


def answer_log_probs(params: Any, batch: PairBatch, *, model: Any) -> jax.Array:
    """Log-probs [B, 2] in nats of the answers given the prompt, end-of-turn token included: one function for
    policy and reference."""
    length = batch.tokens.shape[-1]
    log_probs, _ = next_token_log_probs(params, batch.tokens.reshape(-1, length), model=model)
    positions = jnp.arange(length) + 1  # of the tokens that are said
    said = (positions >= batch.prompt_lengths[:, None, None]) & (positions < batch.lengths[:, :, None])
    return jnp.where(said, log_probs.reshape(batch.tokens.shape), 0).sum(-1)
