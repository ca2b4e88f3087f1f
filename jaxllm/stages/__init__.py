"""The stages of training, a module each. `jaxllm/runs/stage.py` says what such a module must have."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jaxllm.config import check_choice
from jaxllm.parallel.sharding import Device
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.program import Program
from jaxllm.runs.stage import Stage


def find_stage(name: str) -> Stage:
    """The stage of this name; ConfigError, with the names there are, for any other."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    check_choice("stage", name, names)
    return cast(Stage, importlib.import_module(f"jaxllm.stages.{name}"))


def build_program(config: TrainConfig, devices: Sequence[Device] | None = None) -> Program[Any, Any]:
    """The program of a config, whose stage it names, on these devices (default: all)."""
    return Program(find_stage(config.stage), config, devices)
