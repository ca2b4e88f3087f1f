r"""GRPO on problems whose answers can be checked. The size is that of the model it is initialized from.

    python experiments/train.py --config=configs/grpo_problems.py:1m --workdir=runs/reasoner \
        --init_from=runs/sft_reasoning

Rows have a `prompt` or `messages`, and whatever the rewards read, such as `answer`.
"""

from ml_collections import ConfigDict

from configs.base import reinforcement


def get_config(size: str = "1m") -> ConfigDict:
    """Every field of a GRPO run."""
    config = reinforcement.base("grpo", size, steps=100, learning_rate=5e-5, max_new_tokens=160)
    config.objective = ConfigDict()
    config.objective.variant = "grpo"  # or dr_grpo, dapo, gspo, cispo
    config.objective.clip_low = 0.2
    config.objective.clip_high = 0.2  # 0.28 in DAPO (clip-higher)
    config.objective.kl_coefficient = 0.0  # of the KL to the initial weights; 0 needs no second model
    config.objective.kl_in = "loss"  # or "reward"
    config.objective.kl_estimator = "k3"  # in the loss
    config.objective.entropy_coefficient = 0.0
    config.objective.advantage = "group"  # or "leave_one_out" (RLOO), "reinforce_plus_plus"
    config.objective.advantage_scale = "group"  # divide by the group's spread; batch; none (Dr. GRPO)
    config.objective.advantage_epsilon = 1e-4

    config.data.train = ("synthetic:problems",)
    config.data.sequence_length = 256  # prompt and answer
    config.rollout.num_prompts = 32
    config.rollout.num_minibatches = 2
    config.rollout.decode_batch_size = 128
    config.reward.functions = ("math_answer",)
    config.reward.weights = (1.0,)
    return config
