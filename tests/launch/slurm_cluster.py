"""A real SLURM of one node on this machine, without root or systemd: `apt-get install slurm-wlm munge`.

python tests/launch/slurm_cluster.py COMMAND ...      # runs COMMAND within one, and stops it
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PATH = f"{os.environ['PATH']}:/usr/sbin"


def missing() -> list[str]:
    """What is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def configuration(folder: Path) -> str:
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    controller, daemon = free_ports(2)
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A context in which sbatch, scancel and the others of this process and its children use a SLURM of their
    own, whose files lie in `folder`."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(configuration(folder))
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.chmod(0o600)
    key.write_bytes(os.urandom(128))
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
    files |= {"seed-file": "munge.seed", "log-file": "munge.log"}
    daemons = [
        ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf")],
    ]
    before = dict(os.environ)
    os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    started = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.out").open("w") as output:
                started.append(subprocess.Popen(command, stdout=output, stderr=output))
            time.sleep(0.5)
        wait_until(lambda: "idle" in output_of("sinfo", "--noheader", "--format=%T"), "a node that is idle")
        yield
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], capture_output=True)
            wait_until(lambda: not output_of("squeue", "--noheader"), "an empty queue")
        for process in reversed(started):
            process.terminate()
            process.wait()
        os.environ.clear()
        os.environ.update(before)


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait_until(reached, what: str, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} after {timeout:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, slurm(Path(name)):
        code = subprocess.run(sys.argv[1:]).returncode
    sys.exit(code)
