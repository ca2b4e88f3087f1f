"""DPO on pairs of completions, without a reward model. The size after the colon is that of the initial
model, which is also the frozen reference.

    python experiments/train.py --config=configs/dpo_pairs.py:1m --workdir=runs/dpo \
        --init_from=runs/sft --config.data.train=pairs.jsonl

Measured as `configs/quickstart.py:dpo` (88 steps of 24 pairs of 128 tokens, 2 CPU cores, float32): held-out
accuracy of implicit rewards 0.728 ± 0.030; a rubric that training never sees rises by 0.034 to 0.051 ±
0.007 over four seeds; 58 s alone, 1.1 GB. On hh-rlhf: 0.60 ± 0.03 (docs/results.md).

Rows are as in configs/reward_model_pairs.py.
"""

from ml_collections import ConfigDict

from configs.base import finetune


def get_config(size: str = "1m") -> ConfigDict:
    """A DPO run: the fields that differ from configs/base/finetune.py."""
    config = finetune.base("dpo", size, steps=120, batch_size=16, learning_rate=1e-4)
    config.objective = ConfigDict()
    config.objective.beta = 0.1  # KL penalty (Rafailov et al. 2023); smaller: the policy moves further
    config.objective.variant = "sigmoid"  # or robust, hinge, ipo, apo_zero, sppo
    config.objective.label_smoothing = 0.0  # assumed share of flipped labels (sigmoid, robust)
    config.objective.length_normalized = False  # ipo: mean log-probs, not sums, as in TRL
    config.data.train = ("synthetic:preferences",)
    config.data.synthetic_rows = 4000
    config.data.sequence_length = 192  # tokens; pairs are padded to it, longer ones are dropped
    config.data.reference = "cached"  # log-probs computed once before training; "on_the_fly": per batch
    config.checkpoint.best_metric = "eval/loss"
    return config
