"""Documentation that cannot drift: every example runs, every name is on the page."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loss_cases import CASES

from jaxllm import losses

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
MODULES = [f"jaxllm.losses.{module.name}" for module in pkgutil.iter_modules(losses.__path__)]
FUNCTIONS = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_an_example_and_names_its_arguments(name):
    function = getattr(losses, name)
    documentation = inspect.getdoc(function)
    assert f"{name}(" in documentation or "gae(" in documentation, "no example"
    assert ">>>" in documentation
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", documentation), f"{parameter} is not explained"


def test_the_page_s_example_trains(capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/losses.md", "exec"), namespace)
    assert namespace["metrics"]["loss"].mean < 1.1  # from log 256 = 5.5; bigrams leave a choice
    assert namespace["metrics"]["accuracy"].mean > 0.5
    assert "nats, accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", losses.__all__)
def test_the_page_names_every_function(name):
    assert f"`{name}" in PAGE


def test_the_page_names_every_metric():
    metrics = {name for case in CASES for name in case.loss(case.make())[1]}
    assert {name for name in metrics if f"`{name}`" not in PAGE} == set()


def test_importing_the_losses_is_light():
    """jax, numpy and chex only, so that importing the losses into another project is cheap."""
    heavy = ("flax", "optax", "orbax", "datasets", "grain", "sentencepiece", "ml_collections", "torch")
    code = f"import sys, jaxllm.losses; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
