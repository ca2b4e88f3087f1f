"""A reward model, trained on pairs of completions of which one is preferred. The size after the colon is that
of the initial model.

    python experiments/train.py --config=configs/reward_model_pairs.py:1m --workdir=runs/reward \
        --init_from=runs/sft --config.data.train=pairs.jsonl

Measured as `configs/quickstart.py:reward_model` (200 steps of 24 pairs of 128 tokens, a tenth of the labels
flipped, 2 CPU cores, float32): accuracy 0.724 ± 0.018 on held-out pairs, 0.687 to 0.732 over four seeds,
choosing the longer completion 0.558; 81 s alone, 1.0 GB. On 1,278 pairs of hh-rlhf: 0.69 ± 0.04
(docs/results.md).

Rows are `prompt`, `chosen`, `rejected` (texts or messages), transcripts as in hh-rlhf, or Alpaca's
`instruction` and `input` with `chosen` and `rejected`; optional `margin` and `weight`.
"""

from ml_collections import ConfigDict

from configs.base import finetune


def get_config(size: str = "1m") -> ConfigDict:
    """A reward model's run: the fields that differ from configs/base/finetune.py."""
    config = finetune.base("reward_model", size, steps=150, batch_size=16, learning_rate=5e-4)
    config.objective = ConfigDict()
    config.objective.center_coefficient = 0.01  # centers rewards at 0 (Eisenstein et al. 2023)
    config.data.train = ("synthetic:preferences",)
    config.data.synthetic_rows = 4000
    config.data.sequence_length = 192  # tokens; pairs are padded to it, longer ones are dropped
    config.checkpoint.best_metric = "eval/loss"
    return config
