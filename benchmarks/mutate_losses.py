"""Break each loss in a plausible way and check that its tests fail.

    python benchmarks/mutate_losses.py [NAME ...]      # all, or those whose name contains one of these

Each mutation is one replacement in a copy of the tree. A test run that stays green is a gap in the tests and
makes the script exit with 1. The tests named here must pass without a mutation.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "jaxllm",
    "tests/conftest.py",
    "tests/tiny_runs.py",
    "tests/losses",
    "docs/losses.md",
    "pyproject.toml",
)


class Mutation(NamedTuple):
    name: str  # the public function, and the fault put into it
    module: str
    before: str
    after: str
    tests: str  # a file of tests/losses, with or without :: and what -k selects


MUTATIONS = [
    Mutation("Weighted: weights are not added", "aggregate",
             "self.weight + other.weight", "self.weight", "test_aggregate"),
    Mutation("Weighted: an empty mean is NaN", "aggregate",
             "jnp.where(empty, 1.0, self.weight)", "self.weight", "test_aggregate"),
    Mutation("aggregate: empty sequences count", "aggregate",
             "sequences = count(counts)", "sequences = jnp.float32(len(values))", "test_aggregate"),
    Mutation("aggregate: constant counts rows with a token only", "aggregate",
             "jnp.float32(len(values) * max_length)", "sequences * max_length", "test_aggregate"),
    Mutation("masked_mean: the rounding of the mean stays", "aggregate",
             "return mean + zero_masked(x - mean, mask).sum() / number", "return mean", "test_aggregate"),
    Mutation("masked_variance: n for n - 1", "aggregate",
             "jnp.maximum(count(mask) - 1, 1)", "jnp.maximum(count(mask), 1)", "test_aggregate"),
    Mutation("whiten: garbage reaches the gradient", "aggregate",
             "(zero_masked(x, mask) - mean) *", "(x - mean) *", "test_aggregate"),
    Mutation("whiten: the mean is not added back", "aggregate",
             "else whitened + mean", "else whitened", "test_aggregate"),
    Mutation("add_auxiliary: the weight of the loss is left out", "aggregate",
             "for term in aux.values()) * loss.weight", "for term in aux.values())",
             "test_aggregate::auxiliary"),
    Mutation("add_auxiliary: the sum for the mean", "aggregate",
             "sum(term.mean for", "sum(term.sum for", "test_aggregate::auxiliary"),
    Mutation("add_auxiliary: no gradient", "aggregate",
             "total = loss.sum + sum(term.mean", "total = loss.sum + sum(jax.lax.stop_gradient(term.mean)",
             "test_aggregate::auxiliary"),
    Mutation("add_auxiliary: metrics have a gradient", "aggregate",
             "metrics | jax.lax.stop_gradient(dict(aux))", "metrics | dict(aux)",
             "test_aggregate::auxiliary"),
    Mutation("token_log_probs: temperature multiplies", "language_model",
             "logits.astype(jnp.float32), targets, temperature=temperature)",
             "logits.astype(jnp.float32), targets, temperature=1 / temperature)",
             "test_language_model"),
    Mutation("token_log_probs: a negative target wraps", "language_model",
             "target=jnp.where(inside, target, -jnp.inf)", "target=target", "test_language_model"),
    Mutation("token_log_probs: the target minus the whole logsumexp", "language_model",
             "return (statistics.target - statistics.top) / temperature - statistics.log_sum",
             "return statistics.target / temperature - (statistics.top / temperature + statistics.log_sum)",
             "test_large_logits::dense or linear_values"),
    Mutation("token_log_probs: temperature before the maximum", "language_model",
             "x = (logits - top[..., None]) / temperature\n    log_sum",
             "x = logits / temperature - (top / temperature)[..., None]\n    log_sum",
             "test_large_logits::dense"),
    Mutation("token_entropy: a banned token is NaN", "language_model",
             "jnp.maximum(logits.astype(jnp.float32), -1e30)", "logits.astype(jnp.float32)",
             "test_language_model"),
    Mutation("token_entropy: log p from the whole logsumexp", "language_model",
             "log_p = x - log_sum[..., None]",
             "log_p = logits / temperature - (top[..., None] / temperature + log_sum[..., None])",
             "test_large_logits::dense"),
    Mutation("cross_entropy: smoothing adds to the whole nll", "language_model",
             "(1 - label_smoothing) * nll + ", "nll + ", "test_language_model"),
    Mutation("cross_entropy: garbage is multiplied away", "language_model",
             "logits, targets = zero_masked(logits, mask[..., None])",
             "logits, targets = logits * mask[..., None]",
             "test_contract::cross_entropy"),
    Mutation("cross_entropy: an untrained head is accurate", "language_model",
             " & (mean < 0)", "", "test_language_model"),
    Mutation("cross_entropy: the mean logit is rounded at the level of the logits", "language_model",
             "mean=x.sum(-1) / columns", "mean=logits.sum(-1) / columns - top", "test_large_logits"),
    Mutation("cross_entropy: the z-loss leaves the level out", "language_model",
             "z_loss * (top / temperature + log_sum) ** 2", "z_loss * log_sum**2",
             "test_large_logits::terms"),
    Mutation("linear_token_log_probs: temperature left out of the gradient", "linear_head",
             "d_logits = d_x / options.divisor", "d_logits = d_x", "test_linear_head::equal"),
    Mutation("linear_token_log_probs: softcap left out of the gradient", "linear_head",
             "d_logits = d_logits * (1 - tanh**2) / options.softcap", "d_logits = d_logits / options.softcap",
             "test_linear_head::equal"),
    Mutation("linear_token_log_probs: the gradient's softmax from the whole logsumexp", "linear_head",
             "log_p = x - log_sum[..., None]",
             "log_p = logits / options.divisor - (top / options.divisor + log_sum)[..., None]",
             "test_large_logits::linear_values"),
    Mutation("linear_token_log_probs: slices are merged by the whole logsumexp", "linear_head",
             "log_sum = jnp.logaddexp(a.log_sum + a_shift, b.log_sum + b_shift)",
             "log_sum = jnp.logaddexp(a.log_sum + a.top / temperature, b.log_sum + b.top / temperature)"
             " - top / temperature",
             "test_large_logits::linear_values"),
    Mutation("linear_token_log_probs: slices' entropies are averaged", "linear_head",
             "jnp.exp(-a_nll) * (a_nll + a.entropy)", "jnp.exp(-a_nll) * a.entropy",
             "test_linear_head::equal"),
    Mutation("linear_cross_entropy: slices' means are not weighted by their columns", "linear_head",
             "(a.columns * (a.mean + a_shift) + b.columns * (b.mean + b_shift)) / columns",
             "(a.mean + a_shift + b.mean + b_shift) / 2", "test_linear_head::equals"),
    Mutation("linear_cross_entropy: the columns that remain are one off", "linear_head",
             "jnp.where(in_remainder, targets - n * width,",
             "jnp.where(in_remainder, targets - n * width - 1,",
             "test_linear_head::equal"),
    Mutation("linear_cross_entropy: never cut", "linear_head",
             "return vocab_size if slices <= 1 else", "return vocab_size if slices else", "test_linear_head"),
    Mutation("linear_cross_entropy: columns that remain are added to a slice", "linear_head",
             "n = head.shape[1] // width", "n = max(head.shape[1] // width - 1, 1)",
             "test_linear_head::equal"),
    Mutation("linear_cross_entropy: slices of neighboring columns", "linear_head",
             "jnp.moveaxis(even.reshape(len(head), width, n), 2, 0)",
             "jnp.moveaxis(even.reshape(len(head), n, width), 1, 0)", "test_linear_head::mesh"),
    Mutation("linear_cross_entropy: the head's gradient stays on its device", "linear_head",
             "return x[:0].sum()", "return jnp.zeros((), x.dtype)", "test_contract::devices and linear"),
    Mutation("linear_cross_entropy: products accumulate in bfloat16", "linear_head",
             "logits = jnp.dot(_rows(hidden), head, preferred_element_type=jnp.float32)",
             "logits = jnp.dot(_rows(hidden), head).astype(jnp.float32)",
             "test_contract::bfloat16 and linear"),
    Mutation("linear_cross_entropy: the backward pass has a softmax in bfloat16", "linear_head",
             "jnp.exp(log_p) * d_log_sum", "jnp.exp(log_p.astype(jnp.bfloat16)) * d_log_sum",
             "test_linear_head::accurate"),
    Mutation("bradley_terry_loss: the margin is added", "reward_model",
             "difference - zero_masked(", "difference + zero_masked(", "test_reward_model"),
    Mutation("bradley_terry_loss: a tie is right", "reward_model",
             "chosen > rejected", "chosen >= rejected", "test_reward_model"),
    Mutation("dpo_loss: robust smooths the other way", "dpo",
             "per_pair = -unbiased", "per_pair = unbiased", "test_dpo"),
    Mutation("dpo_loss: the reference has a gradient", "dpo",
             "jax.lax.stop_gradient(zero_masked(ref_log_probs, mask))", "zero_masked(ref_log_probs, mask)",
             "test_dpo"),
    Mutation("dpo_loss: ipo ignores lengths", "dpo",
             "if chosen_length is not None and rejected_length is not None:", "if False:", "test_dpo"),
    Mutation("dpo_loss: apo_zero loses digits", "dpo",
             "sigmoid(-reward_chosen) +", "1 - sigmoid(reward_chosen) +", "test_dpo"),
    Mutation("kl_penalty: k3 by exp", "kl", "jnp.expm1(-x) + x", "jnp.exp(-x) - 1 + x", "test_kl"),
    Mutation("kl_penalty: no clamp", "kl", "x = jnp.maximum(x, -20)", "x = x", "test_kl"),
    Mutation("adaptive_kl_coefficient: no clip", "kl", ", -0.2, 0.2)\n", ", -9.0, 9.0)\n", "test_kl"),
    Mutation("generalized_advantage_estimation: values of masked positions leak", "advantages",
             "jnp.where(counts, value, next_value)", "value", "test_advantages"),
    Mutation("generalized_advantage_estimation: the scan starts from fresh zeros", "advantages",
             "return x[:, :0].sum(axis=1)", "return jnp.zeros(len(x))", "test_contract::rows"),
    Mutation("discounted_returns: a hole is discounted", "advantages",
             "reward + discount * following, following)",
             "reward + discount * following, discount * following)",
             "test_advantages"),
    Mutation("token_rewards: the score is at the first token", "advantages",
             "jnp.cumsum(counted[:, ::-1], axis=1)[:, ::-1]", "jnp.cumsum(counted, axis=1)",
             "test_advantages"),
    Mutation("group_relative_advantages: not shifted", "advantages",
             "groups - jax.lax.stop_gradient(best)", "groups", "test_advantages"),
    Mutation("group_relative_advantages: rewards keep their type", "advantages",
             "groups = rewards.astype(jnp.float32)", "groups = rewards.astype(jnp.int32)", "test_advantages"),
    Mutation("group_relative_advantages: invalid rows count", "advantages",
             "deviations / (std + epsilon), 0)",
             "deviations / (std + epsilon) * count(valid_groups) / valid.size, 0)",
             "test_advantages"),
    Mutation("leave_one_out_advantages: n for n - 1", "advantages",
             "groups) / jnp.maximum(number - 1, 1)", "groups) / number", "test_advantages"),
    Mutation("leave_one_out_advantages: invalid rows get an advantage", "advantages",
             "zero_masked(groups - others, valid_groups)", "(groups - others)", "test_advantages"),
    Mutation("overlong_penalty: over the limit", "advantages", "/ buffer, -1, 0)", "/ limit, -1, 0)",
             "test_advantages"),
    Mutation("ppo_policy_loss: max for min", "ppo",
             "-jnp.minimum(ratio * advantages", "-jnp.maximum(ratio * advantages", "test_ppo"),
    Mutation("ppo_policy_loss: one clip for both sides", "ppo",
             "jnp.clip(ratio, 1 - clip_low, 1 + clip_high)", "jnp.clip(ratio, 1 - clip_low, 1 + clip_low)",
             "test_ppo"),
    Mutation("ppo_policy_loss: the dual clip applies to positive advantages too", "ppo",
             "jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)",
             "jnp.minimum(loss, -dual_clip * advantages)", "test_ppo"),
    Mutation("ppo_policy_loss: no clamp", "ppo",
             "jnp.exp(jnp.clip(log_ratio, -20, 20))", "jnp.exp(log_ratio)", "test_ppo"),
    Mutation("ppo_value_loss: min for max", "ppo",
             "jnp.maximum(squared, clipped_squared)", "jnp.minimum(squared, clipped_squared)", "test_ppo"),
    Mutation("ppo_value_loss: a clip of 0 is none", "ppo", "if clip is not None:", "if clip:", "test_ppo"),
    Mutation("truncated_importance_weights: the mean for the sum", "ppo",
             "difference.sum(1, keepdims=True)", "difference.mean(1, keepdims=True)", "test_ppo"),
    Mutation("truncated_importance_weights: with gradient", "ppo",
             "difference = constant(old_log_probs, mask)", "difference = zero_masked(old_log_probs, mask)",
             "test_ppo"),
    Mutation("grpo_loss: dapo by sequence", "grpo", '"dapo": "token_mean"', '"dapo": "sequence_mean"',
             "test_grpo"),
    Mutation("grpo_loss: gspo by the sum", "grpo",
             "log_ratio.sum(1, keepdims=True) / tokens", "log_ratio.sum(1, keepdims=True)", "test_grpo"),
    Mutation("grpo_loss: cispo's weight has a gradient", "grpo",
             "jax.lax.stop_gradient(jnp.minimum(ratio, clip_high))", "jnp.minimum(ratio, clip_high)",
             "test_contract::cispo"),
    Mutation("grpo_loss: the KL's weight is a constant", "grpo",
             'ratio * extra["kl"]', 'jax.lax.stop_gradient(ratio) * extra["kl"]', "test_grpo"),
    Mutation("grpo_loss: the entropy is penalized", "grpo",
             "per_token - entropy_coefficient", "per_token + entropy_coefficient", "test_grpo"),
    Mutation("grpo_loss: importance weights have a gradient", "grpo",
             "constant(importance_weights, mask)", "zero_masked(importance_weights, mask)", "test_grpo"),
]  # fmt: skip


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)


def failing_tests(tree: Path, tests: str) -> list[str]:
    """The names of tests that fail, at most three; ["?"] where pytest itself did."""
    file, _, selected = tests.partition("::")
    command = [sys.executable, "-m", "pytest", f"tests/losses/{file}.py", "-q", "--tb=no", "--maxfail=3"]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    }
    command += ["-k", selected] if selected else []
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return re.findall(r"^FAILED \S+?::(\S+)", run.stdout, flags=re.MULTILINE) or ["?"] * (run.returncode != 0)


def main() -> None:
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or any(name in m.name for name in sys.argv[1:])]
    green = 0
    for mutation in wanted:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            copy_tree(tree)
            file = tree / "jaxllm" / "losses" / f"{mutation.module}.py"
            text = file.read_text()
            assert text.count(mutation.before) == 1, f"{mutation.name}: {text.count(mutation.before)} places"
            file.write_text(text.replace(mutation.before, mutation.after))
            failed = failing_tests(tree, mutation.tests)
        green += not failed
        print(f"{'red  ' if failed else 'GREEN'}  {mutation.name}: {', '.join(failed)}", flush=True)
    print(f"{len(wanted) - green} of {len(wanted)} mutations were noticed")
    sys.exit(1 if green else 0)


if __name__ == "__main__":
    main()
