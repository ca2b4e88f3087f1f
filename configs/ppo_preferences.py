r"""PPO on the rewards of a reward model. The size after the colon is that of the initial model.

    python experiments/train.py --config=configs/ppo_preferences.py:1m --workdir=runs/preferred \
        --init_from=runs/sft --config.reward.model=runs/reward

Measured as `configs/quickstart.py:ppo` (16 rollouts of 128 prompts, 128 updates, 2 CPU cores, float32): a
rubric that training never sees rises by 0.027 to 0.059 ± 0.007 over four seeds, at a KL of 1.5 to 2.8 nats
per completion; 115 s alone, 1.6 GB (docs/results.md).

Rows have a `prompt` or `messages`, or are the pairs that the reward model was trained on.
"""

from ml_collections import ConfigDict, config_dict

from configs.base import reinforcement


def get_config(size: str = "1m") -> ConfigDict:
    """A PPO run: the fields that differ from configs/base/reinforcement.py. The objective's values are
    those of InstructGPT and its open reproductions."""
    config = reinforcement.base("ppo", size, steps=160, learning_rate=1e-4, max_new_tokens=64)
    config.objective = ConfigDict()
    config.objective.clip = 0.2  # of the probability ratio, around 1
    config.objective.value_clip = 0.2  # change of a value per rollout, in units of reward; None: no limit
    config.objective.value_coefficient = 0.1  # of the critic's loss
    config.objective.entropy_coefficient = 0.0  # of an entropy bonus
    config.objective.discount = 1.0
    config.objective.gae_lambda = 0.95  # 1: rewards alone; smaller: more of the critic's values
    config.objective.whiten_advantages = True  # over the rollout
    config.objective.kl_coefficient = 0.05  # penalty: reward per nat of KL to the initial weights
    config.objective.kl_target = config_dict.placeholder(float)  # nats per completion, such as 6
    config.objective.kl_horizon = 2000.0  # completions over which kl_target changes it by e^0.2 at most
    config.objective.critic_warmup = 2  # rollouts at the start that train the critic alone
    config.objective.critic_learning_rate = config_dict.placeholder(float)  # None: optimizer.learning_rate
    # Norm to which the critic's gradient is clipped; None: with the policy's, by optimizer.clip_norm.
    config.objective.critic_clip_norm = config_dict.placeholder(float)

    config.data.train = ("synthetic:preferences",)
    config.data.sequence_length = 144  # tokens of prompt and completion
    config.rollout.num_prompts = 64
    config.rollout.group_size = 1
    config.rollout.epochs = 4
    config.rollout.num_minibatches = 2
    config.reward.model = "runs/reward"
    config.reward.missing_eos_penalty = -1.0
    return config
