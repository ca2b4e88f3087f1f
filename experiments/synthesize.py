"""Write a data set with local models: instructions, answers, and preferences by a judge.

    python experiments/synthesize.py --config=configs/synthesize.py --workdir=sets/mine \
        --config.answers.model=runs/sft --config.judge.model=runs/reward
    python experiments/train.py --config=configs/sft_chat.py:1m --workdir=runs/student \
        --init_from=runs/pretrained --config.data.train=sets/mine/sft.jsonl

The same command again resumes, to the row.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from jaxllm.synthesize.config import SynthesizeConfig


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags, besides --config and --print_config."""
    from absl import flags

    flags.DEFINE_string("workdir", None, "folder for the set", flag_values=flag_values)


def config_class(config: "ConfigDict") -> type:
    """The dataclass of a synthesis. Imported late: it needs jax."""
    from jaxllm.synthesize.config import SynthesizeConfig

    if "instructions" not in config:
        raise ConfigError("the config file is of no synthesis: use configs/synthesize.py")
    return SynthesizeConfig


def main(argv: Sequence[str], config: "SynthesizeConfig", flags: "FlagValues") -> None:
    """Write the set."""
    from jaxllm.runs.process import set_up_process
    from jaxllm.synthesize.run import synthesize

    if flags.workdir is None:
        raise ConfigError("--workdir=FOLDER is missing")
    set_up_process()
    synthesize(config, flags.workdir, command=["python", *argv])


if __name__ == "__main__":
    sys.exit(run_script(functools.partial(main, sys.argv), config_class, define_flags))
