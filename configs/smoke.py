"""Every stage for a few steps on a tiny model, to see that it runs on this machine. Its metrics mean nothing.

    make smoke

installs and runs this. In an environment of your own:

    python experiments/pipeline.py --config=configs/smoke.py --workdir=runs/smoke
"""

from ml_collections import ConfigDict

from configs.base import pipeline

STAGES = ("pretrain", "sft", "reward_model", "ppo", "dpo", "sft_reasoning", "grpo")


def get_config(stage: str = "") -> ConfigDict:
    """configs/base/pipeline.py with as few steps and rows as possible."""
    config = pipeline.base("tiny")
    config.model.num_layers, config.model.width = 1, 32
    config.data.problems = config.data.solutions = ("synthetic:additions",)
    for name in STAGES:
        section = config[name]
        section.data.synthetic_rows, section.data.sequence_length = 200, 128
        section.optimizer.name = "adamw"
        section.evaluation.max_rows = 16
        section.training.steps = section.training.checkpoint_every = 4
        section.training.evaluate_every = 4
        section.training.sample_every = 4 if name in ("pretrain", "grpo") else 0  # they share the code
        section.training.evaluate_at_start = False
        if "rollout" in section:
            section.rollout.num_prompts, section.rollout.group_size = 4, 2
            section.rollout.epochs = section.rollout.num_minibatches = 1
            section.rollout.sampling.max_new_tokens = section.sample.sampling.max_new_tokens = 8
        else:
            section.data.batch_size = 4
        if "num_held_out" in section.get("sample", {}):
            section.sample.num_held_out = 0
    config.synthesize.rows = config.synthesize.block_rows = config.synthesize.decode_batch_size = 4
    config.synthesize.answers.per_instruction = 2
    config.synthesize.answers.sampling.max_new_tokens = 8
    config.synthesize.filters.near_duplicates = None
    config.gates.must_pass = False
    config.gates.max_rows, config.gates.max_new_tokens = 8, 4
    config.gates.shown = ("What is an LLM?",)
    return pipeline.part(config, stage)
