"""What the configs of PPO and GRPO share: rollouts, rewards, and evaluation while they train."""

from ml_collections import ConfigDict, config_dict

from configs.base import finetune


def sampling(max_new_tokens: int, temperature: float) -> ConfigDict:
    """Sample from the policy's distribution at this temperature, without a filter."""
    section = ConfigDict({"max_new_tokens": max_new_tokens, "temperature": temperature})
    section.top_k = config_dict.placeholder(int)
    section.top_p = config_dict.placeholder(float)
    section.min_p = config_dict.placeholder(float)
    return section


def base(stage: str, size: str, *, steps: int, learning_rate: float, max_new_tokens: int) -> ConfigDict:
    """The config of PPO or GRPO without its objective and its training data."""
    config = finetune.base(stage, size, steps=steps, batch_size=1, learning_rate=learning_rate)
    config.optimizer.schedule = "constant"
    config.optimizer.beta2 = 0.99  # gradients of rollouts are noisy: average their squares over more steps

    config.data.prompt_format = config_dict.placeholder(str)  # "Solve {question}"; None: `prompt`
    config.data.system = config_dict.placeholder(str)  # a system message before every prompt

    config.rollout = ConfigDict()
    config.rollout.num_prompts = 8  # per rollout
    config.rollout.group_size = 8  # completions of each prompt
    config.rollout.epochs = 1  # passes over the completions of a rollout
    config.rollout.num_minibatches = 1  # updates per epoch
    config.rollout.decode_batch_size = 64  # completions decoded at a time
    config.rollout.mask_truncated = False  # leave out completions without a stop token
    config.rollout.max_resamples = 0  # times groups of equal rewards are resampled, from new prompts (DAPO)
    config.rollout.dtype = config_dict.placeholder(str)  # of sampling; None: model.compute_dtype
    config.rollout.replicate_params = False  # gather weights that mesh.fsdp splits before decoding
    # False: use the sampler's log-probs, once those of the first rollout agree with the trainer's.
    config.rollout.recompute_log_probs = True
    # "token" or "sequence": weight the loss by trainer / sampler probability, truncated at the cap; None: no.
    config.rollout.importance_sampling = config_dict.placeholder(str)
    config.rollout.importance_sampling_cap = 2.0
    config.rollout.log_prob_difference_limit = 0.05  # warn above it: nats per token, sampler to trainer
    config.rollout.sampling = sampling(max_new_tokens, 1.0)

    # Derived from these: the batch size, and intervals that are whole rollouts.
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
    config.reward.functions = ()  # names in jaxllm.rewards, PACKAGE.FUNCTION or FILE.py:FUNCTION
    config.reward.weights = ()  # one per function; 0 logs the reward without adding it
    config.reward.model = config_dict.placeholder(str)  # run folder of a reward model; None: none
    config.reward.model_weight = 1.0
    config.reward.normalize = True  # standardize its rewards by the statistics stored with it
    config.reward.workers = 1  # processes that call the functions
    config.reward.time_limit = 5.0  # seconds per call of a function
    config.reward.error_reward = config_dict.placeholder(float)  # where a call fails; None: left out
    config.reward.overlong_buffer = 0  # last tokens over which a penalty falls to -1 (DAPO); 0: none
    config.reward.missing_eos_penalty = 0.0  # added where a completion has no stop token, such as -1

    config.evaluation.max_rows = 128  # held-out prompts to complete, the first of each source
    config.sample = ConfigDict()
    config.sample.prompts = ()  # further prompts to complete
    config.sample.sampling = sampling(max_new_tokens, 0.0)  # greedy
    config.sample.group_size = 0  # sampled completions of each held-out prompt, for pass@k; 0: none
    return config
