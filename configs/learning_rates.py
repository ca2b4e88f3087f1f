"""Whether the best learning rate of `1m` is that of `10m`: both at three rates, with muP and without.

    python experiments/sweep.py --config=configs/learning_rates.py --workdir=runs/rates
    python benchmarks/learning_rates.py runs/rates

The argument is the optimizer: `:muon` or `:adamw`. On built-in text, or on yours: --config.data.train=FILE.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import pretrain_text
from configs.base.models import model

RATES = (6e-3, 1.2e-2, 2.4e-2)
SIZE = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


def get_config(optimizer: str = "muon") -> ConfigDict:
    """The settings that all runs share: few and short steps."""
    config = pretrain_text.get_config("1m")
    config.optimizer.name = optimizer
    config.training.steps = 150
    config.data.batch_size, config.data.sequence_length = 8, 128
    config.training.evaluate_every = config.training.get_ref("steps")  # the last step alone
    config.training.evaluate_at_start = False
    config.training.sample_every = 0
    config.training.checkpoint_every = 0
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Each rate for the small model, and for the large one with rates that follow its size and without."""
    small, large = model("1m"), model("10m")
    base = {"optimizer.base_width": small.width, "optimizer.base_layers": small.num_layers}
    larger = {f"model.{name}": large[name] for name in SIZE}
    for seed in (0, 1, 2):
        for rate in RATES:
            common = {"seed": seed, "optimizer.learning_rate": rate}
            yield common
            yield common | base | larger
            yield common | larger
