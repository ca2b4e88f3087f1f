"""SLURM: commands as a job array, in an sbatch file that can be read, edited and submitted by hand.

A command that was stopped and has saved (exit code 75), or that lost a process or its machine, is requeued;
one that failed for a reason of its own is not. `scancel --signal=TERM JOB` stops and requeues a job; `scancel
JOB` ends it for good, at its last checkpoint.

Why not submitit: its array is of pickled Python functions, which nobody can read, edit or submit by hand; it
requeues when SLURM sends SIGUSR2, not by the exit code of a run; and it shields what it runs from SIGTERM.
"""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.files import write_file

# Exit codes after which a run resumes: stopped, a process lost; aborted by JAX, which lost one; killed;
# stopped before the run could save. Not 70 (numerics) and 78 (config), which would only repeat.
RELAUNCH = (75, 71, 134, 137, 143)
SCRIPT = "array.sbatch"


@dataclass(frozen=True)
class SlurmOptions:
    """What each command of an array gets. None leaves a choice to the cluster."""

    nodes: int = 1
    tasks_per_node: int = 1  # processes; one takes all GPUs of its node
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem: str | None = None  # memory a node, such as 64G
    time: str | None = None  # limit, such as 24:00:00; a run that reaches it is requeued
    partition: str | None = None
    account: str | None = None
    max_parallel: int | None = None  # commands that run at once
    max_restarts: int = 50  # of a command, for whatever reason
    grace: int = 120  # seconds before the limit at which a run is told to save
    setup: tuple[str, ...] = ()  # lines of bash before the command, such as "module load cuda"
    sbatch: tuple[str, ...] = ()  # further options of sbatch, such as "qos=high"; they replace those above

    def __post_init__(self):
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "max_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--slurm.{name}={value} must be at least 1")


def submit_array(commands: Sequence[Sequence[str]], folder: Path, options: SlurmOptions) -> str:
    """Write `folder/array.sbatch`, submit it, and return the job's id; ID_N is the command N. What the
    commands print goes to `folder/slurm-ID_N.txt`. They run in the present working directory.

    Raises ConfigError with what sbatch says where it refuses, or is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / SCRIPT
    write_file(script, array_script(commands, folder, options).encode())
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"sbatch is not on this machine: run `sbatch {script}` where it is") from None
    if done.returncode:
        raise ConfigError(f"{script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]  # ID;CLUSTER


def array_script(commands: Sequence[Sequence[str]], folder: Path, options: SlurmOptions) -> str:
    """The sbatch file of these commands, each an argument vector."""
    if not commands:
        raise ConfigError("no command to submit")
    at_once = "" if options.max_parallel is None else f"%{options.max_parallel}"
    folder = folder.absolute()
    settings = {
        "job-name": next(name for name in reversed(folder.parts) if name != "logs"),
        "array": f"0-{len(commands) - 1}{at_once}",
        "chdir": Path.cwd(),
        "output": folder / "slurm-%A_%a.txt",
        "open-mode": "append",  # a requeued command continues its file
        "requeue": "",
        "signal": f"TERM@{options.grace}",  # to the command, not to this script
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "cpus-per-task": options.cpus_per_task,
        "gpus-per-node": options.gpus_per_node,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
    }
    for option in options.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        settings[name] = value
    header = [
        f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if value != "" else "")
        for name, value in settings.items()
        if value is not None
    ]
    cases = [f"  {number}) command=({shlex.join(each)}) ;;" for number, each in enumerate(commands)]
    # srun does not inherit --cpus-per-task.
    cpus = "" if options.cpus_per_task is None else f" --cpus-per-task={options.cpus_per_task}"
    body = f"""
case $SLURM_ARRAY_TASK_ID in
{chr(10).join(cases)}
esac

# No trap here: `scancel JOB` ends this script, so that nothing requeues what was canceled.
srun --kill-on-bad-exit=1{cpus} "${{command[@]}}"
code=$?
case $code in
  {"|".join(map(str, RELAUNCH))})
    # Not $SLURM_JOB_ID: that of one of the commands is the id of the whole array.
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {options.max_restarts} ]; then
      scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
    fi ;;
esac
exit $code
"""
    return "\n".join(["#!/bin/bash", *header, "", *options.setup, body.lstrip("\n")])
