"""All stages, from random weights to a reasoning model, on a laptop's CPU: 1M parameters, built-in data.

    make quickstart

installs and runs this. In an environment of your own:

    python experiments/pipeline.py --config=configs/quickstart.py --workdir=runs/quickstart

One of its stages alone:

    python experiments/train.py --config=configs/quickstart.py:pretrain --workdir=runs/pretrained
"""

from ml_collections import ConfigDict

from configs.base import pipeline


def get_config(stage: str = "") -> ConfigDict:
    """configs/base/pipeline.py with settings for a model this small."""
    config = pipeline.base("1m")
    config.data.problems = ("synthetic:additions",)
    config.data.solutions = (*3 * ("synthetic:additions",), "synthetic:chats")  # chats, or it forgets them

    config.pretrain.training.evaluate_every = config.pretrain.training.sample_every = 300

    config.sft.optimizer.learning_rate = 5e-3
    config.sft.data.synthetic_rows = 14_000  # of chats, and as many of drafts
    config.sft.data.sequence_length = 128
    config.sft.data.batch_size = 32
    config.sft.training.steps = 360
    config.sft.training.evaluate_every = config.sft.training.sample_every = 360

    config.reward_model.data.synthetic_rows = 8000
    config.reward_model.data.sequence_length = 128
    config.reward_model.data.batch_size = 24
    config.reward_model.training.num_microbatches = 3  # by length
    config.reward_model.optimizer.name = "muon"
    config.reward_model.optimizer.learning_rate = 2e-3
    config.reward_model.training.steps = 200
    config.reward_model.training.evaluate_at_start = False  # accuracy 0.5, as its head is 0
    config.reward_model.training.evaluate_every = 200
    config.reward_model.evaluation.max_rows = 1000

    config.ppo.objective.kl_coefficient = 0.05
    config.ppo.rollout.num_prompts = 128
    config.ppo.rollout.epochs = 2
    config.ppo.rollout.num_minibatches = 4
    config.ppo.data.synthetic_rows = 4000
    config.ppo.data.sequence_length = 128
    config.ppo.training.num_microbatches = 4  # by length, so that short completions are computed narrow
    config.ppo.training.steps = 128
    config.ppo.training.evaluate_every = config.ppo.training.sample_every = 128
    config.ppo.optimizer.learning_rate = 2e-4
    config.ppo.optimizer.schedule = "linear"
    config.ppo.optimizer.final_learning_rate = 0.1

    config.dpo.objective.beta = 0.2  # at 0.1 completions no longer end: truncated ones are rejected
    config.dpo.optimizer.learning_rate = 3e-4
    config.dpo.data.synthetic_rows = 2800
    config.dpo.data.sequence_length = 128
    config.dpo.data.batch_size = 24
    config.dpo.training.num_microbatches = 3  # by length
    config.dpo.training.steps = 88
    config.dpo.training.evaluate_at_start = False
    config.dpo.training.evaluate_every = 88

    config.sft_reasoning.data.sequence_length = 128
    config.sft_reasoning.data.synthetic_rows = 5000
    config.sft_reasoning.optimizer.learning_rate = 3e-3
    config.sft_reasoning.training.evaluate_at_start = False
    config.sft_reasoning.training.steps = 280
    config.sft_reasoning.training.evaluate_every = 20
    config.sft_reasoning.evaluation.num_sources = 1  # the target is a loss on additions, not on chats
    config.sft_reasoning.training.target = 0.025  # stop early, so that GRPO can still improve it
    config.sft_reasoning.training.checkpoint_every = config.sft_reasoning.training.sample_every = 0

    config.grpo.data.synthetic_rows = 6000
    config.grpo.data.sequence_length = 86
    config.grpo.rollout.num_prompts = 64
    config.grpo.rollout.num_minibatches = 8
    config.grpo.training.num_microbatches = 4  # by length, without groups of equal rewards
    config.grpo.rollout.decode_batch_size = 256
    config.grpo.rollout.recompute_log_probs = False  # saves half a minute
    config.grpo.rollout.sampling.max_new_tokens = 60
    config.grpo.sample.sampling.max_new_tokens = 60
    config.grpo.sample.group_size = 2
    config.grpo.evaluation.max_rows = 400
    config.grpo.optimizer.name = "muon"
    config.grpo.objective.clip_high = 0.28
    config.grpo.optimizer.learning_rate = 4e-4  # at 1e-3 it forgets
    config.grpo.optimizer.schedule = "linear"
    config.grpo.optimizer.final_learning_rate = 0.3
    config.grpo.training.steps = 320
    config.grpo.training.evaluate_every = 320

    config.synthesize.rows = 200
    config.synthesize.answers.sampling.max_new_tokens = 64
    config.synthesize.filters.refusals += ("it depends", "I am not sure", "I do not know", "hard to say")
    config.synthesize.filters.near_duplicates = None  # exact ones alone, which need no extra

    config.gates.max_rows = 500
    config.gates.max_new_tokens = 64

    # Measured on 2 cores of a server; for the estimate of the time left.
    config.expected_seconds.pretrain = 122.0
    config.expected_seconds.sft = 122.0
    config.expected_seconds.reward_model = 81.0
    config.expected_seconds.ppo = 115.0
    config.expected_seconds.dpo = 58.0
    config.expected_seconds.sft_reasoning = 51.0
    config.expected_seconds.grpo = 209.0
    config.expected_seconds.synthesize = 24.0
    config.expected_seconds.gates = 58.0
    return pipeline.part(config, stage)
