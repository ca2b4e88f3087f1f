"""Speed of a train step: tokens/s, fraction of the machine's matmul rate, memory, compile time.

    python benchmarks/train_step.py --config=benchmarks/model_s.py --peer   # beside transformers in torch
    python benchmarks/train_step.py --config=configs/pretrain_text.py:124m \
        --config.model.attention=cudnn --config.model.compute_dtype=bfloat16      # on a GPU

The implementations take turns in each round, so that load on the machine affects all of them. Results are
medians with the quartiles in brackets. The step is compiled ahead, for one shape, so no compilation is timed.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import llama_config
from jaxllm.config import run_script

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from jaxllm.runs.config import TrainConfig

PEER_COMPILED = "transformers, torch.compile"


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    flags.DEFINE_integer("rounds", 10, "timed rounds of each implementation", flag_values=flag_values)
    flags.DEFINE_integer("steps", 3, "steps per round", flag_values=flag_values)
    flags.DEFINE_bool(
        "peer", False, "also time transformers' Llama of the same shape in torch", flag_values=flag_values
    )


def config_class(config: "ConfigDict") -> type:
    """The config dataclass of the config's stage. Imported late: it needs jax."""
    from jaxllm.stages import find_stage

    return find_stage(config.stage).Config


def matmul_rate() -> float:
    """FLOP/s of a large square matmul, as 100%: by numpy's BLAS on CPU, else by XLA in bfloat16."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() == "cpu":
        size, product = 2048, np.matmul
        a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    else:
        size, product = 8192, jax.jit(jnp.matmul)
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def our_step(config: "TrainConfig") -> Callable[[], None]:
    """Compile, print sizes, and return a function that takes one step and waits for it."""
    import jax
    import jax.numpy as jnp

    from jaxllm.batches import TokenBatch
    from jaxllm.stages import build_program

    program = build_program(config)
    start = time.perf_counter()
    step = program.compile()
    print(program.describe())
    temporaries = step.memory_analysis().temp_size_in_bytes / 1e9
    print(f"jaxllm: compiled in {time.perf_counter() - start:.1f} s, {temporaries:.2f} GB of temporaries")
    state = program.fresh_state()
    data = config.data
    size = (data.batch_size, data.sequence_length)
    tokens = jax.random.randint(jax.random.key(1), size, 0, config.model.vocab_size, jnp.int32)
    ones, positions = jnp.ones(size, jnp.int32), jnp.broadcast_to(jnp.arange(size[1]), size)
    batch = TokenBatch(tokens, jnp.roll(tokens, -1, 1), ones.astype(bool), ones, positions)
    batch = jax.device_put(batch, program.batch_sharding)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return run


def peer_steps(config: "TrainConfig") -> dict[str, Callable[[], None]]:
    """transformers' Llama of the config's shape with torch's AdamW, eager and compiled."""
    import torch
    from transformers import LlamaForCausalLM

    shape, data = config.model, config.data
    llama = llama_config(shape, use_cache=False)
    tokens = torch.randint(0, shape.vocab_size, (data.batch_size, data.sequence_length))

    def make(compiled: bool) -> Callable[[], None]:
        model = LlamaForCausalLM(llama)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        forward = torch.compile(model) if compiled else model

        def run() -> None:
            optimizer.zero_grad()
            forward(input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return run

    return {"transformers, eager": make(False), PEER_COMPILED: make(True)}


def main(config: "TrainConfig", flags: "FlagValues") -> None:
    """Time all implementations and print a table."""
    from jaxllm.models.config import flops_per_token
    from jaxllm.runs.process import keep_freed_memory

    keep_freed_memory()  # as experiments/train.py does; it applies to the peer too, in the same process
    steps = {"jaxllm": our_step(config)}
    if flags.peer:
        steps |= peer_steps(config)
    rate = matmul_rate()
    print(f"matmuls on this machine: {rate / 1e9:,.0f} GFLOP/s")
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(flags.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(flags.steps):
                step()
            times[name].append((time.perf_counter() - start) / flags.steps)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, config.data.sequence_length)
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(
            f"{name:28} {tokens / middle:9,.0f} tokens/s [{tokens / high:,.0f} to {tokens / low:,.0f}]  "
            f"{flops * tokens / middle / rate:5.1%} of the matmul rate"
        )
    for name in steps:
        if name != "jaxllm":
            pairs = zip(times[name], times["jaxllm"], strict=True)
            print(f"jaxllm / {name}: {statistics.median(peer / ours for peer, ours in pairs):.2f}x")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of this process, all implementations: {peak:.2f} GB")


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
