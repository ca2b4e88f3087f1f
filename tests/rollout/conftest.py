"""A small decoder whose parameters carry noise: at its initial ones a tied head mostly echoes its input."""

import jax
import pytest

from configs.models import model as model_shape
from jaxllm.config import parse
from jaxllm.models import ModelConfig, build_model


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return parse(ModelConfig, model_shape("tiny"))


@pytest.fixture(scope="session")
def model(tiny):
    return build_model(tiny)


@pytest.fixture(scope="session")
def noisy_params():
    def init_with_noise(model):
        def init(key):
            leaves, structure = jax.tree.flatten(model.init(key))
            keys = jax.random.split(key, len(leaves))
            noise = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
            return structure.unflatten([leaf + extra for leaf, extra in zip(leaves, noise, strict=True)])

        return jax.jit(init)(jax.random.key(0))

    return init_with_noise


@pytest.fixture(scope="session")
def params(model, noisy_params):
    return noisy_params(model)
