"""Devices to compile for: those of a TPU slice or of GPUs that are not there, or fake devices of the CPU."""

import importlib.metadata
import importlib.util
from collections.abc import MutableMapping
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxllm.parallel.sharding import Device
from jaxllm.plan.hardware import Chip, Hardware

PLUGINS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
CUDNN = 91200  # the version that a GPU's programs are compiled for


class Target(NamedTuple):
    """Devices, in the order of the topology, and what compiles for them."""

    devices: list[Device]
    compiler: str
    note: str  # why it is not the hardware's own compiler; "": it is


def set_environment(environment: MutableMapping[str, str], hardware: Hardware) -> None:
    """What must be set before jax is imported, so that its compilers look for no device."""
    environment["JAX_PLATFORMS"] = "cpu"
    environment["TPU_SKIP_MDS_QUERY"] = environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    flags = [environment.get("XLA_FLAGS", "")]
    if hardware.chip.platform == "gpu" and has_compiler(hardware):
        flags.append("--xla_gpu_autotune_level=0")  # to measure which kernel is fastest takes the GPU
    environment["XLA_FLAGS"] = " ".join(flags).strip()


def has_compiler(hardware: Hardware) -> bool:
    """Whether the compiler of this hardware is installed."""
    return importlib.util.find_spec(PLUGINS[hardware.chip.platform]) is not None


def find_target(hardware: Hardware) -> Target:
    """The devices of a process whose environment is `set_environment`'s, before it has used any."""
    platform = hardware.chip.platform
    if not has_compiler(hardware):
        jax.config.update("jax_num_cpu_devices", hardware.count)
        install = f"pip install 'jax[tpu]=={jax.__version__}'"
        if platform == "gpu":
            names = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
            install = f"pip install --no-deps {' '.join(f'{name}=={jax.__version__}' for name in names)}"
        note = (
            f"{PLUGINS[platform]} is not installed: compiled by the CPU's compiler for {hardware.count} fake "
            f"devices, with model.attention=xla, and of little use for temporaries; {install}"
        )
        return Target(jax.devices("cpu"), "cpu", note)
    if platform == "tpu":
        topology = topologies.get_topology_desc(hardware.topology, "tpu", **hosts(hardware))
    else:
        answer_for(hardware.chip)
        text = target_text(hardware.chip)
        topology = topologies.get_topology_desc("", "cuda", target_config=text, topology=hardware.topology)
    version = importlib.metadata.version(PLUGINS[platform])
    return Target(list(topology.devices), f"{PLUGINS[platform]} {version}", "")


def hosts(hardware: Hardware) -> dict[str, tuple[int, ...]]:
    """How many chips along each axis of the torus one host has, where that is not 2 x 2."""
    bounds = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}  # 8 chips of v5e and v6e are one host's
    _, _, shape = hardware.topology.partition(":")
    return {"chips_per_host_bounds": bounds[shape]} if shape in bounds else {}


def target_text(chip: Chip) -> str:
    """A GPU as XLA's GpuTargetConfigProto; limits of a block and a core are the same since Hopper."""
    major, minor = chip.capability.split(".")
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "threads_per_core_limit": 2048,
        "core_count": chip.multiprocessors,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(chip.memory_bandwidth),
        "l2_cache_size": 50 * 2**20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": int(chip.memory),
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in device.items())
    cudnn = f"major: {CUDNN // 10000} minor: {CUDNN // 100 % 100}"
    return (
        f"gpu_device_info {{\n{fields}\n  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        f'platform_name: "CUDA"\nruntime_version {{ major: 13 minor: 0 patch: 0 }}\n'
        f'dnn_version_info {{ {cudnn} }}\ndevice_description_str: "{chip.kind}"\n'
    )


def answer_for(chip: Chip) -> None:
    """Let jax ask the target, instead of a GPU that is not there, what its cuDNN attention supports."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    fused.check_cudnn_version = lambda: CUDNN
    fused.check_compute_capability = lambda text: version(text) <= version(chip.capability)
    fused.is_cuda_compute_capability_equal = lambda text: text == chip.capability
