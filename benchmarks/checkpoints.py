"""What saving and restoring a checkpoint costs: seconds, MB/s beside a plain file, and host memory.

    python benchmarks/checkpoints.py [--gigabytes 1 4] [--rounds=3] [--folder=FOLDER]

The arrays are float32 in the shapes of a Llama. Each measurement is a process of its own. `blocked` is how
long training waits for `save`, which returns once the arrays are copied; `save` is until the checkpoint is
complete, with its hashes. The plain file has as many bytes, in blocks of 16 MiB with one fsync. Before it is
read, and before a checkpoint is restored, their pages are dropped from memory. `restore` checks the hashes.
Peak memory is that above the arrays, which on a CPU lie in the memory of the host; pages of files do not
count. The disk is that of --folder (default: of the temporary folder).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.hf_import import PeakMemory

MB = 10**6
BLOCK = 16 * 2**20
COLUMNS = ("plain write", "blocked", "save", "plain read", "restore")


def shapes(gigabytes: float) -> Any:
    """The shapes of about that many bytes of float32 parameters."""
    import jax

    from configs.base.models import model
    from jaxllm.config import parse
    from jaxllm.models import ModelConfig, build_model

    config = replace(parse(ModelConfig, model("llama3.2_1b")), vocab_size=16384, param_dtype="float32")
    layer = 4 * (2 * config.width**2 + config.width * 2 * 512 + 3 * config.width * config.mlp_width)
    layers = round((gigabytes * 1e9 - 4 * config.vocab_size * config.width) / layer)
    init = build_model(replace(config, num_layers=max(1, layers))).init
    return jax.eval_shape(init, jax.random.key(0))


def save(folder: Path, gigabytes: float) -> dict[str, float]:
    """Seconds and memory of one save."""
    import jax

    from jaxllm.training.checkpoint import Checkpoints

    key = jax.random.key(0)
    params = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), shapes(gigabytes))
    jax.block_until_ready(params)
    checkpoints = Checkpoints(folder, keep=1)
    with PeakMemory() as memory:
        start = time.perf_counter()
        checkpoints.save(1, {"params": params}, {})
        blocked = time.perf_counter() - start
        checkpoints.wait()
        seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"blocked": blocked, "save": seconds, "save peak": memory.peak, "bytes": size}


def restore(folder: Path, gigabytes: float) -> dict[str, float]:
    """Seconds and memory of one restore."""
    import jax

    from jaxllm.training.checkpoint import Checkpoints

    wanted = {"params": shapes(gigabytes)}
    jax.block_until_ready(jax.numpy.zeros(1))
    drop_pages(folder.rglob("*"))
    with PeakMemory() as memory:
        start = time.perf_counter()
        state, _ = Checkpoints(folder, keep=1).restore(None, wanted)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {"restore": seconds, "restore peak": memory.peak - size}


def plain(folder: Path, gigabytes: float) -> dict[str, float]:
    """Seconds of a plain file of as many bytes, written and read."""
    import jax
    import numpy as np

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes(gigabytes)))
    block = np.random.default_rng(0).bytes(BLOCK)
    file = folder / "plain"
    start = time.perf_counter()
    with file.open("wb") as opened:
        for done in range(0, size, BLOCK):
            opened.write(block[: size - done])
        opened.flush()
        os.fsync(opened.fileno())
    written = time.perf_counter()
    drop_pages([file])
    read = time.perf_counter()
    with file.open("rb") as opened:
        while opened.read(BLOCK):
            pass
    return {"plain write": written - start, "plain read": time.perf_counter() - read}


def drop_pages(files: Iterable[Path]) -> None:
    """Make the next reading of these files read the disk."""
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


MEASUREMENTS: dict[str, Callable[[Path, float], dict[str, float]]] = {
    "plain": plain,
    "save": save,
    "restore": restore,
}


def measure(folder: Path, gigabytes: float) -> dict[str, float]:
    """One round of all measurements, each in a process of its own."""
    found: dict[str, float] = {}
    for name in MEASUREMENTS:
        command = [sys.executable, __file__, f"--measure={name}", f"--folder={folder}"]
        done = subprocess.run(
            [*command, "--gigabytes", str(gigabytes)], check=True, stdout=subprocess.PIPE, text=True
        )
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(MEASUREMENTS[options.measure](options.folder, options.gigabytes[0])))
        return
    print("| parameters | plain write | blocked | save | peak | plain read | restore | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for gigabytes in options.gigabytes:
        rounds = []
        for _ in range(options.rounds):
            folder = Path(tempfile.mkdtemp(dir=options.folder))
            try:
                rounds.append(measure(folder, gigabytes))
            finally:
                shutil.rmtree(folder)
        print(f"| {rounds[0]['bytes'] / 1e9:.2f} GB | {' | '.join(cells(rounds))} |", flush=True)
    print(f"\n{options.rounds} rounds: median [least, most] seconds and, of the median, MB/s")


def cells(rounds: list[dict[str, float]]) -> list[str]:
    """A row of the table."""
    shown = {}
    for name in COLUMNS:
        values = sorted(each[name] for each in rounds)
        middle = statistics.median(values)
        shown[name] = f"{middle:.2f} s [{values[0]:.2f}, {values[-1]:.2f}]"
        if name != "blocked":
            shown[name] += f", {rounds[0]['bytes'] / MB / middle:,.0f} MB/s"
    peaks = {
        name: f"{max(each[f'{name} peak'] for each in rounds) / 1e9:.2f} GB" for name in ("save", "restore")
    }
    write, blocked, saved, read, restored = (shown[name] for name in COLUMNS)
    return [write, blocked, saved, peaks["save"], read, restored, peaks["restore"]]


if __name__ == "__main__":
    main()
