"""Log-probs of given tokens: the output head is applied to the positions that count alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import parse_config

from jaxllm.models import build_model
from jaxllm.rollout.score import next_token_log_probs
from jaxllm.stages import build_program

B, T, COUNTED = 8, 24, 7


@pytest.fixture(scope="module")
def tokens_and_mask():
    draw = np.random.default_rng(0)
    ends = draw.integers(COUNTED, T, B)
    positions = np.arange(T)
    mask = (positions < ends[:, None]) & (positions >= ends[:, None] - draw.integers(0, COUNTED + 1, (B, 1)))
    mask[0] = positions % 4 == 1  # such as around tool output
    return draw.integers(0, 512, (B, T)).astype(np.int32), mask


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_counted_positions_have_the_scores_and_gradients_of_all(tokens_and_mask, mesh):
    tokens, mask = tokens_and_mask
    fields = {"model.num_layers": 1, "model.vocab_size": 512, "mesh.data": mesh[0], "mesh.fsdp": mesh[1]}
    config = parse_config("pretrain_text.py:tiny", fields)
    program = build_program(config, jax.devices()[: mesh[0] * mesh[1]])
    model, sharding = build_model(config.model), program.batch_sharding
    params = jax.device_put(program.init(jax.random.key(0)).params, program.shardings.params)
    tokens, mask = jax.device_put((tokens, mask), sharding)

    def total(params, counted):
        scores = next_token_log_probs(params, tokens, model=model, temperature=0.7, counted=counted)
        arrays = jnp.where(mask, scores.log_probs, 0), jnp.where(mask, scores.entropy, 0)
        return (arrays[0] * jnp.cos(tokens)).sum(), arrays

    with jax.set_mesh(program.mesh):
        gradients = [
            jax.jit(jax.value_and_grad(functools.partial(total, counted=counted), has_aux=True))
            for counted in (None, (mask, COUNTED))
        ]
        compiled = gradients[1].lower(params).compile()
        expected, found = gradients[0](params), compiled(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    rows = B // (mesh[0] * mesh[1])
    logits = {int(n) for n in re.findall(r"f32\[(\d+),512\]", compiled.as_text())}
    assert rows * COUNTED in logits
    assert rows * T not in logits
