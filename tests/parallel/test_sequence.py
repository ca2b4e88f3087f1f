"""The tokens of a row split over devices: the same logits and gradients, and what cannot be split."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import parse_config

from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.losses import linear_cross_entropy
from jaxllm.models import ModelConfig, build_model, build_scalar_model
from jaxllm.parallel.sequence import by_token
from jaxllm.parallel.sharding import MeshConfig, make_mesh
from jaxllm.stages import build_program

B, T = 2, 32


@pytest.fixture(scope="module")
def model():
    from configs.base.models import model

    config = replace(
        parse(ModelConfig, model("tiny").to_dict(), "model"),
        num_layers=3,
        width=32,
        vocab_size=64,
        layer_pattern=("global", "local", "nope"),
        sliding_window=11,
    )
    return build_model(config)


def test_split_rows_have_the_loss_and_gradient_of_whole_ones(model):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 64, (B, T + 1)).astype(np.int32)
    segments = np.sort(draw.integers(1, 4, (B, T)).astype(np.int32))
    mask = draw.random((B, T)) < 0.7

    def loss(params):
        hidden = model.apply(params, tokens[:, :-1], segment_ids=segments).hidden
        cross_entropy = by_token(linear_cross_entropy, sums=True)
        return cross_entropy(hidden, model.head(params), jnp.asarray(tokens[:, 1:]), jnp.asarray(mask))[0].sum

    params = jax.jit(model.init)(jax.random.key(0))
    expected = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, sequence=4))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        found = compiled(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    # Each device has T / 4 positions of the MLP's hidden units, and never all.
    width = model.config.mlp_width
    assert f",{T // 4},{width}]" in compiled.as_text() or f"[{B * T // 4},{width}]" in compiled.as_text()
    assert f"[{B * T},{width}]" not in compiled.as_text()


def test_split_rows_have_the_rewards_of_whole_ones(model):
    scalar = build_scalar_model(replace(model.config, scan_layers=False))
    params = jax.jit(scalar.init)(jax.random.key(0))
    params["scalar_head"] = {"kernel": jax.random.normal(jax.random.key(1), (model.config.width, 1))}
    tokens = np.random.default_rng(0).integers(0, 64, (B, T)).astype(np.int32)
    lengths = np.array([5, T])
    expected = jax.jit(scalar.rewards)(params, tokens, lengths).values
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, sequence=4))):
        found = jax.jit(lambda params: scalar.rewards(params, tokens, lengths).values)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.sequence_length": 62},
            "sequence_length=62 does not divide over mesh.sequence=4: use 60 or 64",
        ),
        (
            {"model.attention": "cudnn", "model.compute_dtype": "bfloat16"},
            "model.attention=cudnn needs a gpu",
        ),
    ],
)
def test_what_cannot_be_split_is_one_line(fields, message):
    fields = {"mesh.data": -1, "mesh.sequence": 4, "data.batch_size": 8, "data.sequence_length": 64} | fields
    with pytest.raises(ConfigError) as error:
        build_program(parse_config("pretrain_text.py:tiny", fields))
    assert message in str(error.value)
