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


@pytest.fixture(scope="session")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def make_step():
    """(init, loss_fn) -> a train step of SGD, compiled once a shape: (batch, params) -> metrics, gradient."""

    def make(init, loss_fn):
        optimizer = optax.sgd(1.0)
        state = jax.jit(functools.partial(init_state, init=init, optimizer=optimizer))(jax.random.key(0))
        step = jax.jit(
            functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, num_microbatches=1)
        )

        def run(batch, params=None):
            before = state if params is None else state._replace(params=params)
            after, metrics = step(before, jax.tree.map(np.asarray, batch))
            gradient = jax.tree.map(np.subtract, before.params, after.params)
            return {name: float(value.mean) for name, value in metrics.items()}, gradient

        return run

    return make
