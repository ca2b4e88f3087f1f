"""GRPO on a rollout with one update: the step's own log-probs stand for those of a scoring before it."""

import functools

import jax
import numpy as np
import pytest
from test_rows_without_gradient import make_batch
from tiny_runs import parse_config

from jaxllm.errors import NumericsError
from jaxllm.rl.rollouts import Rollout, check_first_update
from jaxllm.stages import build_program, grpo
from jaxllm.training.metrics import to_scalars

B, T = 16, 32
FIELDS = {
    "data.sequence_length": T,
    "rollout.num_prompts": 4,
    "rollout.group_size": 4,
    "rollout.num_minibatches": 1,
    "rollout.sampling.max_new_tokens": 16,
    "rollout.importance_sampling": "token",
    "objective.kl_coefficient": 0.1,
    "model.num_layers": 1,
    "mesh.data": 1,
}


def make_rollout():
    """Completions whose sampler was a little off."""
    batch, nothing = make_batch(), Rollout(**dict.fromkeys(Rollout._fields))
    return nothing._replace(
        tokens=batch.tokens,
        mask=batch.mask,
        sampler_log_probs=batch.old_log_probs,
        rewards=np.random.default_rng(1).normal(size=B).astype(np.float32),
        prompts=[],
    )


@functools.cache
def prepared(variant):
    """The algorithm with a reference that is not the policy, and the policy's state."""
    fields = FIELDS | {"objective.variant": variant}
    program = build_program(parse_config("grpo_problems.py:tiny", fields), jax.devices()[:1])
    policy, reference = (program.init(jax.random.key(seed)) for seed in (0, 1))
    return program, grpo.GRPO(program, reference.params), policy._replace(step=jax.numpy.int32(1))


@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_loss_gradient_and_metrics_are_those_of_the_scored_path(variant, monkeypatch):
    program, algorithm, state = prepared(variant)
    rollout, loss_fn = make_rollout(), program.train_step.keywords["loss_fn"]
    calls, score = [], algorithm.log_probs.score

    def counted(*args):
        calls.append(args)
        return score(*args)

    monkeypatch.setattr(algorithm.log_probs, "score", counted)
    batch, row = algorithm.make_batch(state, rollout)
    assert not row
    assert len(calls) == 1  # by the reference
    assert (batch.old_log_probs, batch.importance_weights) == (None, None)
    monkeypatch.setattr(grpo, "is_trained_on_once", lambda config: False)
    scored, scored_row = algorithm.make_batch(state, rollout)
    assert scored.importance_weights.max() > 1

    step = jax.jit(
        jax.value_and_grad(lambda *x: (lambda loss, m: (loss.mean, m))(*loss_fn(*x, None)), has_aux=True)
    )
    (loss, metrics), grads = step(state.params, batch)
    (expected, scored_metrics), scored_grads = step(state.params, scored)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, scored_grads)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(grads)) > 1e-4
    found, wanted = to_scalars(metrics, "train"), to_scalars(scored_metrics, "train") | scored_row
    assert found.pop("policy/ratio") == pytest.approx(1, abs=1e-6)
    assert wanted.keys() - found.keys() == {"sampler/log_prob_difference_max", "policy/ratio"}
    for name, value in found.items():
        assert value == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"rollout.recompute_log_probs": False, "rollout.importance_sampling": None}, True),
        ({"rollout.epochs": 2}, False),
        ({"rollout.num_minibatches": 2}, False),
        ({"objective.kl_in": "reward"}, False),
        ({"objective.kl_in": "reward", "objective.kl_coefficient": 0.0}, True),
    ],
)
def test_only_rollouts_with_one_update_and_no_kl_in_the_reward_are_not_scored(fields, expected):
    config = parse_config("grpo_problems.py:tiny", FIELDS | fields)
    assert grpo.is_trained_on_once(config) == expected
    shapes = grpo.batch_shapes(config)
    assert (shapes.old_log_probs is None) == (shapes.sampler_log_probs is not None) == expected


def test_a_kl_before_the_first_update_ends_the_run():
    row = {"policy/ratio": 1.0, "kl/reference_token": 0.1}
    check_first_update(row, 2)
    check_first_update(row | {"kl/reference_token": 1e-4}, 1)
    with pytest.raises(NumericsError, match=r"kl/reference_token=0.1, which must be 0"):
        check_first_update(row, 1)
