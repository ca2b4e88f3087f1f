"""Per-token estimates of the KL divergence of the policy from its reference, and a KL controller."""

import chex
import jax
import jax.numpy as jnp

from jaxllm.losses.aggregate import Array

ESTIMATORS = ("k1", "k2", "k3")


def kl_penalty(log_probs: Array, ref_log_probs: Array, *, estimator: str) -> jax.Array:
    """Estimate KL(policy || reference) at each token, float32 [B, T], in nats.

    The tokens must be the policy's own samples. With x = log_probs - ref_log_probs (Schulman 2020,
    "Approximating KL divergence"):

    - `"k1"`: x. Unbiased, of high variance, sometimes negative. For a KL penalty inside the reward; as a loss
      term it has no effect, since its gradient is zero in expectation.
    - `"k2"`: x^2 / 2. Biased, never negative; its gradient is an unbiased estimate of the gradient of the KL.
    - `"k3"`: expm1(-x) + x. Unbiased, never negative, of low variance: the value to monitor, and GRPO's loss
      term (Shao et al. 2024, arXiv:2402.03300). Its gradient is an estimate of that of this KL only when
      multiplied by the ratio (see `kl_importance_weighted` of `grpo_loss`).

    In k3, x is clamped below at -20, with zero gradient beyond, so that a token that has become very unlikely
    under the policy cannot overflow; TRL does not clamp. The reference is a constant.

    Args:
      log_probs: [B, T], nats.
      ref_log_probs: [B, T], nats.
      estimator: one of the three above.

    Raises:
      ValueError: an unknown estimator.

    >>> import jax.numpy as jnp
    >>> log_probs = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> ref_log_probs = jnp.log(jnp.array([[0.5, 0.25]]))
    >>> kl_penalty(log_probs, ref_log_probs, estimator="k3")[0].tolist()  # 0 and log 2 - 1/2
    [0.0, 0.1931471824645996]
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    ref_log_probs = jax.lax.stop_gradient(ref_log_probs.astype(jnp.float32))
    x = jnp.asarray(log_probs, jnp.float32) - ref_log_probs
    match estimator:
        case "k1":
            return x
        case "k2":
            return x**2 / 2
        case "k3":
            x = jnp.maximum(x, -20)
            return jnp.maximum(jnp.expm1(-x) + x, 0)  # near 0 rounding may make it negative
        case _:
            raise ValueError(f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")


def adaptive_kl_coefficient(
    coefficient: Array | float, kl: Array | float, *, target: float, horizon: float, num_samples: int
) -> jax.Array:
    """The next step's coefficient: coefficient (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon).

    A proportional controller in log space (Ziegler et al. 2019, arXiv:1909.08593). One call changes the
    coefficient by a factor between 1 - 0.2 num_samples / horizon and 1 + 0.2 num_samples / horizon. These
    compound to about e^-0.2 and e^0.2 (-18% and +22%) over `horizon` samples, if num_samples is small against
    horizon.

    Args:
      coefficient: scalar, the coefficient of the last step.
      kl: scalar, nats, measured in that step: summed over a sequence or averaged over tokens, as target is.
      target: nats, the KL to keep.
      horizon: samples over which the coefficient changes by a factor of about e^0.2 at most.
      num_samples: samples of the last step.

    >>> float(adaptive_kl_coefficient(0.1, 12.0, target=6.0, horizon=1000, num_samples=100).round(4))
    0.10199999809265137
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1, -0.2, 0.2)
    return jnp.asarray(coefficient * (1 + error * num_samples / horizon))
