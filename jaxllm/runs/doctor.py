"""What may be wrong with the processes of a run before it starts: for experiments/doctor.py.

Every process states facts about itself; all compare them, and the first prints a table and what is wrong.
"""

import contextlib
import glob
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.data.sources import open_source
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import ConfigError
from jaxllm.files import is_url
from jaxllm.parallel import processes
from jaxllm.parallel.global_arrays import place
from jaxllm.parallel.sharding import MeshConfig, make_mesh, order_of_devices
from jaxllm.store import Store, StoreError, local_path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
CLOCK_LIMIT = 2.0  # seconds apart: locks and checkpoints are told apart by times
ALL_REDUCE_MB, MATRIX = 16, {"cpu": 1024}  # megabytes a device; rows of a square matrix
FREE_LIMIT = 1e9  # bytes of disk


@dataclass(frozen=True)
class Facts:
    """What one process knows of itself."""

    host: str
    platform: str  # "gpu"
    kind: str  # "NVIDIA H100 80GB HBM3"
    devices: int  # that it computes on
    accelerators: int  # that its machine has, whether it sees them or not
    versions: dict[str, str]
    clock: float  # seconds, read at the same moment by all
    memory: int  # free bytes of the machine
    device_memory: int | None  # free bytes of its first device
    disks: dict[str, int]  # folder -> free bytes; -1: it cannot be written
    seen: dict[str, bool]  # folder -> whether a file of process 0 is there
    fingerprints: dict[str, str]  # of tokenizer and data
    coordinator: str | None


def diagnose(folders: Sequence[str], tokenizer: str | None, sources: Sequence[str]) -> int:
    """Print a table of the processes, timings, and what is wrong; the number of problems.

    Args:
      folders: that all processes must share. tokenizer, sources: that must be the same in all.
    """
    facts = [Facts(**json.loads(text)) for text in exchange_facts(folders, tokenizer, sources)]
    timings = [*time_devices()]
    found = [*problems(facts)]
    if processes.is_first():
        print(table(facts))
        print("\n".join(timings))
        for line in found:
            print(f"problem: {line}")
        print(f"{len(found)} problem(s) found" if found else "no problem found")
    return len(found)


def exchange_facts(folders: Sequence[str], tokenizer: str | None, sources: Sequence[str]) -> list[str]:
    """The Facts of every process as JSON."""
    for folder in folders:
        check_store(folder)
    paths = [local_path(folder) for folder in folders if not is_url(folder)]
    name = f".doctor-{processes.first_process_decides(lambda: secrets.token_hex(4))}.tmp"
    disks = {str(path): free_disk(path) for path in paths}
    fingerprints = {} if tokenizer is None else {f"tokenizer {tokenizer}": load_tokenizer(tokenizer).hash}
    for each in sources:
        source = open_source(each, split="train", text_key="text", synthetic_rows=1, seed=0)
        fingerprints[f"data {each}"] = source.content_hash
    with left_by_first(paths, name):
        seen = {str(path): (path / name).exists() for path in paths}
        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        processes.barrier("clock")
        facts = Facts(
            clock=time.time(),
            host=socket.gethostname(),
            platform=device.platform,
            kind=device.device_kind,
            devices=jax.local_device_count(),
            accelerators=accelerators(),
            versions=versions(),
            memory=free_memory(),
            device_memory=stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None,
            disks=disks,
            seen=seen,
            fingerprints=fingerprints,
            coordinator=processes.coordinator(),
        )
        return processes.exchange("facts", json.dumps(asdict(facts)))


def check_store(folder: str) -> None:
    """ConfigError where this process cannot write to a URL; nothing for any other folder."""
    if is_url(folder):
        name = f".doctor-{secrets.token_hex(4)}.tmp"
        try:
            Store(folder).write(name, b"")
            Store(folder).delete([name])
        except StoreError as error:
            raise ConfigError(f"{folder} cannot be written to: {error}") from error


@contextlib.contextmanager
def left_by_first(paths: Sequence[Path], name: str) -> Iterator[None]:
    """A context in which process 0 has left a file of this name in each folder."""
    if processes.is_first():
        for path in paths:
            with contextlib.suppress(OSError):
                (path / name).touch()
    processes.barrier("files of process 0")
    try:
        yield
    finally:
        if processes.is_first():
            for path in paths:
                (path / name).unlink(missing_ok=True)


def accelerators() -> int:
    """GPUs or TPU chips of this machine, by their device files."""
    return len(glob.glob("/dev/nvidia[0-9]*")) or len(glob.glob("/dev/accel[0-9]*"))


def versions() -> dict[str, str]:
    """Of Python and of what the processes must have alike."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def free_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_disk(path: Path) -> int:
    """Bytes; -1 where nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(path).free if os.access(path, os.W_OK) else -1
    except OSError:
        return -1


def time_devices() -> Iterator[str]:
    """Seconds of a matrix product on each device, and of an all-reduce over all of them."""
    mesh = make_mesh(MeshConfig(-1, 1, 1))
    count, kind = jax.device_count(), jax.devices()[0].platform
    size = MATRIX.get(kind, 4096)
    rows = NamedSharding(mesh, P("data"))
    x = place(np.ones((count, size, size), jnp.bfloat16), rows)
    product = jax.jit(lambda x: jnp.einsum("nij,njk->nik", x, x), out_shardings=rows)
    seconds = fastest(lambda: product(x))
    yield f"matrix product: {2 * size**3 / seconds / 1e12:.3g} TFLOP/s a device ({size} rows, bfloat16)"
    y = place(np.ones((count, ALL_REDUCE_MB << 18), np.float32), rows)
    total = jax.jit(lambda y: y.sum(0), out_shardings=NamedSharding(mesh, P()))
    seconds = fastest(lambda: total(y))
    yield f"all-reduce: {ALL_REDUCE_MB} MB over {count} devices in {1000 * seconds:.3g} ms"
    yield f"devices as PROCESS.DEVICE: {order_of_devices(mesh)}"


def fastest(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest call after the first, which compiles."""
    jax.block_until_ready(work())
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def table(facts: Sequence[Facts]) -> str:
    """A line for each process."""
    rows = [("process", "host", "devices", "free memory", "of a device", "free disk")]
    for index, each in enumerate(facts):
        rows.append(
            (
                str(index),
                each.host,
                f"{each.devices} x {each.kind} ({each.platform})",
                f"{each.memory / 1e9:.1f} GB",
                "-" if each.device_memory is None else f"{each.device_memory / 1e9:.1f} GB",
                ", ".join(f"{free / 1e9:.0f} GB" for free in each.disks.values()) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            f"coordinator: {facts[0].coordinator or 'none, a single process'}",
            ", ".join(f"{name} {version}" for name, version in facts[0].versions.items()),
        ]
    )


def problems(facts: Sequence[Facts]) -> Iterator[str]:
    """What is wrong with these processes, a line each, with what to do."""
    yield from device_problems(facts)
    hosts = {each.host for each in facts}
    address = (facts[0].coordinator or "").rpartition(":")[0]
    if len(hosts) > 1 and (address.startswith("127.") or address in ("localhost", "[::1]", "::1")):
        yield f"the coordinator {address} is loopback, but there are {len(hosts)} hosts: name a host"
    for index, each in enumerate(facts[1:], 1):
        if (apart := abs(each.clock - facts[0].clock)) > CLOCK_LIMIT:
            yield f"the clock of process {index} ({each.host}) is {apart:.1f} s off process 0's: run NTP"
        for name in facts[0].versions.keys() | each.versions.keys():
            ours, theirs = facts[0].versions.get(name), each.versions.get(name)
            if ours != theirs:
                yield f"process {index} has {name} {theirs}, process 0 has {ours}: install the same"
        for name, value in each.fingerprints.items():
            if value != facts[0].fingerprints.get(name):
                yield f"{name} is another in process {index} ({each.host}) than in process 0: copy it"
    for index, each in enumerate(facts):
        for folder, free in each.disks.items():
            if free < FREE_LIMIT:
                what = "cannot be written" if free < 0 else f"has {free / 1e9:.2g} GB free"
                yield f"{folder} {what} in process {index} ({each.host})"
            elif not each.seen[folder]:
                yield f"{folder} of process {index} ({each.host}) is not that of process 0: use a shared disk"


def device_problems(facts: Sequence[Facts]) -> Iterator[str]:
    """Devices that are not used, or that several processes would use."""
    on_host = Counter(each.host for each in facts)
    if len({each.devices for each in facts}) > 1:
        counts = ", ".join(str(each.devices) for each in facts)
        yield f"the processes have different numbers of devices ({counts}): give all of them as many"
    for index, each in enumerate(facts):
        name = f"process {index} ({each.host})"
        if each.platform == "cpu" and each.accelerators:
            yield (
                f"{name} computes on the CPU of a machine with {each.accelerators} accelerators: install "
                "jaxllm[cuda] or jaxllm[tpu], and unset JAX_PLATFORMS"
            )
        if each.platform != "gpu":
            continue
        used = each.devices * on_host[each.host]
        if used > each.accelerators > 0:
            yield (
                f"{name} sees {each.devices} of {each.accelerators} devices, which {on_host[each.host]} "
                "processes of this host share: set CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS for each"
            )
        elif used < each.accelerators:
            yield f"the processes of {each.host} use {used} of its {each.accelerators} devices"
