"""Memory that a plan predicts for fake CPU devices, beside what a step on them takes.

    python benchmarks/plan_memory.py --config=configs/pretrain_text.py:1m --config.data.train=any.txt

State is what the devices hold once it is made; the peak is that of the process while it takes a step, which
has the memory of all devices and, of the compiler's temporaries, only those that it needs at a time.
"""

import ctypes
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.train import config_class
from jaxllm.config import run_script

if TYPE_CHECKING:
    from absl.flags import FlagValues

    from jaxllm.runs.config import TrainConfig


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    flags.DEFINE_integer("devices", 8, "fake devices", flag_values=flag_values)


def process_bytes(name: str) -> int:
    """VmRSS, what the process has in memory, or VmHWM, the most that it had since `forget_peak`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Give freed memory back, and begin a new peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(config: "TrainConfig", flags: "FlagValues") -> None:
    """Plan, take a step, compare."""
    import jax
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.devices)
    from jaxllm.parallel.global_arrays import place
    from jaxllm.plan.candidate import make_plan
    from jaxllm.plan.hardware import find_hardware
    from jaxllm.plan.targets import Target
    from jaxllm.stages import build_program

    devices = jax.devices()
    plan = make_plan(config, find_hardware("v5e-8"), "train", Target(devices, "cpu", ""))
    program = build_program(config, devices)
    step = program.compile()
    state = jax.block_until_ready(program.fresh_state())
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        for shard in leaf.addressable_shards
        if shard.device == devices[0]
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.batch_shapes)
    batch = place(zeros, program.batch_sharding)
    forget_peak()
    before = process_bytes("VmRSS")
    jax.block_until_ready(step(state, batch))
    grown = process_bytes("VmHWM") - before
    planned = plan.memory["parameters"] + plan.memory["optimizer"]
    temporaries = plan.memory["temporaries"] + plan.memory["gradients"]
    print(f"state of a device: planned {planned / 1e6:.3f} MB, measured {held / 1e6:.3f} MB")
    print(
        f"temporaries of {len(devices)} devices: planned {len(devices) * temporaries / 1e6:.0f} MB, "
        f"the process grew by {grown / 1e6:.0f} MB in a step"
    )


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
