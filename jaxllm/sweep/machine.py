"""What this machine has to share among trials: cores and devices."""

import os
import subprocess
import sys
from typing import NamedTuple

from jaxllm.errors import ConfigError, RunError

# In a process of its own: this one must hold no device that a trial needs.
_PROBE = (
    "import jax; d = jax.local_devices(); v = d[0].client.platform_version.lower(); "
    "print('rocm' if 'rocm' in v else d[0].platform, len(d))"
)
_VISIBLE = {
    "gpu": "CUDA_VISIBLE_DEVICES",
    "cuda": "CUDA_VISIBLE_DEVICES",
    "rocm": "ROCR_VISIBLE_DEVICES",
    "tpu": "TPU_VISIBLE_CHIPS",
}
# The grid of a process's chips, by their number (JAX's page on several processes a TPU host).
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


class Machine(NamedTuple):
    platform: str  # as JAX calls it: cpu, gpu, tpu; rocm apart
    devices: tuple[str, ...]  # as the variable of _VISIBLE names them; none on a CPU
    cores: tuple[int, ...]  # that this process may use; none where the system cannot pin


class Share(NamedTuple):
    """Of one trial at a time."""

    cores: tuple[int, ...]  # none: not pinned
    environment: dict[str, str]


def find_machine() -> Machine:
    """Ask JAX, in a process of its own, which devices it sees."""
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return Machine("cpu", (), cores)
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"JAX finds no device: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    platform, count = done.stdout.split()[-2:]
    if platform not in _VISIBLE:
        return Machine(platform, (), cores)
    named = [each for each in os.environ.get(_VISIBLE[platform], "").split(",") if each]
    return Machine(platform, tuple(named or map(str, range(int(count)))), cores)


def split(machine: Machine, parallel: int) -> list[Share]:
    """Equal shares of the devices and cores for so many trials at a time; what is left over stays idle.

    >>> [share.cores for share in split(Machine("cpu", (), (0, 1, 2, 3, 4)), 2)]
    [(0, 1), (2, 3)]
    """
    what = f"{machine.platform} devices" if machine.devices else "cores"
    there = len(machine.devices or machine.cores) or os.cpu_count() or 1
    if not 1 <= parallel <= there:
        raise ConfigError(f"--parallel={parallel} must be between 1 and {there}, the {what} of this machine")
    return [
        Share(_part(machine.cores, parallel, i), _environment(machine, _part(machine.devices, parallel, i)))
        for i in range(parallel)
    ]


def _part(all_of: tuple, parallel: int, i: int) -> tuple:
    size = max(1, len(all_of) // parallel)
    return all_of[i * size : (i + 1) * size]


def _environment(machine: Machine, devices: tuple[str, ...]) -> dict[str, str]:
    if not devices or len(devices) == len(machine.devices):
        return {}
    environment = {_VISIBLE[machine.platform]: ",".join(devices)}
    if machine.platform == "tpu":
        if len(devices) not in _TPU_BOUNDS:
            raise ConfigError(
                f"a trial cannot have {len(devices)} TPU chips, only 1, 2, 4 or 8: set --parallel"
            )
        bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[len(devices)], "TPU_PROCESS_BOUNDS": "1,1,1"}
        environment |= bounds
    return environment
