"""What every model promises the rest of the code: the Protocols, auxiliary losses, and one compilation."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.losses import Weighted
from jaxllm.models import (
    Model,
    ScalarModel,
    ScalarTransformer,
    Transformer,
    build_model,
    build_scalar_model,
    unstack_layers,
)
from jaxllm.models.attention import Context
from jaxllm.models.layers import layer_angles
from jaxllm.models.transformer import add_aux

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9), dtype=np.int32)
LENGTHS = np.array([4, 9])


class WithPenalty(Transformer):
    """Each block has an auxiliary loss: the squares of its output, averaged over tokens."""

    def run_block(self, *args, **kwargs):
        output = super().run_block(*args, **kwargs)
        number = output.hidden.shape[0] * output.hidden.shape[1]
        penalty = Weighted(jnp.square(output.hidden).sum(), jnp.float32(number))
        return output._replace(aux={"penalty": penalty})


class ScalarWithPenalty(ScalarTransformer):
    @property
    def decoder(self):
        return WithPenalty(self.config)


def outputs(model, params, run=lambda f, *args: jax.jit(f)(*args)):
    """The Output of each way through the layers."""
    positions = np.tile(np.arange(9), (2, 1))
    cache = model.init_cache(2, 9)
    apply = partial(model.apply, tokens=TOKENS)
    yield "stacked", run(apply, params)
    yield "unstacked", run(lambda params: apply(unstack_layers(params)), params)
    yield "prefill", run(lambda params: apply(params, cache=cache), params)
    yield "decode", run(lambda params: apply(params, positions=positions, cache=cache), params)


def test_the_models_satisfy_the_protocols(tiny):
    model, scalar = build_model(tiny), build_scalar_model(tiny)
    assert isinstance(model, Model)
    assert isinstance(scalar, ScalarModel)
    assert not isinstance(scalar, Model)
    assert not isinstance(model, ScalarModel)


# Auxiliary losses


@pytest.mark.parametrize("options", [{}, {"scan_layers": False}, {"remat": "full"}], ids=str)
def test_a_dense_decoder_has_none(tiny, options):
    model, scalar = build_model(replace(tiny, **options)), build_scalar_model(replace(tiny, **options))
    params, scalar_params = (jax.eval_shape(each.init, jax.random.key(0)) for each in (model, scalar))
    for way, output in outputs(model, params, run=jax.eval_shape):
        assert output.aux == {}, way
    outputs_of_scalar = (
        jax.eval_shape(scalar.apply, scalar_params, TOKENS),
        jax.eval_shape(scalar.rewards, scalar_params, TOKENS, LENGTHS),
    )
    assert [output.aux for output in outputs_of_scalar] == [{}, {}]


@pytest.mark.parametrize(
    "options",
    [{}, {"scan_layers": False}, {"remat": "full"}, {"remat": "full", "scan_layers": False}],
    ids=str,
)
def test_those_of_blocks_are_added_over_layers(tiny, options):
    model = WithPenalty(replace(tiny, **options))
    params = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    def sum_of_squares(params):
        positions = np.tile(np.arange(9), (2, 1))
        context = Context(positions, layer_angles(tiny, positions), segment_ids_BT=None)
        states, squares = model.embed(params, TOKENS), 0.0
        for layer in unstack_layers(params)["blocks"]:
            states = build_model(tiny).run_block("global", layer, states, context).hidden
            squares += jnp.square(states).sum()
        return squares

    squares = sum_of_squares(params)
    for way, output in outputs(model, params):
        assert set(output.aux) == {"penalty"}, way
        assert output.aux["penalty"].weight == tiny.num_layers * TOKENS.size, way
        np.testing.assert_allclose(output.aux["penalty"].sum, squares, rtol=1e-5, err_msg=way)


def test_a_layer_without_one_leaves_those_of_the_others():
    one, two = Weighted(1.0, 2.0), Weighted(3.0, 4.0)
    assert add_aux({"a": one}, {}) == {"a": one}
    assert add_aux({"a": one}, {"b": two}) == {"a": one, "b": two}
    assert add_aux({"a": one, "b": two}, {"b": two}) == {"a": one, "b": Weighted(6.0, 8.0)}


def test_a_scalar_model_passes_those_of_its_decoder_on(tiny):
    model = ScalarWithPenalty(tiny)
    params = jax.jit(model.init)(jax.random.key(0))
    expected = jax.jit(WithPenalty(tiny).apply)(params, TOKENS).aux["penalty"].mean
    for output in (jax.jit(model.apply)(params, TOKENS), jax.jit(model.rewards)(params, TOKENS, LENGTHS)):
        np.testing.assert_allclose(output.aux["penalty"].mean, expected, rtol=1e-6)


# One compilation


@pytest.mark.parametrize("build", [build_model, build_scalar_model])
def test_there_is_one_model_per_config(tiny, build):
    assert build(tiny) is build(replace(tiny))
    assert type(build(tiny))(tiny) == build(tiny)
    assert hash(type(build(tiny))(tiny)) == hash(build(tiny))
    assert build(replace(tiny, num_layers=1)) != build(tiny)


@pytest.mark.parametrize("family", [Transformer, ScalarTransformer])
def test_a_method_is_traced_once_however_often_it_is_jitted(tiny, family):
    traced = []

    class Counted(family):
        def apply(self, params, tokens, **kwargs):
            traced.append(tokens.shape)
            return super().apply(params, tokens, **kwargs)

    model = Counted(tiny)
    params = jax.jit(model.init)(jax.random.key(0))
    for _ in range(2):
        jax.jit(model.apply)(params, TOKENS)
    assert traced == [TOKENS.shape]


@pytest.mark.parametrize("family", [Transformer, ScalarTransformer])
def test_the_config_is_checked_without_a_builder_too(tiny, family):
    with pytest.raises(ConfigError, match=r"model\.num_kv_heads=3 .*use one of 1, 2, 4$"):
        family(replace(tiny, num_kv_heads=3))
