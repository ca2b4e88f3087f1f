"""Learn to reason from answers that can be checked. The size is that of the model it begins with.

    python experiments/train.py --config=configs/grpo_problems.py:1m --workdir=runs/reasoner \
        --init_from=runs/chat

Rows have a `prompt` or `messages`, and whatever the rewards read, such as `answer`.
"""

from ml_collections import ConfigDict, config_dict

from configs import finetune


def sampling(max_new_tokens: int, temperature: float) -> ConfigDict:
    """The policy's own distribution, unless the temperature says otherwise: nothing filtered."""
    section = ConfigDict({"max_new_tokens": max_new_tokens, "temperature": temperature})
    section.top_k = config_dict.placeholder(int)
    section.top_p = config_dict.placeholder(float)
    section.min_p = config_dict.placeholder(float)
    return section


def get_config(size: str = "1m") -> ConfigDict:
    """Every field of a GRPO run that is not pretraining's."""
    config = finetune.base("grpo", size, steps=100, batch_size=64, learning_rate=1e-4)
    config.optimizer.schedule = "constant"
    config.objective = ConfigDict()
    config.objective.variant = "grpo"  # or dr_grpo, dapo, gspo, cispo
    config.objective.clip_low = 0.2
    config.objective.clip_high = 0.2  # 0.28 in DAPO (clip-higher)
    config.objective.kl_coefficient = 0.0  # of the KL to the weights it begins with; 0 needs no second model
    config.objective.kl_estimator = "k3"
    config.objective.entropy_coefficient = 0.0
    config.objective.advantage = "group"  # or "leave_one_out" (RLOO)
    config.objective.advantage_scale = "group"  # divide by the group's spread; batch; none (Dr. GRPO)
    config.objective.advantage_epsilon = 1e-4

    config.data.train = ("synthetic:problems",)
    config.data.validation = ("synthetic:problems",)
    config.data.prompt_format = config_dict.placeholder(str)  # "Solve {question}"; None: `prompt`
    config.data.system = config_dict.placeholder(str)  # a system message before every prompt
    config.data.sequence_length = 192  # prompt and answer

    config.rollout = ConfigDict()
    config.rollout.prompts = 8  # in a rollout
    config.rollout.group_size = 8  # answers to each
    config.rollout.epochs = 1  # times every answer is learnt from
    config.rollout.minibatches = 1  # updates an epoch
    config.rollout.max_rows = 64  # answers decoded at a time
    config.rollout.mask_truncated = False  # leave answers that did not end out of the loss
    config.rollout.refills = 0  # times groups without signal are replaced (DAPO's dynamic sampling)
    config.rollout.sampling = sampling(128, 1.0)

    config.reward = ConfigDict()
    config.reward.functions = ("math_answer",)  # jaxllm.rewards, PACKAGE.FUNCTION, FILE.py:FUNCTION
    config.reward.weights = (1.0,)
    config.reward.workers = 1
    config.reward.time_limit = 5.0  # seconds for one call
    config.reward.default = 0.0  # for a call that fails
    config.reward.overlong_buffer = 0  # tokens before max_new_tokens in which length is penalised

    config.training.log_every = 1
    config.evaluation.max_rows = 128  # held-out prompts to answer
    config.sample = ConfigDict()
    config.sample.prompts = ()
    config.sample.sampling = sampling(128, 0.0)
    return config
