"""Plans of several runs and programs, each made by a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm.config import as_dict, parse
from jaxllm.plan.candidate import Plan, read_plan
from jaxllm.plan.hardware import Hardware
from jaxllm.plan.search import choices, pareto, promising
from jaxllm.plan.show import describe, gigabytes, header
from jaxllm.plan.targets import set_environment

ROOT = Path(__file__).parents[2]
CANDIDATE = ["-m", "jaxllm.plan.candidate"]


def plan_step(config: Any, hardware: Hardware, step: str) -> Plan:
    """The plan of one program of a run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    set_environment(environment, hardware)
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps({"config": as_dict(config), "hardware": hardware.name, "step": step}))
        command = [sys.executable, *CANDIDATE, str(job), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if result.exists():
            return read_plan(json.loads(result.read_text()))
    return Plan(step, hardware.name, error=failure(done.returncode, done.stderr))


def failure(code: int, stderr: str) -> str:
    """Why a process has left no plan, in one line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if not line.startswith(" ")), "it printed nothing")
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (this machine may be out of memory)" if name == "SIGKILL" else ""
        return f"the compiler was ended by {name}{memory}: {last}"
    return last


def search(config: Any, hardware: Hardware, number: int) -> list[Plan]:
    """Compile the most promising choices of a train step, print each, and last those that no other beats."""
    found = choices(config, hardware)
    chosen = promising(found, hardware.memory, number)
    print(
        f"{len(found)} combinations divide; {len(chosen)} of them are compiled for {hardware.name}",
        flush=True,
    )
    plans = []
    for choice in chosen:
        plan = replace(plan_step(changed(config, choice.fields), hardware, "train"), fields=choice.fields)
        print(f"{choice}\n{describe(plan)}", flush=True)
        plans.append(plan)
    print(header(hardware, plans))
    fitting = [plan for plan in plans if plan.fits]
    front = pareto(fitting, lambda plan: (-plan.tokens_per_second, plan.memory["peak"]))
    print(f"{len(fitting)} of {len(plans)} fit; none is faster with less memory than")
    for plan in front:
        peak = gigabytes(plan.memory["peak"])
        fields = ", ".join(f"{name}={value}" for name, value in plan.fields.items())
        print(f"  {plan.tokens_per_second:.3g} tokens/s at most, {peak} GB a device: {fields}")
    return plans


def changed(config: Any, fields: Mapping[str, Any]) -> Any:
    """The config with dotted fields changed."""
    values = as_dict(config)
    for path, value in fields.items():
        *sections, name = path.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = value
    return parse(type(config), values)
