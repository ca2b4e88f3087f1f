"""The losses as pure functions of arrays, built on jax alone. One file per idea, one flat namespace."""

from jaxllm.losses.advantages import (
    discounted_returns,
    generalized_advantage_estimation,
    group_relative_advantages,
    leave_one_out_advantages,
    overlong_penalty,
    token_rewards,
)
from jaxllm.losses.aggregate import (
    Weighted,
    add_auxiliary,
    aggregate,
    masked_mean,
    masked_variance,
    whiten,
)
from jaxllm.losses.dpo import dpo_loss
from jaxllm.losses.grpo import grpo_loss
from jaxllm.losses.kl import adaptive_kl_coefficient, kl_penalty
from jaxllm.losses.language_model import cross_entropy, token_entropy, token_log_probs
from jaxllm.losses.linear_head import linear_cross_entropy, linear_token_log_probs
from jaxllm.losses.ppo import ppo_policy_loss, ppo_value_loss, truncated_importance_weights
from jaxllm.losses.reward_model import bradley_terry_loss

__all__ = [
    "Weighted",
    "adaptive_kl_coefficient",
    "add_auxiliary",
    "aggregate",
    "bradley_terry_loss",
    "cross_entropy",
    "discounted_returns",
    "dpo_loss",
    "generalized_advantage_estimation",
    "group_relative_advantages",
    "grpo_loss",
    "kl_penalty",
    "leave_one_out_advantages",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "masked_mean",
    "masked_variance",
    "overlong_penalty",
    "ppo_policy_loss",
    "ppo_value_loss",
    "token_entropy",
    "token_log_probs",
    "token_rewards",
    "truncated_importance_weights",
    "whiten",
]
