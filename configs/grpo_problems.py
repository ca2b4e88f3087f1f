r"""GRPO on problems whose answers can be checked. The size after the colon is that of the initial model.

    python experiments/train.py --config=configs/grpo_problems.py:1m --workdir=runs/reasoner \
        --init_from=runs/sft_reasoning

Measured as `configs/quickstart.py:grpo` (40 rollouts of 64 x 8 on built-in additions, 2 CPU cores,
float32): pass@1 of sampled completions of held-out problems rises by 0.29 to 0.43 (± 0.03) over four seeds;
209 s alone, 1.6 GB. On countdown: 0.36 to 0.62 (± 0.02), three seeds (docs/results.md).

Rows have a `prompt` or `messages`, and the columns that the rewards read, such as `answer`.
"""

from ml_collections import ConfigDict

from configs.base import reinforcement


def get_config(size: str = "1m") -> ConfigDict:
    """A GRPO run: the fields that differ from configs/base/reinforcement.py."""
    config = reinforcement.base("grpo", size, steps=100, learning_rate=5e-5, max_new_tokens=160)
    config.objective = ConfigDict()
    config.objective.variant = "grpo"  # or dr_grpo, dapo, gspo, cispo
    config.objective.clip_low = 0.2  # of the probability ratio, below 1
    config.objective.clip_high = 0.2  # above 1; 0.28 in DAPO (clip-higher)
    config.objective.kl_coefficient = 0.0  # of the KL to the initial weights; 0 needs no second model
    config.objective.kl_in = "loss"  # or "reward": subtracted before advantages are computed
    config.objective.kl_estimator = "k3"  # in the loss: "k3" or "k2"
    config.objective.entropy_coefficient = 0.0  # of an entropy bonus
    config.objective.advantage = "group"  # or "leave_one_out" (RLOO), "reinforce_plus_plus"
    config.objective.advantage_scale = "group"  # divide by its std; or "batch", "none" (Dr. GRPO)
    config.objective.advantage_epsilon = 1e-4  # added to that std

    config.data.train = ("synthetic:problems",)
    config.data.sequence_length = 256  # tokens of prompt and completion
    config.rollout.num_prompts = 32
    config.rollout.num_minibatches = 2
    config.rollout.decode_batch_size = 128
    config.reward.functions = ("math_answer",)
    config.reward.weights = (1.0,)
    return config
