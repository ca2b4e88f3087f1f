"""What the configs of PPO and GRPO share: rollouts, rewards, and what is asked while they learn."""

from ml_collections import ConfigDict, config_dict

from configs.base import finetune


def sampling(max_new_tokens: int, temperature: float) -> ConfigDict:
    """The policy's own distribution, unless the temperature says otherwise: nothing filtered."""
    section = ConfigDict({"max_new_tokens": max_new_tokens, "temperature": temperature})
    section.top_k = config_dict.placeholder(int)
    section.top_p = config_dict.placeholder(float)
    section.min_p = config_dict.placeholder(float)
    return section


def base(stage: str, size: str, *, steps: int, learning_rate: float, max_new_tokens: int) -> ConfigDict:
    """A config of fine-tuning without an objective."""
    config = finetune.base(stage, size, steps=steps, batch_size=1, learning_rate=learning_rate)
    config.optimizer.schedule = "constant"
    config.optimizer.beta2 = 0.99  # a rollout's gradient is noisy: average over more of them

    config.data.prompt_format = config_dict.placeholder(str)  # "Solve {question}"; None: `prompt`
    config.data.system = config_dict.placeholder(str)  # a system message before every prompt

    config.rollout = ConfigDict()
    config.rollout.num_prompts = 8  # in a rollout
    config.rollout.group_size = 8  # answers to each
    config.rollout.epochs = 1  # times every answer is learnt from
    config.rollout.num_minibatches = 1  # updates an epoch
    config.rollout.decode_batch_size = 64  # answers decoded at a time
    config.rollout.mask_truncated = False  # leave answers that did not end out of the loss
    config.rollout.max_resamples = 0  # times groups without signal are replaced (DAPO's dynamic sampling)
    config.rollout.dtype = config_dict.placeholder(str)  # "bfloat16": sample in another precision
    config.rollout.replicate_params = False  # copy split weights (mesh.fsdp) whole to every device before decoding
    config.rollout.recompute_log_probs = True  # False trusts the sampler's log-probs once the first rollout's agree
    config.rollout.importance_sampling = config_dict.placeholder(str)  # "token" or "sequence": policy / sampler
    config.rollout.importance_sampling_cap = 2.0
    config.rollout.log_prob_difference_limit = 0.05  # nats a token between sampler and trainer that are alarming
    config.rollout.sampling = sampling(max_new_tokens, 1.0)

    # What follows from these: a batch, and intervals in whole rollouts.
    prompts, group_size, epochs, minibatches = map(
        config.rollout.get_ref, ("num_prompts", "group_size", "epochs", "num_minibatches")
    )
    config.data.batch_size = prompts * group_size // minibatches
    updates = epochs * minibatches
    config.training.log_every = updates
    count = config.training.get_ref("steps")
    for name in ("evaluate_every", "sample_every", "checkpoint_every"):
        config.training[name] = ((count + 4) // 5 + updates - 1) // updates * updates

    config.reward = ConfigDict()
    config.reward.functions = ()  # names in jaxllm.rewards, PACKAGE.FUNCTION, FILE.py:FUNCTION
    config.reward.weights = ()  # one each; 0 measures without paying
    config.reward.model = config_dict.placeholder(str)  # the run folder of a reward model
    config.reward.model_weight = 1.0
    config.reward.normalize = True  # by the mean and spread that were stored with the reward model
    config.reward.workers = 1
    config.reward.time_limit = 5.0  # seconds for one call
    config.reward.error_reward = 0.0  # for a call that fails
    config.reward.overlong_buffer = 0  # tokens before max_new_tokens in which length is penalised
    config.reward.missing_eos_penalty = 0.0  # added for an answer that did not end, such as -1

    config.evaluation.max_rows = 128  # held-out prompts to answer
    config.sample = ConfigDict()
    config.sample.prompts = ()  # others to answer
    config.sample.sampling = sampling(max_new_tokens, 0.0)  # greedy
    config.sample.group_size = 0  # answers as in a rollout to each held-out prompt, for pass@k
    return config
