"""All stages of the quickstart for a TPU host: 1B parameters, the training state split over all devices.

    python experiments/pipeline.py --config=configs/pipeline_1b.py --workdir=runs/1b

--dry_run compiles all stages and prints memory and FLOPs per device; without a TPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=8 for a mesh of 8 and add --config.model.attention=xla.
"""

from ml_collections import ConfigDict

from configs.base import pipeline


def get_config(stage: str = "") -> ConfigDict:
    """configs/base/pipeline.py on public data."""
    config = pipeline.base("llama3.2_1b")
    pipeline.on_public_data(config)
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "splash"
    config.model.remat = "attention"
    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.pretrain.training.num_microbatches = 16  # of 512 rows: 4 rows per device at a time on 8 devices

    config.sft.training.steps = 3000
    config.sft.data.batch_size = 128
    config.sft.training.num_microbatches = 2
    config.sft.optimizer.learning_rate = 2e-5

    config.reward_model.training.steps = 450
    config.reward_model.data.batch_size = 128
    config.reward_model.training.num_microbatches = 2
    config.reward_model.optimizer.learning_rate = 1e-5

    config.ppo.training.steps = 1600
    config.ppo.rollout.num_prompts = 512
    config.ppo.rollout.decode_batch_size = 512
    config.ppo.rollout.replicate_params = True
    config.ppo.training.num_microbatches = 4
    config.ppo.optimizer.learning_rate = 1e-6

    config.dpo.training.steps = 450
    config.dpo.data.batch_size = 128
    config.dpo.training.num_microbatches = 2
    config.dpo.optimizer.learning_rate = 1e-6

    config.sft_reasoning.training.steps = 200
    config.sft_reasoning.data.batch_size = 128
    config.sft_reasoning.optimizer.learning_rate = 2e-5

    config.grpo.training.steps = 1000
    config.grpo.rollout.num_prompts = 128
    config.grpo.rollout.decode_batch_size = 1024
    config.grpo.rollout.replicate_params = True
    config.grpo.training.num_microbatches = 4
    config.grpo.optimizer.learning_rate = 1e-6
    return pipeline.part(config, stage)
