"""GRPO and its variants: weights by hand, what each term adds, invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import grpo_loss

LOG_PROBS = jnp.array([[-1.0, -2.0, -1.0, -1.0], [-3.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
ADVANTAGES = jnp.array([2.0, -1.0, 5.0])
MASK = jnp.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])  # a hole, one token, no token
RATIO = np.array([[0.5, 1.0, 9.0, 2.0], [0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])


def loss_of(variant, ratio=None, clip_low=0.2, clip_high=0.3, **knobs):
    old = LOG_PROBS - jnp.log(jnp.ones_like(LOG_PROBS) if ratio is None else ratio)
    knobs = {"variant": variant, "clip_low": clip_low, "clip_high": clip_high} | knobs
    return grpo_loss(LOG_PROBS, old, ADVANTAGES, MASK, **knobs)


@pytest.mark.parametrize(
    ("variant", "total", "weight"),
    [
        ("grpo", -(0.5 + 1 + 1.3) * 2 / 3 + 0.8, 2),
        ("dr_grpo", -(0.5 + 1 + 1.3) * 2 + 0.8, 3 * 6),
        ("dapo", -(0.5 + 1 + 1.3) * 2 + 0.8, 4),
        ("gspo", -1 * 2 + 0.8, 2),  # the geometric mean of 0.5, 1 and 2 is 1
        ("cispo", -2 * (0.5 * -1 + 1 * -2 + 1.3 * -1) + 0.5 * -3, 4),  # min(ratio, clip_high) A log_probs
    ],
)
def test_variants_by_hand(variant, total, weight):
    knobs = {"clip_high": 1.3} if variant == "cispo" else {}
    loss, metrics = loss_of(variant, RATIO, max_length=6, **knobs)
    np.testing.assert_allclose(loss, (total, weight), rtol=1e-6)
    low, high = {"gspo": (1, 0), "cispo": (0, 1)}.get(variant, (1, 1))
    assert metrics["clip_fraction_low"] == (low, 4)
    assert metrics["clip_fraction_high"] == (high, 4)
    assert metrics["clip_fraction"] == (low + high, 4)
    np.testing.assert_allclose(metrics["ratio"].mean, 3.5 / 4 if variant == "gspo" else 1, rtol=1e-6)


def test_the_first_update_has_ratio_one_and_the_plain_gradient():
    """Where policy and old policy agree, every clipped variant is advantage times score."""
    for variant in ("grpo", "dapo", "gspo"):
        gradient = jax.grad(
            lambda x, variant=variant: (
                grpo_loss(x, LOG_PROBS, ADVANTAGES, MASK, variant=variant, clip_low=0.2, clip_high=0.2)[
                    0
                ].mean
            )
        )(LOG_PROBS)
        weights = MASK / 4 if variant == "dapo" else MASK / np.array([[3], [1], [1]]) / 2
        np.testing.assert_allclose(gradient, -ADVANTAGES[:, None] * weights, rtol=1e-6)


def test_every_term_shares_the_mode():
    """A KL and an entropy of 1 per token change GRPO's mean by their coefficients, whatever the lengths."""
    reference = LOG_PROBS - 1
    plain, _ = loss_of("grpo")
    loss, metrics = loss_of(
        "grpo",
        ref_log_probs=reference,
        kl_estimator="k1",
        kl_coefficient=0.5,
        entropy=jnp.ones_like(LOG_PROBS),
        entropy_coefficient=0.25,
    )
    np.testing.assert_allclose(loss.mean - plain.mean, 0.5 - 0.25, rtol=1e-6)
    assert loss.weight == plain.weight
    np.testing.assert_allclose([metrics["kl"].mean, metrics["entropy"].mean], [1, 1], rtol=1e-6)


def test_the_weighted_kl_has_the_gradient_of_the_kl():
    """On-policy, in expectation over a policy of three tokens: sum p grad(log p) (log p - log q)."""
    logits, reference = jnp.array([0.3, -0.2, 0.9]), jax.nn.log_softmax(jnp.array([0.0, 1.0, -1.0]))

    def expected_kl_loss(logits, weighted):
        knobs = {"variant": "dapo", "clip_low": 0.2, "clip_high": 0.2, "kl_coefficient": 1.0}

        def of_one_completion(*log_probs):
            policy, old, reference = (x[None, None] for x in log_probs)
            return grpo_loss(
                policy,
                old,
                jnp.zeros(1),
                jnp.ones((1, 1)),
                ref_log_probs=reference,
                kl_importance_weighted=weighted,
                **knobs,
            )[0].sum

        log_probs = jax.nn.log_softmax(logits)
        old = jax.lax.stop_gradient(log_probs)
        return jnp.exp(old) @ jax.vmap(of_one_completion)(log_probs, old, reference)

    def kl(logits):
        log_probs = jax.nn.log_softmax(logits)
        return (jnp.exp(log_probs) * (log_probs - reference)).sum()

    truth = jax.grad(kl)(logits)
    np.testing.assert_allclose(jax.grad(expected_kl_loss)(logits, True), truth, rtol=1e-4)
    assert jnp.abs(jax.grad(expected_kl_loss)(logits, False) - truth).max() > 0.1


def test_metrics_of_absent_terms_are_absent():
    assert not {"kl", "entropy"} & loss_of("grpo")[1].keys()
    zero = loss_of("grpo", ref_log_probs=LOG_PROBS, entropy=jnp.ones_like(LOG_PROBS))
    assert {"kl", "entropy"} <= zero[1].keys()  # measured, though the coefficients are 0
    assert zero[0] == loss_of("grpo")[0]


def test_only_policy_and_entropy_get_a_gradient():
    names = ["log_probs", "old_log_probs", "advantages", "ref_log_probs", "importance_weights", "entropy"]
    arrays = dict.fromkeys(names, LOG_PROBS) | {"advantages": ADVANTAGES, "ref_log_probs": LOG_PROBS - 1}

    def total(arrays):
        knobs = {"clip_low": 0.2, "clip_high": 0.3, "kl_coefficient": 0.5, "entropy_coefficient": 0.5}
        return grpo_loss(**arrays, mask=MASK, variant="grpo", **knobs)[0].sum

    gradients = jax.grad(total)(arrays)
    assert {name for name, g in gradients.items() if (g != 0).any()} == {"log_probs", "entropy"}


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"variant": "reinforce"}, "variant='reinforce' is unknown"),
        ({"variant": "dr_grpo"}, "max_length"),
        ({"variant": "cispo", "dual_clip": 3.0}, "dual_clip=3.0 is not supported"),
        ({"variant": "grpo", "dual_clip": 0.5}, "dual_clip=0.5 must be above 1"),
        ({"variant": "grpo", "kl_coefficient": 0.1}, "kl_coefficient=0.1 needs ref_log_probs"),
        ({"variant": "grpo", "entropy_coefficient": 0.1}, "entropy_coefficient=0.1 needs entropy"),
        (
            {"variant": "grpo", "ref_log_probs": LOG_PROBS, "kl_estimator": "k9"},
            "estimator='k9' is unknown",
        ),
    ],
)
def test_invalid_arguments_are_errors(knobs, complaint):
    with pytest.raises(ValueError, match=complaint):
        loss_of(**knobs)
