r"""PPO against a reward model. The size is that of the model it is initialized from.

    python experiments/train.py --config=configs/ppo_preferences.py:1m --workdir=runs/preferred \
        --init_from=runs/sft --config.reward.model=runs/reward

Rows have a `prompt` or `messages`, or are the pairs that the reward model was trained on.
"""

from ml_collections import ConfigDict, config_dict

from configs.base import reinforcement


def get_config(size: str = "1m") -> ConfigDict:
    """Every field of a PPO run. The objective's numbers are those of InstructGPT and its open copies."""
    config = reinforcement.base("ppo", size, steps=160, learning_rate=1e-4, max_new_tokens=64)
    config.objective = ConfigDict()
    config.objective.clip = 0.2
    config.objective.value_clip = 0.2
    config.objective.value_coefficient = 0.1
    config.objective.entropy_coefficient = 0.0
    config.objective.discount = 1.0
    config.objective.gae_lambda = 0.95
    config.objective.whiten_advantages = True  # advantages
    config.objective.kl_coefficient = 0.05  # KL penalty: reward per nat to the initial weights
    config.objective.kl_target = config_dict.placeholder(float)  # nats a completion to adapt it to, such as 6
    config.objective.kl_horizon = 2000.0  # completions over which it changes by e^0.2 at most
    config.objective.critic_warmup = 2  # rollouts at the start on which only the critic trains

    config.data.train = ("synthetic:preferences",)
    config.data.sequence_length = 144  # prompt and answer
    config.rollout.num_prompts = 64
    config.rollout.group_size = 1
    config.rollout.epochs = 4
    config.rollout.num_minibatches = 2
    config.reward.model = "runs/reward"
    config.reward.missing_eos_penalty = -1.0
    return config
