"""Chips by the name that one rents them by: memory, speed, network, and how their compiler knows them."""

import re
from typing import NamedTuple

from jaxllm.config import did_you_mean
from jaxllm.errors import ConfigError
from jaxllm.training.metrics import peak_flops


class Chip(NamedTuple):
    """One device of JAX. Bandwidths are in bytes/s; peak FLOP/s are in `jaxllm.training.metrics`."""

    kind: str  # JAX's device_kind
    memory: float  # bytes
    memory_bandwidth: float
    network: float  # into a chip over all of its links at once: ICI of a TPU, NVLink of a GPU
    cores: int = 1  # by which its maker counts: "v5p-128" are 64 chips
    capability: str = ""  # of a GPU: its CUDA compute capability
    multiprocessors: int = 0

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        return "gpu" if self.capability else "tpu"

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak


# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e ("key specifications": HBM bandwidth, and ICI bandwidth, in
# bits/s over all links of a chip in one direction); memory is what their compiler leaves of it.
# GPUs: NVIDIA's data sheets of H100, H200 and DGX B200 (1440 GB and 64 TB/s in eight); NVLink counts both
# directions there and one of them here. H100's 80 GB are 79.1 GiB to CUDA.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75 * 2**30, 819e9, 1600e9 / 8),
    "v5p": Chip("TPU v5", 95.74 * 2**30, 2765e9, 4800e9 / 8, cores=2),
    "v6e": Chip("TPU v6 lite", 31.25 * 2**30, 1640e9, 3200e9 / 8),
    "h100": Chip("NVIDIA H100 80GB HBM3", 84.9e9, 3352e9, 450e9, 1, "9.0", 132),
    "h200": Chip("NVIDIA H200", 141e9, 4800e9, 450e9, 1, "9.0", 132),
    "b200": Chip("NVIDIA B200", 180e9, 8000e9, 900e9, 1, "10.0", 148),
}

# Slices that can be rented: chips -> their torus.
TORUS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
TORUS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
NVLINKED = 8  # GPUs of a host
MEMORY_FRACTION = 0.95  # of a GPU's memory that a program can have (XLA_PYTHON_CLIENT_MEM_FRACTION)


class Hardware(NamedTuple):
    """So many chips of a kind."""

    name: str
    chip: Chip
    count: int
    topology: str  # as the compiler takes it

    @property
    def memory(self) -> float:
        """Bytes of a chip that a program can have."""
        return self.chip.memory * (MEMORY_FRACTION if self.chip.platform == "gpu" else 1)


def find_hardware(name: str) -> Hardware:
    """The hardware of a name such as v5e-64 or h100x8; ConfigError, with the names there are, for others."""
    match = re.fullmatch(r"(\w+?)(?:-|x)(\d+)", name)
    family, number = (match[1], int(match[2])) if match else (name, 0)
    if family not in CHIPS:
        known = ", ".join(f"{each}{'x8' if chip.capability else '-8'}" for each, chip in CHIPS.items())
        raise ConfigError(
            f"--hardware={name}: name a chip and how many{did_you_mean(family, CHIPS)}: {known}"
        )
    chip = CHIPS[family]
    count = number // chip.cores
    if chip.platform == "gpu":
        if not 1 <= count <= NVLINKED:
            raise ConfigError(
                f"--hardware={name}: choose one of {family}x1 to {family}x{NVLINKED}: plans know no network "
                "between hosts"
            )
        return Hardware(name, chip, count, f"1x1x{count}")
    sizes = TORUS_3D if family == "v5p" else TORUS_2D
    if count not in sizes or number % chip.cores:
        names = ", ".join(f"{family}-{size * chip.cores}" for size in sizes)
        raise ConfigError(f"--hardware={name}: no such slice; there are {names}")
    return Hardware(name, chip, count, f"{family}:{sizes[count]}")
