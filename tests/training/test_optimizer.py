"""Schedules by hand-worked values; optimizers by which parameter gets which update."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.errors import ConfigError
from jaxllm.parallel.sharding import MeshConfig, make_mesh, shardings
from jaxllm.plan.hlo import read_program
from jaxllm.training.optimizer import (
    OptimizerConfig,
    ParameterGroup,
    make_optimizer,
    make_schedule,
    scale_by_muon,
)

CONFIG = OptimizerConfig(
    name="adamw",
    learning_rate=1.0,
    schedule="constant",
    warmup_steps=4,
    decay_fraction=0.5,
    final_learning_rate=0.1,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.0,
    decay_pattern="kernel$|table$",
    clip_norm=None,
    muon_momentum=0.95,
    trainable="",
    base_width=None,
    base_layers=None,
)


def rates(steps=24, **changes):
    schedule = make_schedule(replace(CONFIG, **changes), steps)
    return np.array([float(schedule(i)) for i in range(steps + 1)])


def test_warmup_rises_to_the_peak_and_has_no_step_at_zero():
    np.testing.assert_allclose(rates()[:6], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rtol=1e-6)


def test_cosine_is_halfway_in_the_middle_and_ends_at_the_final_rate():
    cosine = rates(schedule="cosine")
    np.testing.assert_allclose(cosine[[4, 14, 24]], [1.0, 0.55, 0.1], rtol=1e-6)


def test_linear_falls_by_equal_steps():
    np.testing.assert_allclose(np.diff(rates(schedule="linear")[4:]), -0.9 / 20, rtol=1e-4)


def test_wsd_stays_at_the_peak_and_then_falls_over_the_last_part():
    wsd = rates(schedule="wsd")
    np.testing.assert_allclose(wsd[4:13], 1.0)  # the decay takes the last 12 of 24 steps
    np.testing.assert_allclose(np.diff(wsd[12:]), -0.9 / 12, rtol=1e-4)
    np.testing.assert_allclose(wsd[24], 0.1, rtol=1e-6)


@pytest.mark.parametrize("field", ["learning_rate", "final_learning_rate", "weight_decay"])
def test_a_negative_rate_would_ascend_and_is_an_error(field):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}=-0\.1 must not be negative"):
        replace(CONFIG, **{field: -0.1})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"warmup_steps": 24}, "optimizer.warmup_steps"),
        ({"schedule": "wsd", "decay_fraction": 0.9}, "optimizer.decay_fraction"),
        ({"schedule": "cosin"}, "optimizer.schedule"),
    ],
)
def test_a_schedule_that_does_not_fit_is_an_error_that_names_the_field(changes, field):
    with pytest.raises(ConfigError, match=field):
        make_schedule(replace(CONFIG, **changes), 24)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ConfigError, match=r"optimizer.name='sgd'.*adamw, muon"):
        make_optimizer(replace(CONFIG, name="sgd"), lambda _: 1.0)


def params():
    draw = np.random.default_rng(0)

    def array(*shape):
        return jnp.array(draw.normal(size=shape), jnp.float32)

    return {
        "embed": {"table": array(11, 4)},
        "blocks": {
            "mlp": {"up": {"kernel": array(2, 4, 6), "bias": array(2, 6)}},
            "mlp_norm": {"scale": array(2, 4)},
        },
        "head": {"kernel": array(4, 11)},
    }


def updates(config, grads, learning_rate=1.0, group=None):
    optimizer = make_optimizer(config, lambda _: learning_rate, group)
    return optimizer.update(grads, optimizer.init(params()), params())[0]


def test_adamw_equals_that_of_optax():
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params())
    config = replace(CONFIG, weight_decay=0.1)
    reference = optax.adamw(
        1.0,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        mask={
            "embed": {"table": True},
            "blocks": {"mlp": {"up": {"kernel": True, "bias": False}}, "mlp_norm": {"scale": False}},
            "head": {"kernel": True},
        },
    )
    expected = reference.update(grads, reference.init(params()), params())[0]
    jax.tree.map(np.testing.assert_allclose, updates(config, grads), expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_have_weight_decay(name):
    config = replace(CONFIG, name=name, weight_decay=0.5)
    moved = updates(config, jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_allclose(moved["embed"]["table"], -0.5 * params()["embed"]["table"], rtol=1e-6)
    kernel = moved["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(kernel, -0.5 * params()["blocks"]["mlp"]["up"]["kernel"], rtol=1e-6)
    assert not moved["blocks"]["mlp"]["up"]["bias"].any()
    assert not moved["blocks"]["mlp_norm"]["scale"].any()


def test_muon_orthogonalizes_the_matrix_of_each_layer_and_leaves_the_rest_to_adamw():
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params())
    muon, adamw = (updates(replace(CONFIG, name=name), grads) for name in ("muon", "adamw"))
    for layer, update in enumerate(muon["blocks"]["mlp"]["up"]["kernel"]):
        # Newton-Schulz brings the singular values near 1; the scale is divided out here.
        singular = np.linalg.svd(-np.asarray(update) / (0.2 * 6**0.5), compute_uv=False)
        assert (singular > 0.6).all(), (layer, singular)
        assert (singular < 1.3).all(), (layer, singular)
    for path in (("embed", "table"), ("head", "kernel")):
        np.testing.assert_allclose(muon[path[0]][path[1]], adamw[path[0]][path[1]], rtol=1e-6)


def test_muon_on_a_mesh_moves_each_matrix_to_one_device_and_gives_the_same_updates():
    """Nothing is sent while it orthogonalizes: gradients, momentum and updates go over each axis and back."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tree = {"blocks": {"mlp": {"up": {"kernel": jnp.cos(jnp.arange(8 * 4 * 6.0)).reshape(8, 4, 6)}}}}
    muon = scale_by_muon(0.95)
    state = muon.init(tree)
    expected = muon.update(tree, state)
    with jax.set_mesh(mesh):
        split = jax.device_put((tree, state), (shardings(tree, mesh), shardings(state, mesh)))
        run = jax.jit(muon.update, out_shardings=(shardings(tree, mesh), shardings(state, mesh)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run(*split), expected)
        text = run.lower(*split).compile().as_text()
    sent = [each for each in read_program(text, dict(mesh.shape)).collectives if each.bytes > 16]
    assert {each.op for each in sent} == {"all-to-all"}
    assert sum(each.count for each in sent) <= 12  # 15 products of split matrices would each send


def test_clipping_keeps_the_direction_and_bounds_the_length():
    grads = jax.tree.map(lambda p: 100 * p, params())
    plain = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())[0]
    clipped = updates(replace(CONFIG, clip_norm=0.5, epsilon=1.0), grads)
    unclipped = updates(replace(CONFIG, epsilon=1.0), plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, unclipped)


@pytest.mark.parametrize("field", ["trainable", "decay_pattern"])
def test_an_invalid_regular_expression_is_named(field):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}='\(': missing \)"):
        replace(CONFIG, **{field: "("})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_group_has_its_own_rate_and_the_same_optimizer_state(name):
    config = replace(CONFIG, name=name, clip_norm=0.1, weight_decay=0.5)
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params())
    group = ParameterGroup("^blocks/", rate=3.0, clip_norm=None)
    expected = updates(config, grads)
    expected["blocks"] = jax.tree.map(lambda x: 3 * x, expected["blocks"])
    jax.tree.map(np.testing.assert_allclose, updates(config, grads, group=group), expected)
    states = [make_optimizer(config, lambda _: 1.0, each).init(params()) for each in (None, group)]
    names = [[jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(each)] for each in states]
    assert names[0] == names[1]  # so that a checkpoint of either can be read


@pytest.mark.parametrize("norm", [None, 2.0])
def test_a_group_is_clipped_by_its_own_norm(norm):
    config = replace(
        CONFIG, clip_norm=norm, beta1=0.0, beta2=0.0, epsilon=1e6
    )  # updates are -grads / epsilon
    grads = jax.tree.map(jnp.ones_like, params())
    group = ParameterGroup("^head/", rate=1.0, clip_norm=0.5)
    moved = jax.tree.map(lambda x: -1e6 * x, updates(config, grads, group=group))
    head, rest = moved.pop("head"), moved
    assert optax.tree.norm(head) == pytest.approx(0.5, rel=1e-4)
    alone = optax.tree.norm({name: x for name, x in grads.items() if name != "head"})
    assert optax.tree.norm(rest) == pytest.approx(float(alone) if norm is None else norm, rel=1e-4)
