"""Warnings about a reinforcement-learning run whose metrics look wrong, each with what to change."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.rewards.pool import Scores

FRACTION_LIMIT = 0.5  # of reward calls, of groups, or of completions
ROLLOUT_KL_LIMIT = 0.1  # nats a token, between the policy before and after its updates; 0.02 is usual
REFERENCE_KL_LIMIT = 0.5  # nats a token
LOW_ENTROPY, HIGH_ENTROPY = 0.1, 3.0  # as a multiple of the entropy at the first rollout
LENGTH_GROWTH = 2.0  # of the mean completion length since the first rollout


class Health:
    """Checks the metrics of every rollout, and reports each fault when it appears."""

    def __init__(self, log_prob_difference_limit: float):
        """`log_prob_difference_limit` is between sampler and trainer, in nats a token."""
        self.log_prob_difference_limit = log_prob_difference_limit
        self.first: dict[str, float] = {}  # metrics of the first rollout of the run; saved in its checkpoints
        self.present: set[str] = set()

    def lines(self, row: Mapping[str, float]) -> list[str]:
        """One line for each fault of this rollout that the previous one did not have."""
        if not self.first:
            names = ("reward/mean", "completion/mean_length", "policy/entropy")
            self.first = {name: row[name] for name in names if name in row}
        found = dict([*self.completion_faults(row), *self.policy_faults(row)])
        new = [line for fault, line in found.items() if fault not in self.present]
        self.present = set(found)
        return new

    def completion_faults(self, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Faults of the rewards and the completions: a name and a line for each."""
        truncated = row["completion/truncated_fraction"]
        if (failed := row.get("reward/failed_fraction", 0.0)) > FRACTION_LIMIT:
            yield (
                "failing rewards",
                f"{failed:.0%} of the calls of reward.functions failed or exceeded reward.time_limit: fix "
                f"what the warnings above name",
            )
        elif truncated <= FRACTION_LIMIT < (left_out := row.get("completion/left_out_fraction", 0.0)):
            yield (
                "no reward",
                f"{left_out:.0%} of the completions have no reward and train nothing, since all of "
                f"reward.functions returned None for them, or a call failed: use rows to which one applies",
            )
        elif (fraction := row.get("reward/zero_std_fraction", 0.0)) > FRACTION_LIMIT:
            yield (
                "equal rewards",
                f"{fraction:.0%} of the groups have equal rewards, and so no advantage: use prompts that the "
                f"policy solves sometimes but not always, or raise rollout.group_size or "
                f"rollout.max_resamples",
            )
        if truncated > FRACTION_LIMIT:
            yield (
                "truncated",
                f"{truncated:.0%} of the completions do not end within rollout.sampling.max_new_tokens: "
                f"raise it (and data.sequence_length), or lower reward.missing_eos_penalty below 0",
            )
        length, before = row["completion/mean_length"], self.first["completion/mean_length"]
        if row["reward/mean"] > self.first["reward/mean"] and length > LENGTH_GROWTH * before:
            yield (
                "length",
                f"the reward rises while completions grow from {before:.0f} to {length:.0f} tokens: look at "
                f"samples/, the reward may favor length; set reward.overlong_buffer to penalize it",
            )

    def policy_faults(self, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Faults of the policy and its updates: a name and a line for each."""
        difference, limit = row.get("sampler/log_prob_difference_mean", 0.0), self.log_prob_difference_limit
        if difference > limit:
            yield (
                "difference",
                f"sampler and trainer disagree by {difference:.2g} nats a token, more than "
                f"rollout.log_prob_difference_limit={limit}: set rollout.importance_sampling=token, or "
                f"rollout.dtype to model.compute_dtype",
            )
        if (kl := row.get("policy/approx_kl", 0.0)) > ROLLOUT_KL_LIMIT:
            yield (
                "update too large",
                f"the updates on one rollout moved the policy by a KL of {kl:.2g} nats a token on average: "
                f"lower optimizer.learning_rate, rollout.epochs or rollout.num_minibatches",
            )
        if (kl := row.get("kl/reference_token", 0.0)) > REFERENCE_KL_LIMIT:
            yield (
                "far from reference",
                f"the KL to the reference is {kl:.2g} nats a token: raise objective.kl_coefficient, or lower "
                f"optimizer.learning_rate",
            )
        entropy, before = row.get("policy/entropy"), self.first.get("policy/entropy", 0.0)
        if entropy is not None and entropy < LOW_ENTROPY * before:
            yield (
                "entropy falls",
                f"entropy fell from {before:.2g} to {entropy:.2g} nats a token, so that the policy hardly "
                f"explores: raise objective.entropy_coefficient or objective.clip_high (GRPO), or stop here",
            )
        if entropy is not None and entropy > max(1.0, HIGH_ENTROPY * before):
            yield (
                "entropy grows",
                f"entropy grew from {before:.2g} to {entropy:.2g} nats a token, so that completions become "
                f"random: lower optimizer.learning_rate or objective.entropy_coefficient",
            )


def unrewarded(scores: Scores, text: str, row: Mapping[str, Any]) -> Iterator[str]:
    """A line for each reward that is 0 for every completion of a rollout, with one of them and its row."""
    for name, values in scores.by_name.items():
        given = values[~np.isnan(values)]
        if len(given) and not given.any() and scores.failures.get(name, 0) < len(values):
            columns = [f"{key}={str(value)[:40]!r}" for key, value in row.items() if key != "prompt"]
            yield (
                f"reward {name!r} gave 0 to all {len(given)} completions of the first rollout, such as "
                f"{text[-80:]!r} for the row {', '.join(columns)}: if that is right, the reward does not "
                f"read it or these columns (data.rename); if it is wrong, train on worked solutions first"
            )
