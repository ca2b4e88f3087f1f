"""A small decoder with noise added to its parameters: at first a tied head mostly echoes its input."""

from contextlib import contextmanager

import jax
import pytest

from configs.base.models import model as model_shape
from jaxllm.config import parse
from jaxllm.models import ModelConfig, Transformer, build_model


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
def counted(tiny):
    """The model, and the shapes of the tokens that it is traced for."""
    shapes = []

    class Counted(Transformer):  # a class of its own per test, so that none finds another's programs
        def apply(self, params, tokens, **kwargs):
            shapes.append(tokens.shape)
            return super().apply(params, tokens, **kwargs)

    return Counted(tiny), shapes


@pytest.fixture
def no_compilation():
    """A context manager that fails if anything is compiled inside."""

    @contextmanager
    def fail_on_compilation():
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

    return fail_on_compilation
