"""All stages of the quickstart for one GPU: 124M parameters, public data from the Hugging Face Hub.

    python experiments/pipeline.py --config=configs/pipeline_124m.py --workdir=runs/124m

--dry_run compiles all stages and prints their memory and FLOPs; without a GPU, add
--config.model.attention=xla.
"""

from ml_collections import ConfigDict

from configs.base import pipeline


def get_config(stage: str = "") -> ConfigDict:
    """configs/base/pipeline.py on public data."""
    config = pipeline.base("124m")
    pipeline.on_public_data(config)
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "cudnn"
    config.model.remat = "none"  # 13 to 27 GB (docs/plan.md); with less memory, "attention"

    config.pretrain.training.num_microbatches = 16

    config.sft.training.steps = 3000
    config.sft.data.batch_size = 64
    config.sft.training.num_microbatches = 4
    config.sft.optimizer.learning_rate = 1e-4

    config.reward_model.training.steps = 900
    config.reward_model.data.batch_size = 64
    config.reward_model.training.num_microbatches = 4
    config.reward_model.optimizer.learning_rate = 3e-5

    config.ppo.training.steps = 1600
    config.ppo.rollout.num_prompts = 256
    config.ppo.rollout.decode_batch_size = 256
    config.ppo.training.num_microbatches = 4
    config.ppo.optimizer.learning_rate = 1e-5

    config.dpo.training.steps = 900
    config.dpo.data.batch_size = 64
    config.dpo.training.num_microbatches = 4
    config.dpo.optimizer.learning_rate = 1e-5

    config.sft_reasoning.training.steps = 600
    config.sft_reasoning.data.batch_size = 32
    config.sft_reasoning.training.num_microbatches = 1
    config.sft_reasoning.optimizer.learning_rate = 1e-4

    config.grpo.training.steps = 1000
    config.grpo.rollout.num_prompts = 128
    config.grpo.rollout.num_minibatches = 2
    config.grpo.rollout.decode_batch_size = 512
    config.grpo.training.num_microbatches = 8
    config.grpo.optimizer.learning_rate = 5e-6
    return pipeline.part(config, stage)
