"""Train all stages, from random weights to a reasoning model, and check the gate of each.

    python experiments/pipeline.py --config=configs/quickstart.py --workdir=runs/quickstart

Every stage is a run of experiments/train.py in a folder of its own; pipeline.json has the commands. The same
command again resumes. To train on your own files: --config.data.text=mine.txt.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_process_flags
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from jaxllm.pipeline.config import PipelineConfig


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags, besides --config and --print_config."""
    from absl import flags

    flags.DEFINE_string("workdir", None, "folder for the run folders of all stages", flag_values=flag_values)
    flags.DEFINE_bool("dry_run", False, "compile every stage, print sizes, exit", flag_values=flag_values)
    define_process_flags(flag_values)


def config_class(config: "ConfigDict") -> type:
    """The pipeline's dataclass. Imported late: it needs jax."""
    from jaxllm.pipeline.config import pipeline_class

    return pipeline_class(config)


def main(config: "PipelineConfig", flags: "FlagValues") -> int:
    """Run the stages that are not done. Returns the exit code: 0 if all gates passed."""
    from jaxllm.parallel.cluster import find_place
    from jaxllm.pipeline.run import Scripts, dry_run, run_pipeline

    if flags.dry_run:
        dry_run(config)
        return 0
    if flags.workdir is None:
        raise ConfigError("--workdir=FOLDER is missing")
    names = ("train.py", "synthesize.py", "gates.py")
    scripts = Scripts(*(Path(__file__).with_name(name) for name in names))
    place = find_place(flags.coordinator, flags.num_processes, flags.process_id)
    given = ("coordinator", "num_processes", "process_id")
    return run_pipeline(
        config,
        config_file=flags.config,
        workdir=flags.workdir,
        scripts=scripts,
        process=0 if place is None else place.index,
        process_flags={name: str(flags[name].value) for name in given if flags[name].value is not None},
    )


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
