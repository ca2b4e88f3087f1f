"""Log-probs of a rollout: the policy's before its first update on it, and the frozen reference's."""

from typing import Any

import jax
import numpy as np

from jaxllm.batches import Array, RolloutBatch, counted_lengths
from jaxllm.errors import NumericsError
from jaxllm.losses import Weighted, truncated_importance_weights
from jaxllm.losses.aggregate import count, masked_sum
from jaxllm.models import Model, Params
from jaxllm.rl.config import RolloutConfig
from jaxllm.rl.rollouts import Metrics, Rollout
from jaxllm.rollout.score import log_probs_in_batches
from jaxllm.runs.program import Program
from jaxllm.runs.sampling_weights import in_compute_dtype
from jaxllm.training.state import merge_params


class LogProbs:
    """Scores rollouts with the policy and, where there is one, its reference."""

    def __init__(self, program: Program[Any, Any], model: Model, reference: Params | None):
        """`reference` is the trained parameters of the frozen policy (`split_params`), which has the others
        of the policy; None: no KL is computed."""
        self.config: RolloutConfig = program.config.rollout
        self.model = model.config
        self.reference = reference
        sampling = self.config.sampling
        self.score = log_probs_in_batches(
            model,
            sampling.temperature,
            program.microbatch_rows,
            program.config.data.sequence_length,
            program.mesh,
            sampling.max_new_tokens,
        )

    def old(self, params: Params, rollout: Rollout, step: int) -> tuple[np.ndarray, Metrics]:
        """The policy's log-probs [N, T] before it trains on a rollout; how far the sampler's were off.

        Without `recompute_log_probs` these are the sampler's, compared with the trainer's in the first
        rollout only.
        """
        if not self.config.recompute_log_probs and step > 0:
            return rollout.sampler_log_probs, {}
        params = in_compute_dtype(params, self.model)
        log_probs = self.score(params, counted_lengths(rollout.mask), rollout.tokens, rollout.mask)
        gaps = np.abs(log_probs - rollout.sampler_log_probs)[rollout.mask]
        return log_probs if self.config.recompute_log_probs else rollout.sampler_log_probs, {
            "sampler/log_prob_difference_mean": float(gaps.mean()) if gaps.size else 0.0,
            "sampler/log_prob_difference_max": float(gaps.max()) if gaps.size else 0.0,
        }

    def of_reference(self, params: Params, rollout: Rollout) -> np.ndarray:
        """The reference's log-probs, [N, T]."""
        assert self.reference is not None
        mask, params = rollout.mask, in_compute_dtype(merge_params(self.reference, params), self.model)
        return self.score(params, counted_lengths(mask), rollout.tokens, mask)

    def kl(
        self, params: Params, old_log_probs: np.ndarray, rollout: Rollout, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The reference's log-probs and the k1 estimate of the KL of the policy with these `params` to it of
        each token, [N, T] both."""
        ref_log_probs = self.of_reference(params, rollout)
        kl = np.where(rollout.mask, old_log_probs - ref_log_probs, 0)
        if step == 0 and self.config.recompute_log_probs and kl.any():
            raise NumericsError(
                f"before the first update the policy is its own reference, but one token's KL to it is "
                f"{np.abs(kl).max():.3g}, which must be 0: scoring the same weights twice does not agree"
            )
        return ref_log_probs, kl

    def importance_weights(self, old_log_probs: np.ndarray, rollout: Rollout) -> np.ndarray | None:
        """Policy over sampler, [N, T], which corrects for a sampler that is not quite the policy."""
        weights = importance_weights(old_log_probs, rollout.sampler_log_probs, rollout.mask, self.config)
        return None if weights is None else np.asarray(weights)


def log_probs_in_step(
    log_probs: jax.Array, batch: RolloutBatch, config: RolloutConfig
) -> tuple[jax.Array, jax.Array | None, dict[str, Weighted]]:
    """Old log-probs and importance weights [B, T], and the metrics of `LogProbs`, of a rollout that has one
    update: the policy before it is that of the step itself, with `log_probs` [B, T]."""
    own, sampler, mask = jax.lax.stop_gradient(log_probs), batch.sampler_log_probs, batch.mask
    assert sampler is not None
    metrics = {"sampler/log_prob_difference_mean": masked_sum(abs(own - sampler), mask)}
    if batch.ref_log_probs is not None:
        kl = masked_sum(own - batch.ref_log_probs, mask)
        metrics["kl/reference_token"] = kl
        metrics["kl/reference"] = Weighted(kl.sum, count(mask.any(1)))
    weights = importance_weights(own, sampler, mask, config)
    return own if config.recompute_log_probs else sampler, weights, metrics


def importance_weights(log_probs: Array, sampler: Array, mask: Array, config: RolloutConfig) -> Array | None:
    """Truncated importance weights [B, T] as the config asks for them; None where it asks for none."""
    if config.importance_sampling is None:
        return None
    return truncated_importance_weights(
        log_probs,
        sampler,
        mask,
        level=config.importance_sampling,
        maximum=config.importance_sampling_cap,
    )


def kl_metrics(kl: np.ndarray, mask: np.ndarray) -> Metrics:
    """The policy's KL to its reference: nats a completion, and nats a token."""
    return {
        "kl/reference": float(kl.sum() / max(1, mask.any(1).sum())),
        "kl/reference_token": float(kl.sum() / max(1, mask.sum())),
    }
