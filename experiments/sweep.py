r"""Train a config many times with other values of its fields: the trials that its `sweep()` yields.

    python experiments/sweep.py --config=configs/sweep_pretrain.py --workdir=runs/sweep --parallel=2
    python experiments/report.py runs/sweep
    python experiments/sweep.py --config=configs/sweep_pretrain.py --workdir=runs/sweep --confirm=3

WORKDIR then holds a run folder for each trial, and sweep.json. The same command again continues, and runs
failed trials again. --trials=N searches instead, by Optuna and the config's `search(trial)`.
"""

import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script, with_fields
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags, besides --config and --print_config."""
    from absl import flags

    text, number, switch = (
        functools.partial(define, flag_values=flag_values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool)
    )
    text("workdir", None, "folder for sweep.json and a run folder for each trial")
    flags.DEFINE_enum(
        "launcher",
        "local",
        ["print", "local", "slurm"],
        "print: the commands alone; local: processes of this machine; slurm: an array job",
        flag_values=flag_values,
    )
    flags.DEFINE_multi_string(
        "slurm", [], "FIELD=VALUE of SlurmOptions, such as time=24:00:00; repeated", flag_values=flag_values
    )
    number("parallel", 1, "trials at a time, each with its share of the devices or cores (local)")
    switch("resume", True, "continue the sweep that WORKDIR holds; --noresume: an error if there is one")
    number("retries", 2, "how many times a crashed trial is started again (local)")
    text(
        "metric", None, "what trials are compared by; of a pipeline RUN:METRIC; default: the stage's headline"
    )
    flags.DEFINE_enum(
        "goal", None, ["lowest", "highest"], "which values of --metric are better", flag_values=flag_values
    )
    text("init_from", None, "initialize every trial from this run folder, RUN/best or step folder")
    number("trials", None, "search: this many trials in all, suggested by Optuna and search(trial)")
    switch("prune", True, "stop trials of a search that are behind the median of the others")
    number("confirm", 0, "run the best config again with this many fresh seeds")
    switch("dry_run", False, "check and list the trials, and exit")


def config_class(config: "ConfigDict") -> type:
    """The config dataclass of a stage or of a pipeline. Imported late: it needs jax."""
    from jaxllm.pipeline.config import pipeline_class
    from jaxllm.stages import find_stage

    return find_stage(config.stage).Config if "stage" in config else pipeline_class(config)


def main(argv: Sequence[str], config: Any, flags: "FlagValues") -> int:
    """List, print, submit or run the trials. Returns the exit code."""
    from jaxllm.launch.slurm import SlurmOptions, submit_array
    from jaxllm.sweep.run import Options, run_sweep
    from jaxllm.sweep.trials import Base

    if flags.workdir is None:
        raise ConfigError("--workdir=FOLDER is missing")
    script = "train.py" if hasattr(config, "stage") else "pipeline.py"
    if flags.init_from is not None and script == "pipeline.py":
        raise ConfigError("--init_from: a pipeline trains from random weights")
    if flags.slurm and flags.launcher != "slurm":
        raise ConfigError(f"--slurm is for --launcher=slurm, not {flags.launcher}")
    slurm = with_fields(SlurmOptions(), flags.slurm, "--slurm")
    more = {} if flags.init_from is None else {"init_from": flags.init_from}
    given = [each.lstrip("-") for each in argv]
    overrides = [each.removeprefix("config.").partition("=") for each in given if each.startswith("config.")]
    fields = {field: text for field, _, text in overrides}
    return run_sweep(
        Base(flags.config, type(config), fields, Path(__file__).with_name(script), more),
        config,
        Options(**{name: flags[name].value for name in Options._fields}),
        command=shlex.join(["python", *argv]),
        submit=functools.partial(submit_array, options=slurm),
    )


if __name__ == "__main__":
    sys.exit(run_script(functools.partial(main, sys.argv), config_class, define_flags))
