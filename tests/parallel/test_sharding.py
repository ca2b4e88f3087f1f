"""The mesh, the rule table, and that sharding a model changes none of its numbers."""

import logging
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.base.models import model as model_size
from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig, build_model, build_scalar_model
from jaxllm.models.config import LoRAConfig
from jaxllm.parallel import sharding
from jaxllm.parallel.sharding import (
    AXES,
    BATCH,
    MeshConfig,
    batch_sharding,
    constrain,
    make_mesh,
    placed,
    rule_for,
    shardings,
    whole,
)
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import init_state


@pytest.fixture(scope="module")
def every_leaf() -> ModelConfig:
    """A decoder with every optional parameter of those trained here."""
    config = parse(ModelConfig, model_size("tiny"))
    switches = {"qk_norm": "head", "qkv_bias": True, "output_bias": True, "mlp_bias": True}
    return replace(config, tie_embeddings=False, **switches)


def abstract_state(config, optimizer_name):
    optimizer = make_optimizer(
        OptimizerConfig(
            name=optimizer_name,
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            decay_fraction=0.0,
            final_learning_rate=0.0,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            weight_decay=0.1,
            decay_pattern="kernel$",
            clip_norm=1.0,
            muon_momentum=0.95,
            trainable="",
            base_width=None,
            base_layers=None,
        ),
        lambda count: 1e-3 * jnp.ones_like(count, jnp.float32),
    )
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda key: init_state(key, init=lambda key: all_params(config, key), optimizer=optimizer), key
    )


def all_params(config, key):
    """The parameters of a decoder and those of a reward model in one tree."""
    return build_model(config).init(key) | build_scalar_model(config).init(key)


# The mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(8, 1, 1), (8, 1, 1)),
        (MeshConfig(-1, 2, 2), (2, 2, 2)),
        (MeshConfig(1, -1, 2), (1, 4, 2)),
        (MeshConfig(1, 1, -1), (1, 1, 8)),
    ],
)
def test_the_free_axis_takes_the_remaining_devices(config, shape):
    mesh = make_mesh(config)
    data, fsdp, tensor = shape
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, (data, fsdp, 1, tensor), strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_takes_the_devices_it_is_given():
    devices = jax.devices()[2:4]
    assert make_mesh(MeshConfig(1, -1, 1), devices).devices.ravel().tolist() == devices


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(2, 2, 1),
            r"data=2 x fsdp=2 x sequence=1 x tensor=1 is 4 devices, but there are 8; set one size to -1",
        ),
        (MeshConfig(-1, 3, 1), r"8 devices are not divisible by fsdp=3 x sequence=1 x tensor=1"),
        (MeshConfig(16, -1, 1), r"8 devices are not divisible by data=16 x sequence=1 x tensor=1"),
        (MeshConfig(-1, -1, 1), r"at most one of them -1.*'fsdp': -1"),
        (MeshConfig(8, 0, 1), r"1 or more.*'fsdp': 0"),
        (MeshConfig(8, -2, 1), r"1 or more.*'fsdp': -2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_a_config_error(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


# The table


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_every_leaf_of_a_state_matches_one_rule(every_leaf, optimizer_name):
    for config in (every_leaf, replace(every_leaf, tie_embeddings=True)):
        leaves = jax.tree_util.tree_leaves_with_path(abstract_state(config, optimizer_name))
        assert len(leaves) > 50
        for path, leaf in leaves:
            spec = rule_for(sharding.path_name(path))  # raises otherwise
            assert len(spec) <= leaf.ndim, f"{sharding.path_name(path)}: {spec} for {leaf.shape}"


def test_every_rule_is_used(every_leaf):
    gpt2 = replace(every_leaf, norm="layer", position_embedding="learned")
    qlora = replace(every_leaf, lora=LoRAConfig(2, 4.0, False, 0.0, "", "nf4"))
    states = ((every_leaf, "adamw"), (every_leaf, "muon"), (gpt2, "adamw"), (qlora, "adamw"))
    paths = [
        sharding.path_name(path)
        for config, optimizer_name in states
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state(config, optimizer_name))
    ]
    unused = [pattern for pattern, _ in sharding.RULES if not any(re.search(pattern, path) for path in paths)]
    assert unused == []


def test_moments_are_sharded_like_their_parameters(every_leaf):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    state = shardings(abstract_state(every_leaf, "adamw"), mesh)
    assert optax.tree.get(state.opt_state, "mu") == optax.tree.get(state.opt_state, "nu") == state.params


@pytest.mark.parametrize("path", ["params/blocks/mixer/kernel", "params/heads/kernel", "step/extra"])
def test_a_path_without_a_rule_is_an_error(path):
    with pytest.raises(ValueError, match=rf"{path} matches no rule"):
        rule_for(path)


def test_a_path_with_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"up/kernel$", P())))
    with pytest.raises(ValueError, match=r"params/blocks/mlp/up/kernel matches rules .*gate\|up.*'up/kernel"):
        rule_for("params/blocks/mlp/up/kernel")


def test_a_dimension_that_is_not_divisible_is_not_sharded_and_logged_once(caplog):
    mesh = make_mesh(MeshConfig(1, 4, 2))
    tree = {"embed": {"table": jax.ShapeDtypeStruct((61, 32), jnp.float32)}}
    with caplog.at_level(logging.INFO):
        resolved = shardings(tree, mesh)
    assert resolved["embed"]["table"] == NamedSharding(mesh, P(None, "fsdp"))
    assert [record.getMessage() for record in caplog.records] == [
        "embed/table: dimension 61 is not divisible by mesh.tensor=2; not sharded"
    ]


def test_the_target_of_a_checkpoint_has_shapes_dtypes_and_shardings(every_leaf):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    state = abstract_state(every_leaf, "adamw")
    leaves = jax.tree.leaves(placed(state, mesh))
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert [x.sharding for x in leaves] == jax.tree.leaves(shardings(state, mesh))


def test_whole_shards_over_tensor_and_not_over_fsdp(every_leaf):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    params = jax.eval_shape(lambda: all_params(every_leaf, jax.random.key(0)))
    layout = whole(params, mesh)
    kernels = layout["blocks"]["attention"]["query"]["kernel"], layout["blocks"]["mlp"]["down"]["kernel"]
    assert [tuple(kernel.spec) for kernel in kernels] == [(None, None, "tensor"), (None, "tensor", None)]
    assert tuple(layout["embed"]["table"].spec) == ("tensor", None)
    for ours, split in zip(jax.tree.leaves(layout), jax.tree.leaves(shardings(params, mesh)), strict=True):
        assert tuple(ours.spec) == tuple(None if axis == "fsdp" else axis for axis in split.spec)


# What sharding must not change


@pytest.fixture(scope="module")
def single(every_leaf):
    """A model, a loss, a batch, and the value and gradient on one device."""
    model = build_model(replace(every_leaf, vocab_size=511, scan_layers=True))  # odd: not sharded
    draw = np.random.default_rng(0)
    batch = draw.integers(0, 511, (8, 12)), np.sort(draw.integers(1, 3, (8, 12)))
    weights = draw.normal(size=(8, 12, every_leaf.width)).astype(np.float32)

    def loss(params, tokens, segment_ids):
        return (model.apply(params, tokens, segment_ids=segment_ids).hidden * weights).sum()

    params = jax.jit(model.init)(jax.random.key(0))
    return model, loss, batch, params, jax.jit(jax.value_and_grad(loss))(params, *batch)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_a_mesh_changes_no_value_and_no_gradient_and_shards_the_parameters(single, sizes):
    model, loss, batch, whole_params, (expected_value, expected_gradient) = single
    mesh = make_mesh(MeshConfig(*sizes))
    layout = shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=layout)(jax.random.key(0))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(NamedSharding(mesh, P()), layout))
        value, gradient = step(params, *jax.device_put(batch, batch_sharding(mesh)))
    jax.tree.map(np.testing.assert_array_equal, params, whole_params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())

    blocks = jax.tree.leaves(params["blocks"])
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in blocks) / sum(
        leaf.nbytes for leaf in blocks
    )
    _, fsdp, tensor = sizes
    assert share == pytest.approx(1 / (fsdp * tensor), rel=0.05)  # norms and some biases are replicated


def test_activations_stay_sharded_by_rows_where_rows_are_divisible():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    whole = jnp.ones((8, 6))
    assert constrain(whole, BATCH) is whole  # no mesh
    with jax.set_mesh(mesh):
        split = jax.jit(constrain, static_argnums=1)(whole, BATCH)
        unconstrained = jax.make_jaxpr(constrain, static_argnums=1)(jnp.ones((3, 6)), BATCH)
    assert split.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 2)
    assert unconstrained.eqns == []
