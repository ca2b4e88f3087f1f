"""Adapters: fresh ones change nothing, trained ones can be merged, the config says which layers have them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig, build_model
from jaxllm.models.config import LoRAConfig
from jaxllm.models.lora import ADAPTERS, merge_lora
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.training.state import split_params

LORA = LoRAConfig(rank=3, alpha=6.0, rank_stabilized=False, dropout=0.0, targets="", quantize="none")
KEY, DRAW = jax.random.key(0), np.random.default_rng(0)


@pytest.fixture(scope="module")
def config():
    from configs.base.models import model

    return replace(
        parse(ModelConfig, model("tiny").to_dict(), "model"), width=32, vocab_size=64, max_length=32
    )


@pytest.fixture(scope="module")
def tokens(config):
    return jax.random.randint(KEY, (2, 9), 0, config.vocab_size)


def with_lora(config, **changes):
    return replace(config, lora=replace(LORA, **changes))


def trained(model):
    """Its parameters with adapters that are not zero."""
    params = jax.jit(model.init)(KEY)
    return jax.tree.map(lambda x: np.asarray(x) + DRAW.normal(scale=0.02, size=x.shape).astype("f"), params)


def adapted_layers(config):
    adapters = split_params(jax.eval_shape(build_model(config).init, KEY), ADAPTERS)[0]
    paths = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves(adapters))
    return {path.removeprefix("blocks/").rpartition("/lora/")[0] for path in paths}


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_a_model_with_fresh_adapters_computes_what_it_computes_without(config, tokens):
    plain, adapted = build_model(config), build_model(with_lora(config))
    params, plain_params = jax.jit(adapted.init)(KEY), jax.jit(plain.init)(KEY)
    base = split_params(params, ADAPTERS)[1]
    for (path, a), (_, b) in zip(leaves(base), leaves(plain_params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    logits = jax.jit(plain.logits)(plain_params, tokens)
    np.testing.assert_array_equal(jax.jit(adapted.logits)(params, tokens), logits)
    # float32, whatever the kernels are: they are the masters of what trains
    half = build_model(replace(with_lora(config), param_dtype="bfloat16"))
    up = jax.eval_shape(half.init, KEY)["blocks"]["mlp"]["up"]
    assert (up["kernel"].dtype, up["lora"]["a"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_merged_model_computes_what_the_adapted_one_does(config, tokens, rank_stabilized):
    adapted = with_lora(config, rank_stabilized=rank_stabilized)
    params = trained(build_model(adapted))
    plain, merged = merge_lora(adapted, params)
    assert plain == config
    logits = jax.jit(build_model(adapted).logits)(params, tokens)
    np.testing.assert_allclose(jax.jit(build_model(plain).logits)(merged, tokens), logits, atol=2e-5)
    query = jax.tree.map(lambda x: np.asarray(x[1], np.float64), params["blocks"]["attention"]["query"])
    scale = 6 / 3**0.5 if rank_stabilized else 6 / 3
    by_hand = query["kernel"] + scale * query["lora"]["a"] @ query["lora"]["b"]
    np.testing.assert_allclose(merged["blocks"]["attention"]["query"]["kernel"][1], by_hand, atol=1e-6)


def test_decoding_uses_the_adapters(config, tokens):
    adapted = with_lora(config)
    params, prompts = trained(build_model(adapted)), tokens.tolist()
    sampling = SamplingConfig(0.0, None, None, None, max_new_tokens=8)
    keys = jax.random.split(KEY, len(prompts))

    def greedy(model, params):
        return generate(model, params, prompts, sampling=sampling, stop_ids=(), keys=keys).tokens

    plain, merged = merge_lora(adapted, params)
    assert greedy(build_model(adapted), params) == greedy(build_model(plain), merged)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_dropout_is_random_by_its_key_and_off_without_one(config, tokens, scan_layers):
    model = build_model(replace(with_lora(config, dropout=0.5), scan_layers=scan_layers))
    params, logits = trained(model), jax.jit(model.logits)
    still = jax.jit(build_model(with_lora(config)).logits)(params, tokens)
    np.testing.assert_allclose(logits(params, tokens), still, atol=1e-5)
    dropped = logits(params, tokens, dropout_key=KEY)
    assert float(jnp.abs(dropped - still).max()) > 1e-3
    np.testing.assert_array_equal(logits(params, tokens, dropout_key=KEY), dropped)
    assert float(jnp.abs(logits(params, tokens, dropout_key=jax.random.key(1)) - dropped).max()) > 1e-3


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("attention/(query|value)$", {"attention/query", "attention/value"}),
        ("mlp/", {"mlp/gate", "mlp/up", "mlp/down"}),
        ("(output|down)$", {"attention/output", "mlp/down"}),
    ],
)
def test_targets_are_found_in_the_path_of_a_layer(config, targets, layers):
    assert adapted_layers(with_lora(config, targets=targets)) == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "model.lora.rank=0 must be at least 1, or none for no adapters"),
        ({"alpha": 0.0}, "model.lora.alpha=0.0 must be above 0"),
        ({"dropout": 1.0}, "model.lora.dropout=1.0 must be at least 0 and less than 1"),
        ({"targets": "("}, "model.lora.targets='('"),
        ({"quantize": "int3"}, "model.lora.quantize='int3': choose one of none, int8, nf4"),
        ({"rank": None, "quantize": "nf4"}, "model.lora.quantize=nf4 freezes the kernels: set"),
        ({"targets": "q_proj"}, "model.lora.targets='q_proj' matches no layer: they are attention/query"),
    ],
)
def test_adapters_that_cannot_be_are_one_line(config, changes, message):
    with pytest.raises(ConfigError) as error:
        build_model(with_lora(config, **changes)).init(KEY)
    assert message in str(error.value)
