"""Learning rates and initial weights that follow the size of the model."""

import jax
import numpy as np
import pytest

from jaxllm.config import load_config, parse
from jaxllm.errors import ConfigError
from jaxllm.runs.program import Program
from jaxllm.stages import find_stage
from jaxllm.training.parametrization import size_factors

PRETRAIN = find_stage("pretrain")


def program(**fields):
    """A pretraining program whose config has these dotted fields."""
    config = load_config("configs/pretrain_text.py:tiny")
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1.0, 0
    config.optimizer.schedule, config.optimizer.weight_decay = "constant", 0.0
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return Program(PRETRAIN, parse(PRETRAIN.Config, config))


def flat(tree):
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def update_of(made, gradient):
    """The first update of weights that are 1, by the gradient of each parameter's shape."""
    optimizer = made.train_step.keywords["optimizer"]
    shapes = jax.eval_shape(made.model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    gradients = jax.tree.map(lambda x: np.asarray(gradient(x), np.float32), shapes)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)


def ratios(optimizer, what):
    """What a base of half the width and depth changes: for each parameter, its factor."""
    sizes = {"optimizer__base_width": 32, "optimizer__base_layers": 1}

    def values(**fields):
        made = program(optimizer__name=optimizer, **fields)
        if what == "init":
            return flat(jax.jit(lambda key: made.init(key).params)(jax.random.key(0)))
        return flat(update_of(made, lambda x: np.random.default_rng(x.size).normal(size=x.shape)))

    scaled, plain = values(**sizes), values()
    return {name: np.abs(scaled[name]).sum() / np.abs(plain[name]).sum() for name in plain}


@pytest.mark.parametrize(
    ("optimizer", "kernel"), [("adamw", 1 / 2), ("muon", 2**-0.5)], ids=["adamw", "muon"]
)
def test_rates_of_twice_the_width_and_depth(optimizer, kernel):
    found = ratios(optimizer, "rate")
    assert found["embed/table"] == pytest.approx(1)
    assert found["final_norm/scale"] == pytest.approx(1 / 2)
    assert found["blocks/attention_norm/scale"] == pytest.approx(1)
    for name in ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up"):
        assert found[f"blocks/{name}/kernel"] == pytest.approx(kernel, rel=1e-4)
    for name in ("attention/output", "mlp/down"):
        assert found[f"blocks/{name}/kernel"] == pytest.approx(kernel / 2, rel=1e-4)


def test_initial_weights_of_twice_the_width_and_depth():
    found = ratios("adamw", "init")
    changed = {name: ratio for name, ratio in found.items() if ratio != 1}
    assert changed == pytest.approx(
        {
            "blocks/attention/output/kernel": 2**-0.5,
            "blocks/mlp/down/kernel": 2**-0.5,
            "final_norm/scale": 1 / 2,
        }
    )


def test_the_base_size_itself_trains_as_without():
    assert set(size_factors("muon", 1.0, 1.0).rate.values()) == {1.0}
    assert set(size_factors("adamw", 1.0, 1.0).init.values()) == {1.0}


def test_given_weights_are_not_scaled():
    made = program(optimizer__base_width=32)
    shapes = jax.eval_shape(made.model.init, jax.random.key(0))
    given = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 3, np.float32)), shapes)
    kept = made.fresh_state(given).params
    assert all((np.asarray(x) == 3).all() for x in jax.tree.leaves(kept))


def test_decay_is_not_scaled():
    def no_gradient(x):
        return np.zeros(x.shape)

    decayed, plain = (
        flat(update_of(program(optimizer__base_width=base, optimizer__weight_decay=0.1), no_gradient))
        for base in (32, None)
    )
    for name in ("blocks/attention/query/kernel", "embed/table"):
        assert np.abs(plain[name]).min() > 0
        np.testing.assert_allclose(decayed[name], plain[name])


def test_norms_that_add_one_are_refused():
    with pytest.raises(ConfigError, match=r"base_width and base_layers do not support model\.zero_centered"):
        program(optimizer__base_width=32, model__zero_centered_norm=True)


def test_a_base_of_no_width_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.base_width=0 must be at least 1"):
        program(optimizer__base_width=0)
