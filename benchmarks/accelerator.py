"""What one accelerator does with jaxllm, in eight minutes: a table as it goes, and a JSON file.

    python benchmarks/accelerator.py --output=accelerator.json   # one GPU (Hopper or later), or one TPU chip
    python benchmarks/accelerator.py --small                     # the same parts on a CPU, in a minute

Each part is a process with a time limit: one that fails or takes too long is noted and does not end the
others. The file is written anew after each part. `--parts` names the parts to run, such as `decode`.

- matmul: FLOP/s of a large product, bytes/s of adding 1 to a large array;
- train_124m, train_1b: a train step in bfloat16 on packed documents; tokens/s, MFU, and the peak of memory
  beside what the compiler planned (as `experiments/train.py --dry_run`);
- decode: qwen3_0.6b in bfloat16; a step's time beside the time to read weights and cache once (roofline);
- grpo: the second and later steps of GRPO on qwen3_0.6b, by phase;
- resume: the losses of a resumed run beside those of an uninterrupted one, with deterministic operations;
- attention: loss and gradient norm of one step for every implementation of attention that runs here.

Random weights and tokens; attention is cudnn_packed on a GPU, splash on a TPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Figures = dict[str, Any]  # of a part, by name
KERNELS = {"gpu": ("cudnn_packed", "cudnn"), "tpu": ("splash",), "cpu": ()}  # of attention, the best first
DOCUMENT_TOKENS = 400  # of a packed document, on average


def platform() -> str:
    """Of the devices: "gpu", "tpu" or "cpu"."""
    import jax

    return jax.devices()[0].platform


def configured(name: str, **fields: object) -> Any:
    """A config of configs/, such as "pretrain_text.py:124m", with other values of fields, as `a__b=value`."""
    from jaxllm.config import load_config, override, parse
    from jaxllm.stages import find_stage

    config = load_config(str(ROOT / "configs" / name))
    Config = find_stage(config.stage).Config
    for field, value in fields.items():
        override(config, Config, field.replace("__", "."), str(value))
    return parse(Config, config)


def on_accelerator(small: bool) -> dict[str, object]:
    """The fields that every part has in common: bfloat16 and the platform's own attention."""
    kernels = KERNELS[platform()]
    dtype = "float32" if small else "bfloat16"
    return {"model__compute_dtype": dtype, "model__attention": kernels[0] if kernels else "xla"}


def seconds_of(run: Callable[[], Any], times: int) -> float:
    """The median time of a call whose result is waited for, after one that is not timed."""
    import jax
    import numpy as np

    jax.block_until_ready(run())
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def matmul(small: bool) -> Figures:
    """What the device reaches on work that is nothing else."""
    import jax
    import jax.numpy as jnp

    from jaxllm.training.metrics import peak_flops

    size = 512 if small else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    rate = 2 * size**3 / seconds_of(lambda: product(a, a), 20)
    x = jnp.zeros(8 * size * size, jnp.float32)
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "tflops": rate / 1e12,
        "of_peak": rate / peak if peak else None,
        "memory_gb_per_s": 2 * x.nbytes / seconds_of(lambda: add(x), 20) / 1e9,
    }


def packed_batch(program: Any) -> Any:
    """Random tokens in packed documents of random lengths."""
    import jax
    import numpy as np

    from jaxllm.batches import TokenBatch

    rng = np.random.default_rng(0)
    shape = program.batch_shapes.tokens.shape
    tokens = rng.integers(0, program.config.model.vocab_size, shape, np.int32)
    segments = np.cumsum(rng.random(shape) < 1 / DOCUMENT_TOKENS, axis=1, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = TokenBatch(tokens, np.roll(tokens, -1, 1), np.ones(shape, bool), segments, positions)
    return jax.device_put(batch, program.batch_sharding)


def train(config: Any, steps: int) -> Figures:
    """Steps of a pretraining config: speed, memory, and the first and last loss."""
    import jax

    from jaxllm.stages import build_program
    from jaxllm.training.metrics import memory_peak_gb, peak_flops, to_scalars

    program = build_program(config)
    began = time.perf_counter()
    step = program.compile()
    compile_seconds, memory = time.perf_counter() - began, step.memory_analysis()
    state, batch, losses = program.fresh_state(), packed_batch(program), []

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        losses.append(metrics)
        return metrics

    seconds = seconds_of(run, steps)
    rate, peak = program.tokens_per_step / seconds, peak_flops(jax.devices()[0].device_kind)
    first, last = (to_scalars(metrics, "train") for metrics in (losses[0], losses[-1]))
    return {
        "attention": config.model.attention,
        "tokens_per_step": program.tokens_per_step,
        "seconds": seconds,
        "tokens_per_s": rate,
        "mfu": rate * program.flops_per_token / peak if peak else None,
        "planned_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "peak_gb": memory_peak_gb(),
        "compile_s": compile_seconds,
        "loss": [first["train/loss"], last["train/loss"]],
        "grad_norm": first["train/grad_norm"],
    }


def train_size(size: str, small: bool, rows: int, microbatches: int, steps: int) -> Figures:
    """`train` of a size of configs/pretrain_text.py, by AdamW."""
    if small:
        rows, microbatches, steps = 4, 2, 2
    fields = {
        "data__batch_size": rows,
        "training__num_microbatches": microbatches,
        "optimizer__name": "adamw",
    }
    return train(configured(f"pretrain_text.py:{size}", **on_accelerator(small), **fields), steps)


def train_124m(small: bool) -> Figures:
    """124M parameters, 16 rows of 2048 tokens at a time."""
    return train_size("tiny" if small else "124m", small, rows=64, microbatches=4, steps=10)


def train_1b(small: bool) -> Figures:
    """1.2B parameters, 8 rows of 4096 tokens at a time; recomputes the blocks but not attention."""
    return train_size("tiny" if small else "llama3.2_1b", small, rows=16, microbatches=2, steps=6)


def decode(small: bool) -> Figures:
    """Seconds of a decode step at three batch sizes, without prefill: of a long generation less a short."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.generate import our_run
    from jaxllm.models.config import matrix_parameters
    from jaxllm.plan.hardware import CHIPS

    size = "tiny" if small else "qwen3_0.6b"
    common = on_accelerator(small) | {"model__param_dtype": "float32" if small else "bfloat16"}
    config = configured(f"pretrain_text.py:{size}", **common).model
    run, itemsize = our_run(config), jnp.dtype(config.param_dtype).itemsize
    kind = jax.devices()[0].device_kind
    bandwidth = next((c.memory_bandwidth for c in CHIPS.values() if kind.startswith(c.kind)), None)
    prompt, short, long = 64, 16, 64 if small else 192
    figures: Figures = {}
    for batch in (1, 4) if small else (1, 64, 256):
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt))
        seconds = [seconds_of(partial(run, prompts, new), 3) for new in (short, long)]
        step = (seconds[1] - seconds[0]) / (long - short)
        slots = prompt + (short + long) / 2  # that are in use on average
        cache = 2 * batch * config.num_layers * config.num_kv_heads * config.head_dim * slots
        least = itemsize * (matrix_parameters(config) + cache) / bandwidth if bandwidth else None
        figures[f"batch_{batch}"] = {
            "step_ms": 1e3 * step,
            "tokens_per_s": batch / step,
            "of_roofline": least / step if least else None,
        }
    return figures


def grpo(small: bool) -> Figures:
    """Seconds by phase of GRPO's step: 16 prompts x 16, 128 + 256 tokens."""
    import jax
    import numpy as np

    from benchmarks.grpo_step import PHASES, make_config, our_steps
    from jaxllm.runs.step_by_length import compile_step
    from jaxllm.stages import build_program
    from jaxllm.training.metrics import memory_peak_gb

    prompts, group, prompt, new, steps = (2, 2, 16, 16, 2) if small else (16, 16, 128, 256, 3)
    size = "tiny" if small else "qwen3_0.6b"
    flags = SimpleNamespace(
        config=ROOT / f"configs/pretrain_text.py:{size}",
        prompts=prompts,
        group=group,
        prompt=prompt,
        new=new,
        rows=prompts * group,
        microbatches=2 if small else 8,
        recompute_log_probs=True,
    )
    config = make_config(flags)
    fields = {name.removeprefix("model__"): value for name, value in on_accelerator(small).items()}
    program = build_program(replace(config, model=replace(config.model, **fields)))
    step = compile_step(program)
    tokens = np.random.default_rng(0).integers(0, program.config.model.vocab_size, (16 * prompts, prompt))
    stop_ids = tuple(range(4 * program.config.model.vocab_size // new))
    seconds, taken = [], []
    with jax.set_mesh(program.mesh), closing(our_steps(program, step, tokens, stop_ids)) as grpo_steps:
        for _ in range(1 + steps):
            began = time.perf_counter()
            taken.append(next(grpo_steps))
            seconds.append(time.perf_counter() - began)
    first, *seconds = seconds
    phases = {phase: float(np.median([each.phases[phase] for each in taken[1:]])) for phase in PHASES}
    total = float(np.median(seconds))
    return {
        "seconds": total,
        **phases,
        "rollout_share": phases["rollout"] / total,
        "rollout_tokens_per_s": float(np.median([each.rate for each in taken[1:]])),
        "first_s": first,
        "peak_gb": memory_peak_gb(),
    }


def resume(small: bool) -> Figures:
    """Ten steps, and the last five of them again from a checkpoint. It leaves the device to its processes."""
    kernels = KERNELS[run_part("environment", small, 30)["platform"]]
    attention = kernels[-1] if kernels else "xla"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    variables = os.environ | ({"XLA_FLAGS": flags} if "cudnn" in kernels else {})

    def losses(folder: Path) -> dict[int, tuple[float, float]]:
        run = [
            sys.executable,
            str(ROOT / "experiments/train.py"),
            f"--config={ROOT / 'configs/pretrain_text.py:tiny'}",
            f"--workdir={folder}",
            "--config.data.synthetic_rows=2000",
            "--config.training.steps=10",
            "--config.training.log_every=1",
            "--config.training.evaluate_every=10",
            "--config.training.sample_every=10",
            "--config.training.checkpoint_every=5",
            f"--config.model.attention={attention}",
            f"--config.model.compute_dtype={'float32' if attention == 'xla' else 'bfloat16'}",
        ]
        subprocess.run(run, env=variables, check=True, stdout=subprocess.DEVNULL)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {
            row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row
        }

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        first = losses(whole)
        resumed = Path(folder) / "resumed"
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "checkpoints/10")
        second = losses(resumed)
        assert (resumed / "checkpoints/10").exists(), "the run did not continue"
    return {"attention": attention, "steps": len(first), "bit_exact": first == second, "loss": first[10][0]}


def attention(small: bool) -> Figures:
    """One step of two layers of the 124m model for each implementation."""
    name = "pretrain_text.py:tiny" if small else "pretrain_text.py:124m"
    figures: Figures = {}
    for implementation in ("xla", *KERNELS[platform()]):
        fields = on_accelerator(small) | {"model__attention": implementation, "model__num_layers": 2}
        config = configured(name, **fields, data__batch_size=8, training__num_microbatches=1)
        try:
            taken = train(config, 1)
            figures[implementation] = {key: taken[key] for key in ("loss", "grad_norm", "seconds")}
        except Exception as error:  # the others are still of interest
            figures[implementation] = {"failed": last_line(repr(error))}
    return figures


def environment(small: bool) -> Figures:
    """Which hardware and which JAX."""
    del small
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "jax": jax.__version__}


# Seconds that each may take: eight minutes in all.
LIMITS = {
    environment: 20,
    matmul: 25,
    train_124m: 75,
    train_1b: 90,
    decode: 80,
    grpo: 80,
    attention: 55,
    resume: 55,
}
PARTS: dict[str, Callable[[bool], Figures]] = {part.__name__: part for part in LIMITS}


def last_line(text: str) -> str:
    """Of what a process wrote, cut to what a table has room for."""
    return (text.strip().splitlines() or ["no output"])[-1][:300]


def run_part(name: str, small: bool, limit: int) -> Figures:
    """A part in a process of its own, whose children end with it."""
    command = [sys.executable, __file__, f"--part={name}", *(["--small"] if small else [])]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"failed": f"took more than {limit} s"}
        if process.returncode:
            log.seek(0)
            return {"failed": last_line(log.read())}
        return json.loads(output.splitlines()[-1])


def line(value: Any) -> str:
    """Figures in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {line(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " to ".join(map(line, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process
    flags = parser.parse_args()
    if flags.part:
        print(json.dumps(PARTS[flags.part](flags.small)))
        return
    results: Figures = {}
    for name in flags.parts:
        began = time.perf_counter()
        results[name] = run_part(name, flags.small, LIMITS[PARTS[name]])
        results[name]["part_s"] = time.perf_counter() - began
        print(f"{name:12s} {line(results[name])}", flush=True)
        flags.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
