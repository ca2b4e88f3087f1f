"""Plan every run of the pipelines on several kinds of hardware: the table of docs/plan.md.

    python benchmarks/plans.py --output=plans.json

A plan takes from seconds to minutes; those that plans.json has are not made again. No hardware is needed.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from jaxllm.config import load_config, parse
from jaxllm.files import to_json, write_file
from jaxllm.pipeline.config import PARENTS
from jaxllm.plan.candidate import Plan, read_plan
from jaxllm.plan.hardware import find_hardware
from jaxllm.plan.programs import steps_of
from jaxllm.plan.run import changed, plan_step
from jaxllm.runs.config import TrainConfig
from jaxllm.stages import find_stage

ROOT = Path(__file__).resolve().parents[1]
HARDWARE = {"pipeline_124m": ("h100x1", "v5e-1"), "pipeline_1b": ("v5e-8", "v6e-8", "v5p-16", "h100x8")}
ATTENTION = {"tpu": "splash", "gpu": "cudnn"}


def jobs() -> list[tuple[str, str, str, str]]:
    """(pipeline, run, hardware, program) of all plans."""
    found = []
    for pipeline, names in HARDWARE.items():
        for run in PARENTS:
            for step in steps_of(run_config(pipeline, run, names[0])):
                found += [(pipeline, run, name, step) for name in names]
    return found


def run_config(pipeline: str, run: str, hardware: str) -> TrainConfig:
    """The config of a run, with the attention of the hardware."""
    values = load_config(f"{ROOT}/configs/{pipeline}.py:{run}")
    config = parse(find_stage(values.stage).Config, values)
    return changed(config, {"model.attention": ATTENTION[find_hardware(hardware).chip.platform]})


def row(name: str, plan: Plan) -> str:
    """A line of the table."""
    memory = plan.memory
    if plan.error:
        return f"| {name} | {plan.error[:60]} | | | | {plan.seconds:.0f} |"
    available = f"{plan.available / 1e9:.1f}"
    if not plan.fits:
        return f"| {name} | no, {plan.over / 1e9:.1f} over {available} | | | | {plan.seconds:.0f} |"
    time = plan.roofline
    assert time is not None
    milliseconds = 1000 * time.bound
    bound = f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
    return (
        f"| {name} | {memory['peak'] / 1e9:.1f} of {available} | {memory['temporaries'] / 1e9:.1f} "
        f"| {bound} ({time.limit}) | {plan.mfu:.0%} | {plan.seconds:.0f} |"
    )


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", default="plans.json", type=Path)
    parser.add_argument("--only", default="", help="regular expression: plans with it in their name")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # this process takes no device from those that compute
    made = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for pipeline, run, hardware, step in jobs():
        name = f"{pipeline}:{run} {step} {hardware}"
        if name in made or not re.search(arguments.only, name):
            continue
        plan = plan_step(run_config(pipeline, run, hardware), find_hardware(hardware), step)
        made[name] = asdict(plan)
        write_file(arguments.output, to_json(made))
        print(row(name, plan), file=sys.stderr, flush=True)
    print(
        "| run, program, hardware | GB a device | temporaries | ms at least (limit) | MFU at most | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for name, values in made.items():
        if re.search(arguments.only, name):
            print(row(name, read_plan(values)))


if __name__ == "__main__":
    main()
