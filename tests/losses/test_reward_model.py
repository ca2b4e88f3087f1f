"""Bradley-Terry: values by hand, ties."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.losses import bradley_terry_loss


def test_by_hand():
    loss, metrics = bradley_terry_loss(
        jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0]), margin=jnp.array([1.0, 0.0]), center_coefficient=0.5
    )
    # both pairs are a coin toss: log 2 each; the centering adds 0.5 * (3^2 + 2^2)
    np.testing.assert_allclose(loss, (2 * np.log(2) + 6.5, 2), rtol=1e-6)
    means = {name: float(metric.mean) for name, metric in metrics.items()}
    assert means == {
        "loss": float(loss.mean),
        "accuracy": 0.5,  # the tie is wrong
        "margin": 0.5,
        "chosen_reward": 1.5,
        "rejected_reward": 1.0,
    }


def test_a_coefficient_or_margin_of_zero_equals_none():
    chosen, rejected = jnp.array([1.0, 3.0]), jnp.array([2.0, 0.0])
    plain, _ = bradley_terry_loss(chosen, rejected)
    zeros, _ = bradley_terry_loss(chosen, rejected, margin=0.0, center_coefficient=0.0, mask=jnp.ones(2))
    assert plain == zeros


def test_a_confidently_wrong_pair_stays_finite():
    loss, gradient = jax.value_and_grad(lambda c: bradley_terry_loss(c, -c)[0].mean)(jnp.array([-500.0]))
    assert loss == 1000
    np.testing.assert_array_equal(gradient, [-2])


def test_integer_rewards_become_float():
    loss, _ = bradley_terry_loss(jnp.array([1, 0]), jnp.array([0, 0]))
    np.testing.assert_allclose(loss.sum, np.log1p(np.exp(-1)) + np.log(2), rtol=1e-6)
