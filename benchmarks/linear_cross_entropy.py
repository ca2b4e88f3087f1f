"""The head applied inside the loss against the dense form: speed, memory and accuracy of the gradient.

    python benchmarks/linear_cross_entropy.py                                  # 8 x 256 tokens, V = 4096
    python benchmarks/linear_cross_entropy.py --shape 4 512 512 32000 --block_size none 128 32
    python benchmarks/linear_cross_entropy.py --memory                         # compiled only, V = 151,936

Measures the loss with its gradients by hidden states and head. Each round runs every loss once, so that noise
of the machine affects all of them. Times are medians with the quartiles in brackets; ratios are medians of
the ratios within rounds. `--memory` compiles from shapes alone, for one device and for meshes of 8 simulated
devices.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.losses import cross_entropy, linear_cross_entropy

Loss = Callable[..., jax.Array]  # (hidden, head, targets, mask) -> scalar


def dense(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    return cross_entropy(hidden @ head, targets, mask)[0].mean


def linear(block_size: int | None) -> Loss:
    return lambda *arrays: linear_cross_entropy(*arrays, block_size=block_size)[0].mean


def compile_gradient(loss: Loss, arguments: tuple, out_shardings: tuple | None = None) -> jax.stages.Compiled:
    gradient = jax.value_and_grad(loss, (0, 1))
    out = None if out_shardings is None else (None, out_shardings)
    return jax.jit(gradient, out_shardings=out).lower(*arguments).compile()


def temporaries(compiled: jax.stages.Compiled) -> float:
    """The size of the temporary buffers in MiB; NaN where the backend does not report it."""
    analysis = compiled.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**20


def make_arrays(shape: list[int], dtype: str) -> tuple[jax.Array, ...]:
    batch, length, width, vocab_size = shape
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocab_size)) / width**0.5, dtype)
    targets = jnp.asarray(rng.integers(0, vocab_size, (batch, length)))
    return hidden, head, targets, jnp.ones((batch, length), bool)


def compare_speed(losses: dict[str, Loss], shape: list[int], dtype: str, rounds: int) -> None:
    arrays = make_arrays(shape, dtype)
    compiled = {name: compile_gradient(loss, arrays) for name, loss in losses.items()}
    seconds = {name: [] for name in losses}
    gradients = {}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, run in compiled.items():
            start = time.perf_counter()
            _, (_, gradients[name]) = jax.block_until_ready(run(*arrays))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    truth = compile_gradient(dense, wide := tuple(promote(x) for x in arrays))(*wide)[1][1]
    for name, times in seconds.items():
        low, middle, high = (1000 * t for t in statistics.quantiles(times, n=4))
        ratio = statistics.median(a / b for a, b in zip(seconds["dense"], times, strict=True))
        error = jnp.linalg.norm(promote(gradients[name]) - truth) / jnp.linalg.norm(truth)
        print(
            f"{name:18s} {middle:8.1f} ms [{low:.1f}, {high:.1f}]  {ratio:5.2f}x dense  "
            f"temporaries {temporaries(compiled[name]):8.1f} MiB  error of the head's gradient {error:.1e}"
        )


def promote(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def compare_memory() -> None:
    length, width, vocab_size = 2048, 1024, 151_936
    print(f"T = {length}, D = {width}, V = {vocab_size:,}, bfloat16: temporaries a device, compiled only")
    for fsdp, tensor, batch in [(1, 1, 4), (4, 2, 8), (2, 4, 8), (8, 1, 8)]:
        if fsdp * tensor > jax.device_count():
            continue
        mesh = jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        by_row = NamedSharding(mesh, PartitionSpec("fsdp"))
        of_head = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

        def array(*shape, dtype, sharding):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        arguments = (
            array(batch, length, width, dtype=jnp.bfloat16, sharding=by_row),
            array(width, vocab_size, dtype=jnp.bfloat16, sharding=of_head),
            array(batch, length, dtype=jnp.int32, sharding=by_row),
            array(batch, length, dtype=jnp.bool_, sharding=by_row),
        )
        of_dense, of_linear = (
            temporaries(compile_gradient(loss, arguments, (by_row, of_head)))
            for loss in (dense, linear(None))
        )
        ratio = f"{of_linear / of_dense:.0%} of the dense form's {of_dense:.0f}"
        print(f"B = {batch}, fsdp {fsdp} x tensor {tensor}: {of_linear:6.0f} MiB, {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[8, 256, 320, 4096], metavar=tuple("BTDV"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block_size", nargs="+", default=["none", "64"], help="positions of T, or none")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--memory", action="store_true", help="compile a large model instead of running")
    flags = parser.parse_args()
    if flags.memory:
        jax.config.update("jax_num_cpu_devices", 8)
        return compare_memory()
    blocks = {f"linear, block {b}": None if b == "none" else int(b) for b in flags.block_size}
    losses = {"dense": dense} | {name: linear(block_size) for name, block_size in blocks.items()}
    print(f"{jax.devices()[0].device_kind}, B T D V = {flags.shape}, {flags.dtype}")
    compare_speed(losses, flags.shape, flags.dtype, flags.rounds)


if __name__ == "__main__":
    main()
