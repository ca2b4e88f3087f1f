"""A sweep that a laptop finishes: learning rate x batch size of a tiny model on built-in text, 3 seeds each.

    python experiments/sweep.py --config=configs/sweep_pretrain.py --workdir=runs/sweep --parallel=2
    python experiments/report.py runs/sweep

The argument after the colon is the model's size, as in configs/pretrain_text.py. The batch sizes see the same
number of tokens: half the steps for twice the rows.

Measured on 2 CPU cores beside other work: 7 minutes. Best are 8 rows at 0.032, with 2.15 ± 0.13 held-out bits
per byte (95% interval over 3 seeds); 3 fresh seeds (--confirm=3) give 2.17 ± 0.21.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import pretrain_text
from jaxllm.sweep import Overrides, grid, seeds, zipped


def get_config(size: str = "tiny") -> ConfigDict:
    """configs/pretrain_text.py on fewer rows, without samples."""
    config = pretrain_text.get_config(size)
    config.data.synthetic_rows = 2000
    config.evaluation.max_rows = 100
    config.training.evaluate_at_start = False
    config.training.sample_every = 0
    config.training.checkpoint_every = 0
    config.checkpoint.keep = 1
    return config


def sweep() -> Iterator[Overrides]:
    """18 trials: 2 batch sizes x 3 learning rates x 3 seeds."""
    batches = zipped({"data.batch_size": [8, 16], "training.steps": [200, 100]})
    rates = list(grid({"optimizer.learning_rate": [1.6e-2, 3.2e-2, 6.4e-2]}))
    return seeds((batch | rate for batch in batches for rate in rates), 3)


def search(trial: Any) -> Overrides:
    """The same fields for --trials=N: `trial` is Optuna's."""
    batch_size = trial.suggest_categorical("batch_size", [8, 16])
    return {
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 4e-3, 1e-1, log=True),
        "data.batch_size": batch_size,
        "training.steps": 1600 // batch_size,
    }
