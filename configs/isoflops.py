"""The best model size for a compute budget: six sizes, trained with equal FLOPs at each of four budgets.

    python experiments/sweep.py --config=configs/isoflops.py --workdir=runs/isoflops --launcher=local
    python experiments/scaling.py runs/isoflops

On built-in text; add --config.data.train=FILE for your own. For larger models change SIZES and BUDGETS.
Learning rates follow the size (optimizer.base_width): else the law would be one of learning rates.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import pretrain_text
from jaxllm.config import parse
from jaxllm.models.config import ModelConfig, flops_per_token

SIZES = ((1, 16), (2, 24), (2, 32), (2, 48), (3, 64), (4, 96))  # layers, width
BUDGETS = (2.5e11, 5e11, 1e12, 2e12)  # FLOPs of a run


def get_config() -> ConfigDict:
    """The settings that all sizes share."""
    config = pretrain_text.get_config("1m")
    config.model.vocab_size = 512
    config.optimizer.base_width, config.optimizer.base_layers = config.model.width, config.model.num_layers
    config.data.batch_size, config.data.sequence_length = 8, 128
    config.training.evaluate_every = config.training.get_ref("steps")  # the last step alone
    config.training.evaluate_at_start = False
    config.training.sample_every = 0
    config.training.checkpoint_every = config.training.get_ref("steps")
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """A run for each budget and size, as long as the budget lasts."""
    config = get_config()
    tokens = config.data.batch_size * config.data.sequence_length
    for flops in BUDGETS:
        for layers, width in SIZES:
            size = {
                "num_layers": layers,
                "width": width,
                "num_heads": width // 8,
                "num_kv_heads": width // 8,
                "head_dim": 8,
                "mlp_width": 3 * width,
            }
            config.model.update(size)
            per_token = flops_per_token(
                parse(ModelConfig, config.model, "model"), config.data.sequence_length
            )
            steps = round(flops / per_token / tokens)
            yield {"training.steps": steps} | {f"model.{name}": value for name, value in size.items()}
