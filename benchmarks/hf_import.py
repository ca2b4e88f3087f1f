"""What it costs to read a Hugging Face checkpoint: seconds, host memory, and the hash that a run records.

    python benchmarks/hf_import.py [--gigabytes=1] [--rounds=3] [--devices=8]

A random Llama-like checkpoint of that size (bfloat16, three shards) is written to a temporary folder, and
read by a process of its own in each round: `load_hf`, then `checkpoint_hash`. On a CPU the parameters
themselves lie in the memory of the host, so that their size is part of the peak: what is above it, reading
needed besides. Pages of files do not count, the system takes them back. The files were just written, so no
round waits for a disk. Of several `--devices`, on a CPU, each holds its part of the parameters.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MB = 10**6


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write about that many bytes of weights, as many layers as they need; returns the bytes."""
    import jax
    import jax.numpy as jnp

    from configs.base.models import model
    from jaxllm.config import parse
    from jaxllm.models import ModelConfig, build_model
    from jaxllm.models.hf import save_hf

    config = replace(parse(ModelConfig, model("llama3.2_1b")), vocab_size=32768, param_dtype="bfloat16")
    layer = 2 * (2 * config.width**2 + config.width * 2 * 512 + 3 * config.width * config.mlp_width)
    layers = round((gigabytes * 1e9 - 2 * config.vocab_size * config.width) / layer)
    config = replace(config, num_layers=max(layers, 1))
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape, jnp.bfloat16), shapes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_hf(folder, config, params, max_shard_bytes=size // 3 + layer)
    return size


class PeakMemory:
    """The highest memory of this process in a block, above that at its start, in bytes: `peak`, sampled."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self.start, self.done = 0, self.now(), threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def now(self) -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    def sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now() - self.start)


def measure(folder: Path) -> dict[str, float]:
    """Seconds and bytes in this process."""
    import jax
    import jax.numpy as jnp

    from jaxllm.models.hf import load_hf, load_hf_config
    from jaxllm.runs.checkpoints import local_mesh
    from jaxllm.training.step_folder import checkpoint_hash

    jnp.zeros(1).block_until_ready()
    start = time.perf_counter()
    with PeakMemory() as memory:
        _, params = load_hf(folder, mesh=local_mesh(load_hf_config(folder)))
        jax.block_until_ready(params)
    loaded = time.perf_counter()
    checkpoint_hash(folder)
    return {
        "load_s": loaded - start,
        "hash_s": time.perf_counter() - loaded,
        "peak": memory.peak,
        "arrays": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "largest": max(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.gigabytes)
        command = [sys.executable, __file__, f"--measure={folder}"]
        flags = f"--xla_force_host_platform_device_count={options.devices}"
        rounds = []
        for _ in range(options.rounds):
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}
            ).stdout
            rounds.append(json.loads(output.splitlines()[-1]))

    def column(name: str, scale: float = 1.0) -> str:
        values = sorted(each[name] / scale for each in rounds)
        return f"{statistics.median(values):,.2f} [{values[0]:,.2f}, {values[-1]:,.2f}]"

    print(f"checkpoint of {size / MB:,.0f} MB in bfloat16, {options.rounds} rounds: median [least, most]")
    print(f"load_hf, s:           {column('load_s')}")
    print(f"peak memory, MB:      {column('peak', MB)}")
    print(f"  all arrays, MB:     {column('arrays', MB)}")
    print(f"  largest array, MB:  {column('largest', MB)}")
    print(f"checkpoint_hash, s:   {column('hash_s')}")


if __name__ == "__main__":
    main()
