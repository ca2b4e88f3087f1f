"""DPO: preferences without a reward model. The size is that of the model it is initialized from, which is
also the frozen reference.

    python experiments/train.py --config=configs/dpo_pairs.py:1m --workdir=runs/dpo \
        --init_from=runs/sft --config.data.train=pairs.jsonl

Rows are as in configs/reward_model_pairs.py.
"""

from ml_collections import ConfigDict

from configs.base import finetune


def get_config(size: str = "1m") -> ConfigDict:
    """Every field of a DPO run that is not pretraining's."""
    config = finetune.base("dpo", size, steps=120, batch_size=16, learning_rate=1e-4)
    config.objective = ConfigDict()
    config.objective.beta = 0.1  # pull to the reference (Rafailov et al. 2023); smaller: further away
    config.objective.variant = "sigmoid"  # or robust, hinge, ipo, apo_zero, sppo
    config.objective.label_smoothing = 0.0  # assumed share of flipped labels (sigmoid, robust)
    config.objective.length_normalized = False  # ipo: log-probs a token, as TRL has it
    config.data.train = ("synthetic:preferences",)
    config.data.synthetic_rows = 4000
    config.data.sequence_length = 192  # every pair is padded to it; longer ones are left out
    config.data.reference = "cached"  # computed once, before training; "on_the_fly": with each batch
    config.data.cache_dir = "~/.cache/jaxllm"  # where they are kept between runs
    config.checkpoint.best_metric = "eval/loss"
    return config
