"""The sbatch file of a job array: what each command gets, and which exit codes requeue it."""

import os
import subprocess

import pytest

from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    ProcessLost,
    RunError,
    Stopped,
)
from jaxllm.launch.slurm import RELAUNCH, SlurmOptions, array_script, submit_array


def executable(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run_task(tmp_path, script, number, **environment):
    """Run a script as the task of an array, with an srun that runs its command in place and an scontrol that
    prints what it is told. Returns the exit code and what was printed."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    executable(programs, "srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
    executable(programs, "scontrol", 'echo "scontrol $*"')
    task = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7"}
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **task, **environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def exits(code):
    return ["bash", "-c", f"exit {code}"]


def test_each_task_runs_its_command_with_its_arguments_as_they_are(tmp_path):
    commands = [["printf", "%s|", "a b", "$HOME", "'\"\\", "*"], ["echo", "two"]]
    script = array_script(commands, tmp_path, SlurmOptions(setup=("echo ready",)))
    assert run_task(tmp_path, script, 0) == (0, "ready\na b|$HOME|'\"\\|*|")
    assert run_task(tmp_path, script, 1) == (0, "ready\ntwo\n")


@pytest.mark.parametrize("code", [0, 1, *RELAUNCH, 70, 78])
def test_what_was_stopped_or_lost_is_requeued_and_what_failed_is_not(tmp_path, code):
    script = array_script([exits(0), exits(code)], tmp_path, SlurmOptions())
    # by its place in the array: its own id is that of the array for one of the tasks
    requeued = "scontrol requeue 7_1\n" if code in (71, 75, 134, 137, 143) else ""
    assert run_task(tmp_path, script, 1) == (code, requeued)


def test_errors_that_would_repeat_are_not_requeued():
    repeats = {
        error.exit_code for error in (RunError, ConfigError, DataError, NumericsError, CheckpointError)
    }
    assert not repeats & set(RELAUNCH)
    assert {Stopped.exit_code, ProcessLost.exit_code} <= set(RELAUNCH)


def test_requeueing_ends_at_the_number_of_restarts(tmp_path):
    script = array_script([exits(75)], tmp_path, SlurmOptions(max_restarts=2))
    assert run_task(tmp_path, script, 0, SLURM_RESTART_COUNT="1")[1] == "scontrol requeue 7_0\n"
    assert run_task(tmp_path, script, 0, SLURM_RESTART_COUNT="2") == (75, "")


def test_options_become_lines_and_further_ones_replace_them(tmp_path):
    options = SlurmOptions(
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=4,
        time="1:00:00",
        max_parallel=3,
        sbatch=("qos=high", "--signal=TERM@300", "exclusive"),
    )
    lines = array_script([["true"]] * 5, tmp_path / "a b", options).splitlines()
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=2", "gpus-per-node=8", "time=1:00:00", "array=0-4%3", "qos=high", "exclusive"} <= set(
        found
    )
    assert [each for each in found if each.startswith("signal")] == ["signal=TERM@300"]
    assert f"output='{tmp_path}/a b/slurm-%A_%a.txt'" in found
    assert not any(each.startswith(("mem", "account", "partition")) for each in found)
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=4" in srun


def test_without_sbatch_the_file_is_written_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch is not on this machine: run `sbatch .*/array.sbatch`"):
        submit_array([["true"]], tmp_path / "jobs", SlurmOptions())
    assert (tmp_path / "jobs" / "array.sbatch").exists()


def test_the_words_of_sbatch_are_the_error(tmp_path, monkeypatch):
    executable(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"array\.sbatch: sbatch: error: invalid partition"):
        submit_array([["true"]], tmp_path, SlurmOptions(partition="none"))


@pytest.mark.parametrize("name", ["nodes", "tasks_per_node", "gpus_per_node", "max_parallel"])
def test_numbers_below_one_are_named(name):
    with pytest.raises(ConfigError, match=f"--slurm.{name}=0 must be at least 1"):
        SlurmOptions(**{name: 0})
