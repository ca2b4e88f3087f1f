"""Measure the gates of a pipeline on held-out data, with standard errors.

    python experiments/gates.py --config=configs/quickstart.py --workdir=runs/quickstart

writes WORKDIR/gates.json, the completions that it scored to WORKDIR/answers/, and completions of the same
prompts by every model to WORKDIR/shown.json. experiments/pipeline.py runs it after the last stage.
"""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from jaxllm.pipeline.config import PipelineConfig


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags, besides --config and --print_config."""
    from absl import flags

    flags.DEFINE_string("workdir", None, "folder of the pipeline", flag_values=flag_values)


def config_class(config: "ConfigDict") -> type:
    """The pipeline's dataclass. Imported late: it needs jax."""
    from jaxllm.pipeline.config import pipeline_class

    return pipeline_class(config)


def main(config: "PipelineConfig", flags: "FlagValues") -> None:
    """Measure all gates and print a line for each."""
    from jaxllm.files import is_url
    from jaxllm.pipeline.gates import measure_gates
    from jaxllm.store import working_path
    from jaxllm.training.workdir import stored_folder

    if flags.workdir is None:
        raise ConfigError("--workdir=FOLDER is missing")
    with stored_folder(flags.workdir) if is_url(flags.workdir) else contextlib.nullcontext():
        measure_gates(config, working_path(flags.workdir))


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
