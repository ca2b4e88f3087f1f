r"""Train a language model. The config selects the stage, the model and the data.

    python experiments/train.py --config=configs/pretrain_text.py:1m --workdir=runs/shakespeare \
        --config.data.train=input.txt

WORKDIR then holds checkpoints, metrics and samples. The same command again resumes the run.
"""

import functools
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

    from jaxllm.runs.config import TrainConfig


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags, besides --config and --print_config."""
    from absl import flags

    define = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    define("workdir", None, "run folder: checkpoints, metrics, samples")
    define("resume", "auto", "auto: resume if WORKDIR holds this run; must; never; or a STEP")
    define("init_from", None, "initialize weights from this run folder, RUN/best or step folder")
    define("profile", None, "FIRST:LAST: trace these steps into WORKDIR/profile")
    flags.DEFINE_bool("dry_run", False, "compile, print sizes and memory, and exit", flag_values=flag_values)
    define_process_flags(flag_values)


def config_class(config: "ConfigDict") -> type:
    """The config dataclass of the config's stage. Imported late: it needs jax."""
    from jaxllm.stages import find_stage

    if "stage" not in config:
        raise ConfigError("the config is of a pipeline: name one of its runs, --config=FILE.py:NAME")
    return find_stage(config.stage).Config


def main(config: "TrainConfig", flags: "FlagValues") -> None:
    """Train, or compile and print sizes and memory."""
    from jaxllm.parallel.processes import joined
    from jaxllm.runs.process import set_up_process
    from jaxllm.runs.program import dry_run
    from jaxllm.runs.train import train
    from jaxllm.runs.weights import check_init_from, model_note, with_model_of
    from jaxllm.stages import build_program, find_stage

    if flags.dry_run:
        set_up_process()
        check_init_from(flags.init_from)
        used = with_model_of(config, flags.init_from)
        if note := model_note(config, used):
            print(note)
        print(dry_run(build_program(used)))
        return
    if flags.workdir is None:
        raise ConfigError("--workdir=FOLDER is missing")
    with joined(flags.coordinator, flags.num_processes, flags.process_id):
        train(
            find_stage(config.stage),
            config,
            workdir=flags.workdir,
            resume=flags.resume,
            init_from=flags.init_from,
            profile=read_profile(flags.profile),
            command=[sys.executable, *sys.argv],
        )


def read_profile(text: str | None) -> tuple[int, int] | None:
    """Parse FIRST:LAST."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigError(f"--profile={text} must be FIRST:LAST, two steps, such as 10:12")
    return int(first), int(last)


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
