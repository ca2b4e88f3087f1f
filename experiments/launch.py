r"""Launch a command, such as a training run, on machines that a scheduler lends.

    python experiments/launch.py --target=slurm --slurm=nodes=2 --slurm=gpus_per_node=8 -- \
        python experiments/train.py --config=configs/pretrain_text.py:1m --workdir=/shared/runs/mine
    python experiments/launch.py --target=tpu_vm --print --set=name=mine --set=zone=us-east5-a -- python ...

With --print, print the file that would be submitted. SLURM is submitted to; for the other targets, which are
templates in `launch/`, the head of the printed file says how it is used.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script, use_config_file, with_fields
from jaxllm.errors import ConfigError
from jaxllm.files import is_url
from jaxllm.launch.slurm import SlurmOptions, array_script, submit_array
from jaxllm.launch.templates import fill

if TYPE_CHECKING:
    from absl.flags import FlagValues

FOLDER = Path(__file__).resolve().parents[1] / "launch"
TEMPLATES = {"tpu_vm": "tpu_vm.sh", "gke": "gke.yaml", "skypilot": "skypilot.yaml"}


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    targets = ["slurm", *TEMPLATES]
    flags.DEFINE_enum("target", None, targets, f"one of {', '.join(targets)}", flag_values=flag_values)
    flags.DEFINE_bool("print", False, "print the file and exit", flag_values=flag_values)
    flags.DEFINE_string(
        "folder",
        None,
        "of the sbatch file and what the job prints; default: WORKDIR/logs",
        flag_values=flag_values,
    )
    slurm = "FIELD=VALUE of SlurmOptions (jaxllm/launch/slurm.py), such as time=24:00:00"
    flags.DEFINE_multi_string("slurm", [], slurm, flag_values=flag_values)
    flags.DEFINE_multi_string("set", [], "NAME=VALUE in a template of launch/", flag_values=flag_values)
    flags.DEFINE_multi_string(
        "word", [], "a word of the command: what stands after --", flag_values=flag_values
    )


def main(_: None, flags: "FlagValues") -> None:
    """Submit the command, or print the file that does."""
    if flags.target is None or not flags.word:
        raise ConfigError("write --target=NAME, the other flags, then -- and the command")
    for word in flags.word:
        if word.startswith("--config="):
            use_config_file(word.removeprefix("--config="), lambda module, argument: None)
    if flags.target in TEMPLATES:
        for name, fix in (("slurm", "use --set=NAME=VALUE"), ("folder", "remove it")):
            if flags[name].value:
                raise ConfigError(f"--{name} is for --target=slurm, not {flags.target}: {fix}")
        if not flags.print:
            raise ConfigError(f"--target={flags.target} is not submitted from here: add --print")
        template = (FOLDER / TEMPLATES[flags.target]).read_text()
        print(fill(template, read_values(flags.set), flags.word), end="")
        return
    if flags.set:
        raise ConfigError("--set is for a template, not --target=slurm: use --slurm=FIELD=VALUE")
    folder = Path(flags.folder).expanduser() if flags.folder else logs_of(flags.word)
    options = with_fields(SlurmOptions(), flags.slurm, "--slurm")
    if flags.print:
        print(array_script([flags.word], folder, options), end="")
        return
    job = submit_array([flags.word], folder, options)
    print(f"job {job}; {folder}/slurm-{job}_0.txt has what it prints")


def read_values(settings: list[str]) -> dict[str, str]:
    """NAME=VALUE as a dictionary."""
    for each in settings:
        if "=" not in each:
            raise ConfigError(f"--set={each} must be NAME=VALUE")
    return dict(each.split("=", 1) for each in settings)


def logs_of(command: list[str]) -> Path:
    """The folder of logs in the WORKDIR of a command; ConfigError where it has none."""
    for word in command:
        if word.startswith("--workdir="):
            if is_url(word.removeprefix("--workdir=")):
                raise ConfigError("--folder=FOLDER is missing: SLURM's logs need a disk, not an object store")
            return Path(word.removeprefix("--workdir=")).expanduser() / "logs"
    raise ConfigError("--folder=FOLDER is missing: the command has no --workdir=FOLDER, with an =")


def words_as_flags(argv: list[str]) -> list[str]:
    """What stands after `--` as --word=WORD each."""
    end = argv.index("--") if "--" in argv else len(argv)
    return argv[:end] + [f"--word={word}" for word in argv[end + 1 :]]


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags, words_as_flags(sys.argv)))
