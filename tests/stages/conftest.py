"""A decoder of two layers, and train steps on it."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxllm.config import load_config, parse
from jaxllm.models import ModelConfig, build_model, build_scalar_model
from jaxllm.training.state import init_state
from jaxllm.training.step import train_step


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    pretrain = load_config(str(Path(__file__).parents[2] / "configs" / "pretrain_text.py:tiny"))
    return replace(parse(ModelConfig, pretrain.model), vocab_size=40, num_layers=2, width=32)


@pytest.fixture(scope="session")
def model(config):
    return build_model(config)


@pytest.fixture(scope="session")
def scalar_model(config):
    return build_scalar_model(config)


@pytest.fixture
def take_step():
    """(init, loss_fn, batch) -> metrics and gradient, by one train step of SGD."""

    def run(init, loss_fn, batch, params=None, **options):
        optimizer = optax.sgd(1.0)
        state = init_state(jax.random.key(0), init=init, optimizer=optimizer)
        if params is not None:
            state = state._replace(params=params)
        step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, num_microbatches=1)
        after, metrics = jax.jit(step)(state, jax.tree.map(np.asarray, batch))
        gradient = jax.tree.map(np.subtract, state.params, after.params)
        return {name: float(value.mean) for name, value in metrics.items()}, gradient

    return run
