"""Speed of a train step: tokens/s, fraction of the machine's matmul rate, memory, compile time.

    python benchmarks/train_step.py --config=benchmarks/model_s.py --peer   # beside transformers in torch
    python benchmarks/train_step.py --config=configs/pretrain_text.py:124m \
        --config.model.attention=cudnn --config.model.compute_dtype=bfloat16      # on a GPU

Each implementation has a process of its own, and they take turns in each round, so that load on the machine
affects all of them. Results are medians with the quartiles in brackets. No compilation is timed; the peak of
memory includes it.
"""

import statistics
import sys
import time
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import Contestant, Turns, compare, ratio
from benchmarks.peers import llama_config
from jaxllm.config import HUGE_PAGES, run_script

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict
    from transformers import LlamaConfig

    from jaxllm.runs.config import TrainConfig


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


def ours(config: "TrainConfig", steps: int, turns: Turns) -> None:
    """Compile, print sizes, and take `steps` steps a turn, in a process set up as by experiments/train.py."""
    import jax
    import jax.numpy as jnp

    from jaxllm.batches import TokenBatch
    from jaxllm.runs.process import set_up_process
    from jaxllm.stages import build_program

    set_up_process()
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
        for _ in range(steps):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

    turns.repeat(run)


def peer(llama: "LlamaConfig", rows: int, length: int, compiled: bool, steps: int, turns: Turns) -> None:
    """transformers' Llama with torch's AdamW. It gets no config of ours, which would import JAX."""
    import torch
    from transformers import LlamaForCausalLM

    tokens = torch.randint(0, llama.vocab_size, (rows, length))
    model = LlamaForCausalLM(llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            forward(input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    turns.repeat(run)


def main(config: "TrainConfig", flags: "FlagValues") -> None:
    """Time all implementations and print a table."""
    from jaxllm.models.config import flops_per_token

    rows, length = config.data.batch_size, config.data.sequence_length
    contestants: dict[str, Contestant] = {"jaxllm": partial(ours, config, flags.steps)}
    if flags.peer:
        llama = llama_config(config.model, use_cache=False)
        for name, compiled in (("transformers, eager", False), ("transformers, torch.compile", True)):
            contestants[name] = partial(peer, llama, rows, length, compiled, flags.steps)
    rate = matmul_rate()
    print(f"matmuls on this machine: {rate / 1e9:,.0f} GFLOP/s", flush=True)
    results = compare(contestants, rounds=flags.rounds, warm_up=1, variables={"jaxllm": HUGE_PAGES})
    tokens, flops = flags.steps * rows * length, flops_per_token(config.model, length)
    for name, turns in results.items():
        low, middle, high = statistics.quantiles([turn.seconds for turn in turns], n=4)
        cpu = statistics.median(turn.cpu_seconds for turn in turns) / flags.steps
        print(
            f"{name:28} {tokens / middle:9,.0f} tokens/s [{tokens / high:,.0f} to {tokens / low:,.0f}]  "
            f"{flops * tokens / middle / rate:5.1%} of the matmul rate  {cpu:6.2f} CPU s/step  "
            f"peak {turns[-1].peak_bytes / 1e9:.2f} GB"
        )
    for name, turns in results.items():
        if name != "jaxllm":
            print(
                f"jaxllm / {name}: {ratio(turns, results['jaxllm'], attrgetter('seconds')):.2f}x, "
                f"by CPU time {ratio(turns, results['jaxllm'], attrgetter('cpu_seconds')):.2f}x"
            )


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
