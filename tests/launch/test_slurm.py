"""A job array in a real SLURM: stopped, requeued, canceled. tests/launch/test_slurm_script.py holds the rest
of the contract without one."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import missing, output_of, slurm, wait_until

from jaxllm.errors import ConfigError
from jaxllm.launch.slurm import SlurmOptions, submit_array

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"needs SLURM: apt-get install slurm-wlm munge ({', '.join(missing())} missing)"
)

# A run: it waits for SIGTERM, saves, and exits with 75; started again, it resumes and is done.
RUN = """
import os, pathlib, signal, sys, time
name = pathlib.Path(sys.argv[1])
if name.exists():
    print("resumed by task", os.environ["SLURM_PROCID"], flush=True)
    sys.exit(0)
def stop(*_):
    name.write_text("saved")
    print("stopped", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory() as folder, slurm(Path(folder)):  # short: a socket's path has a limit
        yield


def test_an_array_is_stopped_and_requeued_and_what_is_canceled_or_wrong_is_not(cluster, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    run = [sys.executable, str(tmp_path / "run.py")]
    commands = [[*run, str(tmp_path / f"saved {number}")] for number in range(3)]
    wrong = [sys.executable, "-c", "raise SystemExit(78)"]
    folder = tmp_path / "jobs of an array"
    job = submit_array([*commands, wrong], folder, SlurmOptions(cpus_per_task=1, mem="100"))

    def printed(number):
        file = folder / f"slurm-{job}_{number}.txt"
        return file.read_text().splitlines() if file.exists() else []

    def state(number):
        text = output_of("scontrol", "--oneliner", "show", "job", f"{job}_{number}")
        return text.partition("JobState=")[2].partition(" ")[0], text.partition(" Restarts=")[2][:1]

    wait_until(lambda: all(printed(number) for number in range(3)), "started tasks")
    subprocess.run(["scancel", "--signal=TERM", f"{job}_0", f"{job}_1"], check=True)
    subprocess.run(["scancel", f"{job}_2"], check=True)
    for number in range(2):
        wait_until(lambda n=number: state(n) == ("PENDING", "1"), f"requeued task {number}")
        # SLURM itself waits two minutes, until the credentials of the first start have expired
        subprocess.run(["scontrol", "update", f"JobId={job}_{number}", "StartTime=now"], check=True)
    for number in range(2):
        wait_until(lambda n=number: state(n)[0] == "COMPLETED", f"end of task {number}")
        lines = [line for line in printed(number) if not line.startswith(("srun", "slurmstepd"))]
        assert lines == ["started", "stopped", "resumed by task 0"]
        assert state(number) == ("COMPLETED", "1")
    assert state(2) == ("CANCELLED", "0")
    assert state(3) == ("FAILED", "0")


def test_several_tasks_are_one_step(cluster, tmp_path):
    show = [sys.executable, "-c", "import os; print(os.environ['SLURM_PROCID'], os.environ['SLURM_NTASKS'])"]
    job = submit_array([show], tmp_path, SlurmOptions(tasks_per_node=2, mem="100"))
    file = tmp_path / f"slurm-{job}_0.txt"
    wait_until(lambda: file.exists() and len(file.read_text().splitlines()) == 2, "output of two tasks")
    assert sorted(file.read_text().splitlines()) == ["0 2", "1 2"]


def test_an_option_that_sbatch_refuses_is_named(cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"array.sbatch: .*invalid partition"):
        submit_array([["true"]], tmp_path, SlurmOptions(partition="none"))
