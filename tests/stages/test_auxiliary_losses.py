"""A model's auxiliary losses, as of experts, are in the loss, the gradient and the metrics of every stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_preference_losses import pairs
from tiny_runs import parse_config

from jaxllm.batches import RolloutBatch, TokenBatch
from jaxllm.config import load_config, parse
from jaxllm.losses import Weighted
from jaxllm.models import ModelConfig, ScalarTransformer, Transformer
from jaxllm.stages import dpo, find_stage, grpo, ppo, pretrain, reward_model, sft

OBJECTIVES = {
    "pretrain": (pretrain, {"z_loss": 0.0}),
    "sft": (sft, {"z_loss": 0.0, "neftune_alpha": 0.0, "dft": False}),
    "sft, dft": (sft, {"z_loss": 0.0, "neftune_alpha": 0.0, "dft": True}),
    "reward_model": (reward_model, {"center_coefficient": 0.0}),
    "dpo": (dpo, {"beta": 0.1, "variant": "sigmoid", "label_smoothing": 0.0, "length_normalized": False}),
    "grpo": (
        grpo,
        {
            "rollout": parse_config("grpo_problems.py:tiny", {}).rollout,
            "variant": "grpo",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "entropy_coefficient": 0.0,
        },
    ),
    "ppo": (
        ppo,
        {
            "rollout": parse_config("ppo_preferences.py:tiny", {}).rollout,
            "clip": 0.2,
            "value_clip": None,
            "value_coefficient": 0.1,
            "entropy_coefficient": 0.0,
        },
    ),
}


def balance(params, scale):
    """An auxiliary loss that depends on one parameter."""
    return {"balance": Weighted(scale * jnp.sum(params["final_norm"]["scale"]) * 3.0, jnp.float32(3.0))}


class Balanced(Transformer):
    def apply(self, params, tokens, **kwargs):
        return super().apply(params, tokens, **kwargs)._replace(aux=balance(params, 0.5))


class BalancedScalar(ScalarTransformer):
    @property
    def decoder(self):
        return Balanced(self.config)


@pytest.fixture(scope="module")
def config():
    shape = load_config("configs/pretrain_text.py:tiny").model
    shape.num_layers, shape.width, shape.vocab_size = 1, 32, 48
    return parse(ModelConfig, shape)


def token_batch(length=8):
    ids = np.random.default_rng(0).integers(1, 40, (2, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return TokenBatch(ids, np.roll(ids, -1, 1), ids > 0, np.ones_like(ids), positions)


def rollout_batch(length=8, per_token=False):
    tokens = token_batch(length).tokens
    zeros = np.zeros(tokens.shape, np.float32)
    return RolloutBatch(
        tokens,
        tokens > 0,
        zeros - 3,
        zeros + 1 if per_token else zeros[:, 0] + 1,
        values=zeros,
        returns=zeros,
    )


def build(name, config, Model, Scalar):
    """Parameters, batch and loss of a stage, with models of these classes."""
    stage, options = OBJECTIVES[name]
    model, scalar = Model(config), Scalar(config)
    key = jax.random.key(0)
    if name == "ppo":
        params = {"policy": model.init(key), "critic": scalar.init(key)}
        batch = rollout_batch(per_token=True)
        loss = functools.partial(stage.loss_fn, model=model, critic=scalar, **options)
    elif name == "reward_model":
        params, batch = scalar.init(key), pairs(count=2, length=24)
        loss = functools.partial(stage.loss_fn, model=scalar, **options)
    else:
        batches = {"dpo": pairs(count=2, length=24), "grpo": rollout_batch()}
        params, batch = model.init(key), batches.get(name, token_batch())
        loss = functools.partial(stage.loss_fn, model=model, **options)
    return params, batch, loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_auxiliary_loss_is_added_and_logged(name, config):
    def evaluate(Model, Scalar):
        params, batch, loss = build(name, config, Model, Scalar)

        def mean(params):
            loss_sum, metrics = loss(params, batch, key=jax.random.key(1))
            return loss_sum.mean, metrics

        return jax.jit(jax.value_and_grad(mean, has_aux=True))(params)

    (plain, plain_metrics), plain_gradient = evaluate(Transformer, ScalarTransformer)
    (balanced, metrics), gradient = evaluate(Balanced, BalancedScalar)
    logged = metrics.keys() - plain_metrics.keys()
    assert logged == ({"policy/balance", "value/balance"} if name == "ppo" else {"balance"})
    added = 0.5 * config.width  # each: the norm's scale is 1 everywhere
    assert all(float(metrics[each].mean) == pytest.approx(added) for each in logged)
    assert float(balanced - plain) == pytest.approx(added * len(logged), rel=1e-5)
    difference = jax.tree.map(lambda a, b: np.asarray(a - b), gradient, plain_gradient)
    models = [difference["policy"], difference["critic"]] if name == "ppo" else [difference]
    for part in models:
        np.testing.assert_allclose(part["final_norm"]["scale"], 0.5, atol=1e-5)


def test_every_stage_is_tested():
    tested = {stage.__name__.rpartition(".")[2] for stage, _ in OBJECTIVES.values()}
    assert all(find_stage(name).generates in (True, False) for name in tested)
    assert tested == {"pretrain", "sft", "reward_model", "dpo", "grpo", "ppo"}
