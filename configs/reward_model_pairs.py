"""A reward model from pairs of completions, one preferred. The size is that of the model it is
initialized from.

    python experiments/train.py --config=configs/reward_model_pairs.py:1m --workdir=runs/reward \
        --init_from=runs/sft --config.data.train=pairs.jsonl

Rows are `prompt`, `chosen`, `rejected` (texts or messages), transcripts as in hh-rlhf, or Alpaca's
`instruction` and `input` with `chosen` and `rejected`; optional `margin` and `weight`.
"""

from ml_collections import ConfigDict

from configs.base import finetune


def get_config(size: str = "1m") -> ConfigDict:
    """Every field of a reward model's run that is not pretraining's."""
    config = finetune.base("reward_model", size, steps=150, batch_size=16, learning_rate=5e-4)
    config.objective = ConfigDict()
    config.objective.center_coefficient = 0.01  # keeps rewards around 0 (Eisenstein et al. 2023)
    config.data.train = ("synthetic:preferences",)
    config.data.synthetic_rows = 4000
    config.data.sequence_length = 192  # every pair is padded to it; longer ones are left out
    config.checkpoint.best_metric = "eval/loss"
    return config
