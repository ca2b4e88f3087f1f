"""What the configs of PPO and GRPO share: rollouts, rewards, and evaluation while they train."""

from ml_collections import ConfigDict, config_dict

from configs.base import finetune


def sampling(max_new_tokens: int, temperature: float) -> ConfigDict:
    """The policy's own distribution but for the temperature: nothing is filtered."""
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
    config.rollout.group_size = 8  # completions of each
    config.rollout.epochs = 1  # times every completion is trained on
    config.rollout.num_minibatches = 1  # updates an epoch
    config.rollout.decode_batch_size = 64  # completions decoded at a time
    config.rollout.mask_truncated = False  # leave completions without a stop token out of the loss
    config.rollout.max_resamples = 0  # times groups of equal rewards are replaced (DAPO's dynamic sampling)
    config.rollout.dtype = config_dict.placeholder(str)  # "bfloat16": sample in another precision
    config.rollout.replicate_params = False  # gather weights split by mesh.fsdp before decoding
    config.rollout.recompute_log_probs = True  # False: the sampler's, once those of the first rollout agree
    # "token" or "sequence": weight the loss by policy / sampler, at most the cap.
    config.rollout.importance_sampling = config_dict.placeholder(str)
    config.rollout.importance_sampling_cap = 2.0
    config.rollout.log_prob_difference_limit = 0.05  # nats a token between sampler and trainer; then warn
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
    config.reward.weights = ()  # one each; 0 logs the reward without adding it
    config.reward.model = config_dict.placeholder(str)  # the run folder of a reward model
    config.reward.model_weight = 1.0
    config.reward.normalize = True  # by the mean and spread stored with the reward model
    config.reward.workers = 1
    config.reward.time_limit = 5.0  # seconds for one call
    config.reward.error_reward = 0.0  # for a call that fails
    config.reward.overlong_buffer = 0  # tokens before max_new_tokens over which a penalty falls to -1
    config.reward.missing_eos_penalty = 0.0  # added for a completion without a stop token, such as -1

    config.evaluation.max_rows = 128  # held-out prompts to complete
    config.sample = ConfigDict()
    config.sample.prompts = ()  # others to complete
    config.sample.sampling = sampling(max_new_tokens, 0.0)  # greedy
    config.sample.group_size = 0  # completions as in a rollout of each held-out prompt, for pass@k
    return config
