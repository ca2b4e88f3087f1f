"""The first run: a 1M-parameter model learns the built-in synthetic world in minutes on a laptop's CPU.

    make quickstart

installs and runs this; in an environment of your own it is
`python experiments/train.py --config=configs/quickstart.py --workdir=runs/quickstart`.
"""

from ml_collections import ConfigDict

from configs import pretrain_text


def get_config() -> ConfigDict:
    """configs/pretrain_text.py, on built-in text and shorter."""
    config = pretrain_text.get_config("1m")
    config.data.train = ("synthetic",)
    config.data.validation = ("synthetic",)
    config.sample.prompts = ("", "What is an LLM?", "Once upon a time")
    return config
