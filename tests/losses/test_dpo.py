"""DPO and its variants: values by hand, the start at the reference, invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import dpo_loss

PAIR = tuple(jnp.array([x]) for x in (-4.0, -7.0, -6.0, -5.0))  # c = 2, j = -2, d = 4


def softplus(x):
    return np.log1p(np.exp(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("variant", "knobs", "expected"),
    [
        ("sigmoid", {}, softplus(-2)),
        ("sigmoid", {"label_smoothing": 0.25}, 0.75 * softplus(-2) + 0.25 * softplus(2)),
        ("robust", {"label_smoothing": 0.25}, (0.75 * softplus(-2) - 0.25 * softplus(2)) / 0.5),
        ("hinge", {}, 0),
        ("ipo", {}, (4 - 1) ** 2),
        ("ipo", {"chosen_length": jnp.array([4]), "rejected_length": jnp.array([8])}, (0.5 + 0.25 - 1) ** 2),
        ("apo_zero", {}, 1 - sigmoid(1) + sigmoid(-1)),
        ("sppo", {}, (2 - 1) ** 2 + (-2 + 1) ** 2),
    ],
)
def test_variants_by_hand(variant, knobs, expected):
    loss, metrics = dpo_loss(*PAIR, beta=0.5, variant=variant, **knobs)
    np.testing.assert_allclose(loss.mean, expected, rtol=1e-5)
    means = {name: float(metric.mean) for name, metric in metrics.items() if name != "loss"}
    assert means == {
        "rewards/chosen": 1,
        "rewards/rejected": -1,
        "rewards/margins": 2,
        "rewards/accuracies": 1,
    }


def test_the_default_is_the_sigmoid():
    assert dpo_loss(*PAIR, beta=0.5)[0] == dpo_loss(*PAIR, beta=0.5, variant="sigmoid")[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_with_the_policy_equal_to_the_reference_the_loss_is_log_2(label_smoothing):
    rng = np.random.default_rng(0)
    chosen, rejected = jnp.asarray(-100 * rng.random((2, 6)), jnp.float32)
    loss, metrics = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, label_smoothing=label_smoothing)
    np.testing.assert_allclose(loss.mean, np.log(2), rtol=1e-6)
    assert metrics["rewards/margins"].mean == 0
    assert metrics["rewards/accuracies"].mean == 0  # a tie is wrong


def test_the_reference_gets_no_gradient():
    gradients = jax.grad(lambda *pair: dpo_loss(*pair, beta=0.5)[0].mean, (0, 1, 2, 3))(*PAIR)
    assert [bool((g != 0).all()) for g in gradients] == [True, True, False, False]


def test_apo_zero_of_a_large_reward_keeps_its_digits():
    """1 - sigmoid(20) is 2e-9, but float32 numbers just below 1 are 6e-8 apart."""
    zero, low = jnp.zeros(1), jnp.array([-100.0])

    def loss(chosen):
        return dpo_loss(chosen, low, zero, zero, beta=1.0, variant="apo_zero")[0].mean

    value, gradient = jax.value_and_grad(loss)(jnp.array([20.0]))
    np.testing.assert_allclose(value, np.exp(-20), rtol=1e-5)
    np.testing.assert_allclose(gradient, [-np.exp(-20)], rtol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"variant": "kto"}, "variant='kto' is unknown"),
        ({"variant": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 is not supported by 'hinge'"),
        ({"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 is not supported by 'ipo'"),
        ({"variant": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"variant": "sigmoid", "label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"variant": "ipo", "chosen_length": jnp.array([3])}, "rejected_length is missing"),
        ({"variant": "ipo", "rejected_length": jnp.array([3])}, "chosen_length is missing"),
    ],
)
def test_invalid_arguments_are_errors(knobs, complaint):
    with pytest.raises(ValueError, match=complaint):
        dpo_loss(*PAIR, beta=0.5, **knobs)
