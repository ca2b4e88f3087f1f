"""Compile a run for hardware that is not there: does it fit, and how fast could it be at best?

    python experiments/plan.py --config=configs/pretrain_text.py:124m --hardware=h100x8
    python experiments/plan.py --config=configs/pipeline_1b.py:grpo --hardware=v5e-8 --steps_of=train,rollout

What it prints is planned, not measured. docs/plan.md says what to believe.
"""

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import check_local, check_output, run_script
from jaxllm.errors import ConfigError, RunError

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from jaxllm.runs.config import TrainConfig

PROGRAMS = {"train": ("train",), "rollout": ("prefill", "decode"), "score": ("score",)}


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags, besides --config and --print_config."""
    from absl import flags

    define = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    define("hardware", None, "such as v5e-64, v5p-128, v6e-256, h100x8, h200x8 or b200x8; several by commas")
    define("json", None, "write the plans to this file")
    flags.DEFINE_bool(
        "search",
        False,
        "try batch size, micro-batches, remat and mesh of the train step",
        flag_values=flag_values,
    )
    flags.DEFINE_integer("compile", 6, "with --search: how many to compile", flag_values=flag_values)
    flags.DEFINE_list("steps_of", ["train"], f"of {', '.join(PROGRAMS)}", flag_values=flag_values)
    flags.DEFINE_float("tokens", None, "token budget; default: the run's", flag_values=flag_values)
    flags.DEFINE_float("price_per_hour", None, "of one chip, in any currency", flag_values=flag_values)


def config_class(config: "ConfigDict") -> type:
    """The config dataclass of the config's stage. Imported late: it needs jax."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process plans, and takes no device from those that compute
    from jaxllm.stages import find_stage

    if "stage" not in config:
        raise ConfigError("the config is of a pipeline: name one of its runs, --config=FILE.py:NAME")
    return find_stage(config.stage).Config


def check_budget(flags: "FlagValues") -> None:
    """ConfigError for a budget that is none, and for flags that the other flags leave without effect."""
    if flags.tokens is not None and flags.tokens <= 0:
        raise ConfigError(f"--tokens={flags.tokens:g} must be more than 0")
    if flags.price_per_hour is not None and flags.price_per_hour < 0:
        raise ConfigError(f"--price_per_hour={flags.price_per_hour:g} must not be negative")
    if flags.search or "train" not in flags.steps_of:
        for name in ("tokens", "price_per_hour"):
            if getattr(flags, name) is not None:
                raise ConfigError(f"--{name} is for a plan of the train step, without --search: remove it")
    if flags["compile"].present and not flags.search:
        raise ConfigError("--compile is for --search: remove it")


def main(config: "TrainConfig", flags: "FlagValues") -> int:
    """Plan each program on each hardware. Returns the exit code: 0 if there is a plan of each."""
    from dataclasses import asdict

    from jaxllm.files import to_json
    from jaxllm.plan.hardware import find_hardware
    from jaxllm.plan.programs import steps_of
    from jaxllm.plan.run import plan_step, search
    from jaxllm.plan.show import describe, describe_budget, header

    if flags.hardware is None:
        raise ConfigError("--hardware=NAME is missing, such as v5e-8 or h100x8")
    hardware_list = [find_hardware(name) for name in flags.hardware.split(",")]
    unknown = set(flags.steps_of) - set(PROGRAMS)
    if unknown:
        raise ConfigError(f"--steps_of={','.join(flags.steps_of)}: choose of {', '.join(PROGRAMS)}")
    if flags.search and flags.steps_of != ["train"]:
        raise ConfigError("--search plans the train step: drop --steps_of")
    check_budget(flags)
    check_local(flags.json, "--json")
    check_output(flags.json, "--json")
    steps = [step for name in flags.steps_of for step in PROGRAMS[name]]
    if not set(steps) <= set(steps_of(config)):
        raise ConfigError(
            f"--steps_of={','.join(flags.steps_of)}: stage={config.stage!r} has no rollouts, only train"
        )
    every = []
    for hardware in hardware_list:
        if flags.search:
            every += search(config, hardware, flags.compile)
            continue
        plans = [plan_step(config, hardware, step) for step in steps]
        print(header(hardware, plans))
        for plan in plans:
            print(describe(plan))
            if plan.step == "train" and plan.fits:
                tokens = config.training.steps * plan.tokens if flags.tokens is None else flags.tokens
                print(describe_budget(plan, tokens, flags.price_per_hour))
        every += plans
        print(f"planned in {sum(plan.seconds for plan in plans):.0f} s", flush=True)
    if flags.json is not None:
        Path(flags.json).write_bytes(to_json([asdict(plan) for plan in every]))
    return RunError.exit_code if any(plan.error for plan in every) else 0


if __name__ == "__main__":
    sys.exit(run_script(main, config_class, define_flags))
