"""Where a process stands among those of its run: flags, or what its launcher says."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax._src import clusters  # no public name: pyproject.toml bounds the version of jax

from jaxllm.errors import ConfigError

CLUSTERS = ("slurm", "ompi", "gcetpu", "gketpu")  # of those that JAX finds by itself


class Place(NamedTuple):
    """Where a process stands among those of its run."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    gpus: list[int] | None  # those that it takes; None: all that it sees


def find_place(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    """The place of this process among several; None where it is alone.

    SLURM (srun), Open MPI and TPU pods say it. Elsewhere all three are given: `coordinator` is HOST:PORT of
    process 0. num_processes=1 is a single process, wherever it runs. Raises ConfigError.
    """
    if num_processes == 1:
        return None
    if coordinator is None and num_processes is None and process_id is None:
        return _place_in_cluster()
    if coordinator is None or num_processes is None or process_id is None:
        given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
        missing = " and ".join(f"--{name}" for name, value in given.items() if value is None)
        raise ConfigError(f"{missing} missing: several processes need all three flags")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id} must be from 0 to {num_processes - 1}")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT of process 0")
    return Place(coordinator, num_processes, process_id, None)


def _place_in_cluster() -> Place | None:
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.name in CLUSTERS and cluster.is_env_present():
            count = cluster.get_process_count()
            if count == 1:
                return None
            address = cluster.get_coordinator_address(300, os.environ.get("JAX_COORDINATOR_PORT"))
            return Place(address, count, cluster.get_process_id(), gpus_of(os.environ))
    return None


def gpus_of(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that it sees a task of SLURM or Open MPI takes; None: all.

    JAX would take the one of its number on the node, which leaves the others idle where a node has one task,
    and does not exist where the tasks are bound to their GPUs.
    """
    if "SLURM_PROCID" in environment:
        tasks = _tasks_on_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"), environment)
        number, is_bound = int(environment.get("SLURM_LOCALID", "0")), "SLURM_GPUS_PER_TASK" in environment
    else:
        tasks = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
        number, is_bound = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")), False
    if ids := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(each) for each in ids.split(",")]
    visible = [each for each in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    seen = len(visible) or int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    if tasks == 1 or is_bound or 0 < seen < tasks:
        return None
    share = max(1, seen // tasks)
    return list(range(number * share, (number + 1) * share))


def _tasks_on_node(text: str, environment: Mapping[str, str]) -> int:
    """Of this node, in SLURM's `2(x3),1`: two tasks on each of three nodes, one on the next."""
    counts = []
    for part in text.split(","):
        count, _, repeated = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeated or 1)
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]
