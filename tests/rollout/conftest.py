"""A small decoder whose parameters carry noise: at its initial ones a tied head mostly echoes its input."""

from contextlib import contextmanager

import jax
import pytest

from configs.base.models import model as model_shape
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


@pytest.fixture
def counted(model):
    """The model, and the shapes of the tokens that it is traced for."""
    shapes = []

    def apply(params, tokens, **kwargs):
        shapes.append(tokens.shape)
        return model.apply(params, tokens, **kwargs)

    return model._replace(apply=apply), shapes


@pytest.fixture
def no_compilation():
    """A context in which nothing may be compiled."""

    @contextmanager
    def watch():
        compiled = []

        def listen(event, seconds, **_):
            if "backend_compile" in event:
                compiled.append(seconds)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert not compiled

    return watch
