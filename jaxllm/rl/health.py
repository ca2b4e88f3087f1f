"""What is going wrong in reinforcement learning, in words."""

from collections.abc import Iterator, Mapping

MOST = 0.5  # of groups, or of answers
KL_OF_ONE_ROLLOUT = (
    0.1  # nats a token between the policy that sampled and the one its updates made; 0.02 is usual
)
KL_TO_REFERENCE = 0.5  # nats a token
ENTROPY_LEFT, ENTROPY_GROWN = 0.1, 3.0  # of what the run began with
LENGTH_GROWN = 2.0


class Health:
    """Looks at every rollout's metrics, and says what is wrong when it begins to be."""

    def __init__(self, log_prob_difference_limit: float):
        """`log_prob_difference_limit` is between sampler and trainer, in nats a token."""
        self.log_prob_difference_limit = log_prob_difference_limit
        self.first: dict[str, float] = {}  # metrics of the run's first rollout; belongs into its checkpoints
        self.present: set[str] = set()

    def lines(self, row: Mapping[str, float]) -> list[str]:
        """One line for each thing that is wrong now and was not at the rollout before."""
        if not self.first:
            names = ("reward/mean", "completion/mean_length", "policy/entropy")
            self.first = {name: row[name] for name in names if name in row}
        found = dict(self.faults(row))
        new = [line for fault, line in found.items() if fault not in self.present]
        self.present = set(found)
        return new

    def faults(self, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """What is wrong: a name and a line for each."""
        first = self.first
        if (failed := row.get("reward/failed_fraction", 0.0)) > MOST:
            yield (
                "failing rewards",
                f"{failed:.0%} of the calls of reward.functions failed or took too long (see what they said, "
                f"above) and were paid reward.error_reward",
            )
        elif (share := row.get("reward/zero_std_fraction", 0.0)) > MOST:
            yield (
                "equal rewards",
                f"{share:.0%} of the groups have equal rewards, and so teach nothing: give prompts that are "
                f"sometimes answered rightly, or raise rollout.group_size or rollout.max_resamples",
            )
        if (share := row["completion/truncated_fraction"]) > MOST:
            yield (
                "truncated",
                f"{share:.0%} of the answers did not end: raise rollout.sampling.max_new_tokens (and "
                f"data.sequence_length), or lower reward.missing_eos_penalty to teach ending",
            )
        if (gap := row.get("sampler/log_prob_difference_mean", 0.0)) > self.log_prob_difference_limit:
            yield (
                "difference",
                f"sampler and trainer disagree by {gap:.2g} nats a token, over rollout.log_prob_difference_limit="
                f"{self.log_prob_difference_limit}: set rollout.importance_sampling=token, or rollout.dtype to the trainer's",
            )
        if (kl := row.get("policy/approx_kl", 0.0)) > KL_OF_ONE_ROLLOUT:
            yield (
                "update too large",
                f"the updates on one rollout moved the policy by {kl:.2g} nats a token: lower "
                f"optimizer.learning_rate, rollout.epochs or rollout.num_minibatches",
            )
        if (kl := row.get("kl/reference_token", 0.0)) > KL_TO_REFERENCE:
            yield (
                "far from reference",
                f"the policy is {kl:.2g} nats a token away from its reference: raise "
                f"objective.kl_coefficient, or lower optimizer.learning_rate",
            )
        entropy, before = row.get("policy/entropy"), first.get("policy/entropy", 0.0)
        if entropy is not None and entropy < ENTROPY_LEFT * before:
            yield (
                "entropy falls",
                f"entropy fell from {before:.2g} to {entropy:.2g} nats a token, the policy hardly explores: "
                f"raise objective.entropy_coefficient or objective.clip_high, or stop here",
            )
        if entropy is not None and entropy > max(1.0, ENTROPY_GROWN * before):
            yield (
                "entropy grows",
                f"entropy grew from {before:.2g} to {entropy:.2g} nats a token, the policy babbles: lower "
                f"optimizer.learning_rate or objective.entropy_coefficient",
            )
        length, before = row["completion/mean_length"], first["completion/mean_length"]
        if row["reward/mean"] > first["reward/mean"] and length > LENGTH_GROWN * before:
            yield (
                "length",
                f"the reward rises while answers grow from {before:.0f} to {length:.0f} tokens: read some in "
                f"samples/, the reward may pay for length; reward.overlong_buffer makes it cost",
            )
