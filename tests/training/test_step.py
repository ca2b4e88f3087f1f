"""The train step, on a loss that can be worked out by hand: (w x - y)^2 over the entries of a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.losses import Weighted
from jaxllm.parallel.sharding import path_name
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import init_state, merge_params, split_params
from jaxllm.training.step import split_rows, train_step


def squared_error(params, batch, key):
    x, y = (jnp.where(batch["mask"], batch[name], 0.0) for name in ("x", "y"))
    loss = Weighted(((params["w"] * x - y) ** 2).sum(), batch["mask"].sum().astype(jnp.float32))
    return loss, {"loss": loss, "noise": Weighted(jax.random.uniform(key), jnp.float32(1))}


def make_batch(rows=8, seed=0):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(2, rows, 3)).astype(np.float32)
    return {"x": x, "y": y, "mask": draw.random((rows, 3)) < 0.6}


def make_state(optimizer, w=2.0):
    return init_state(jax.random.key(1), init=lambda key: {"w": jnp.float32(w)}, optimizer=optimizer)


def run(state, batch, optimizer, num_microbatches=1):
    step = functools.partial(
        train_step, loss_fn=squared_error, optimizer=optimizer, num_microbatches=num_microbatches
    )
    return jax.jit(step)(state, batch)


def test_a_step_follows_the_gradient_of_the_mean_over_the_mask():
    batch, optimizer = make_batch(), optax.sgd(0.1)
    state, metrics = run(make_state(optimizer), batch, optimizer)
    x, y, mask = batch["x"], batch["y"], batch["mask"]
    gradient = (2 * x * (2 * x - y))[mask].mean()
    np.testing.assert_allclose(state.params["w"], 2 - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].mean, ((2 * x - y) ** 2)[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"].mean, abs(gradient), rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_microbatches_of_unequal_weight_give_the_gradient_of_the_whole_batch(num_microbatches):
    batch, optimizer = make_batch(), optax.sgd(0.1)
    batch["mask"][:5] = False  # some micro-batches have no entries in the mask
    whole, whole_metrics = run(make_state(optimizer), batch, optimizer)
    parts, parts_metrics = run(make_state(optimizer), batch, optimizer, num_microbatches)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(parts_metrics["loss"].mean, whole_metrics["loss"].mean, rtol=1e-6)
    assert float(parts_metrics["loss"].weight) == batch["mask"].sum()


def test_every_microbatch_has_rows_of_every_device():
    microbatches = split_rows({"x": np.arange(8)}, 2)["x"]
    np.testing.assert_array_equal(microbatches, [[0, 2, 4, 6], [1, 3, 5, 7]])  # 4 devices hold 2 rows each


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_only_its_counters(poison):
    optimizer = optax.adam(0.1)
    good, bad = make_batch(), make_batch()
    bad["y"] = np.full_like(bad["y"], poison)
    before, _ = run(make_state(optimizer), good, optimizer)
    after, metrics = run(before, bad, optimizer)
    for old, new in zip(
        jax.tree.leaves((before.params, before.opt_state)),
        jax.tree.leaves((after.params, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)  # Adam's count and moments too
    assert (int(after.step), int(after.skipped_steps), int(after.bad_streak)) == (2, 1, 1)
    assert float(metrics["skipped_steps"].mean) == 1
    recovered, _ = run(after, good, optimizer)
    assert (int(recovered.step), int(recovered.skipped_steps), int(recovered.bad_streak)) == (3, 1, 0)
    assert float(recovered.params["w"]) != float(after.params["w"])


def test_a_batch_with_an_empty_mask_has_a_loss_of_zero():
    batch, optimizer = make_batch(), optax.sgd(0.1)
    batch["mask"][:] = False
    batch["x"][:] = np.nan
    state, metrics = run(make_state(optimizer), batch, optimizer)
    assert float(state.params["w"]) == 2.0
    assert float(metrics["loss"].mean) == 0.0


@pytest.mark.parametrize("weight", [0, 24])
def test_a_batch_without_gradient_moves_neither_parameters_nor_moments(weight):
    """A weight may be constant (Dr. GRPO): a batch that is masked whole then has weight, but no gradient."""
    optimizer = optax.adam(0.1)
    before, _ = run(make_state(optimizer), make_batch(), optimizer)  # a momentum of its own
    zero = np.zeros((8, 3), np.float32)
    after, metrics = run(before, {"x": zero, "y": zero, "mask": zero + weight > 0}, optimizer)
    kept = [jax.tree.leaves((state.params, state.opt_state)) for state in (before, after)]
    for old, new in zip(*kept, strict=True):
        np.testing.assert_array_equal(old, new)  # the count, and with it the schedule, too
    assert (int(after.step), int(after.skipped_steps), int(after.bad_streak)) == (2, 1, 0)
    assert float(metrics["loss"].weight) == weight


def test_randomness_depends_on_the_key_of_the_run_and_the_step_only():
    batch, optimizer = make_batch(), optax.sgd(0.0)
    first, noise_0 = run(make_state(optimizer), batch, optimizer)
    _, noise_1 = run(first, batch, optimizer)
    _, again = run(make_state(optimizer), batch, optimizer)
    assert float(noise_0["noise"].sum) != float(noise_1["noise"].sum)
    assert float(noise_0["noise"].sum) == float(again["noise"].sum)
    _, parts = run(make_state(optimizer), batch, optimizer, 2)
    assert float(parts["noise"].weight) == 2


def test_a_donated_state_is_deleted():
    batch, optimizer = make_batch(), optax.adam(0.1)
    step = functools.partial(train_step, loss_fn=squared_error, optimizer=optimizer, num_microbatches=1)
    state = make_state(optimizer)
    jax.jit(step, donate_argnums=0)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


# Trainable and frozen parameters


def network_error(params, batch, key):
    """The squared error of y = x A B C, which depends on every parameter."""
    a, b = params["blocks"]["up"]["kernel"], params["blocks"]["down"]["kernel"]
    error = batch["x"] @ a[0] @ b[0] @ params["head"]["kernel"] - batch["y"]
    loss = Weighted((error**2).sum(), jnp.float32(len(error)))
    return loss, {"loss": loss}


def init_network(key):
    up, down, head = (jax.random.normal(each, (4, 4)) for each in jax.random.split(key, 3))
    blocks = {"up": {"kernel": up[None]}, "down": {"kernel": down[None]}}
    return {"blocks": blocks, "head": {"kernel": head}}


def named_optimizer(name):
    config = OptimizerConfig(
        name=name,
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        decay_fraction=0.5,
        final_learning_rate=0.1,
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
    )
    return make_optimizer(config, optax.constant_schedule(0.1))


def train_network(name, trainable, num_microbatches=1, poison=0.0):
    """State before and after a step, its metrics and its batch."""
    optimizer, draw = named_optimizer(name), np.random.default_rng(0)
    x, y = draw.normal(size=(2, 8, 4)).astype(np.float32)
    batch = {"x": x, "y": y + np.float32(poison)}
    before = init_state(jax.random.key(1), init=init_network, optimizer=optimizer, trainable=trainable)
    step = functools.partial(
        train_step,
        loss_fn=network_error,
        optimizer=optimizer,
        num_microbatches=num_microbatches,
        trainable=trainable,
    )
    after, metrics = jax.jit(step)(before, batch)
    return before, after, metrics, batch


def changed_paths(before, after):
    return {
        path_name(path)
        for path, old in jax.tree.leaves_with_path(before)
        if (old != functools.reduce(lambda tree, key: tree[key.key], path, after)).any()
    }


@pytest.mark.parametrize(
    ("name", "num_microbatches", "trainable", "trained"),
    [
        ("adamw", 1, "up", {"blocks/up/kernel"}),
        ("adamw", 4, "down|head", {"blocks/down/kernel", "head/kernel"}),
        ("muon", 4, "up", {"blocks/up/kernel"}),
        ("muon", 1, "^head/", {"head/kernel"}),
        ("muon", 1, "", {"blocks/up/kernel", "blocks/down/kernel", "head/kernel"}),
    ],
)
def test_only_trainable_parameters_change(name, num_microbatches, trainable, trained):
    before, after, _, _ = train_network(name, trainable, num_microbatches)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert changed_paths(before.params, after.params) == trained


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_trainable_parameters_have_optimizer_state(name):
    _, after, _, _ = train_network(name, "down|head")
    moments = [path_name(path) for path, x in jax.tree.leaves_with_path(after.opt_state) if x.ndim >= 2]
    assert any("down" in path for path in moments)
    assert any("head" in path for path in moments)
    assert not any("up" in path for path in moments)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_the_gradient_norm_is_that_of_the_trainable_parameters(num_microbatches):
    before, _, metrics, batch = train_network("adamw", "head", num_microbatches)
    gradient = jax.grad(lambda params: network_error(params, batch, None)[0].mean)(before.params)
    expected = jnp.linalg.norm(gradient["head"]["kernel"])
    np.testing.assert_allclose(metrics["grad_norm"].mean, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_trainable_parameter_is_updated_as_if_there_were_no_others(name):
    before, after, _, batch = train_network(name, "up")
    gradient = jax.grad(lambda params: network_error(params, batch, None)[0].mean)(before.params)
    alone, its_gradient = ({"blocks": {"up": tree["blocks"]["up"]}} for tree in (before.params, gradient))
    optimizer = named_optimizer(name)  # clips the gradient too
    updates, _ = jax.jit(optimizer.update)(its_gradient, optimizer.init(alone), alone)
    expected = optax.apply_updates(alone, updates)["blocks"]["up"]["kernel"]
    np.testing.assert_allclose(after.params["blocks"]["up"]["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_a_skipped_step_changes_neither_trained_nor_frozen_parameters():
    before, after, _, _ = train_network("adamw", "up", poison=np.nan)
    assert changed_paths(before.params, after.params) == set()
    assert int(after.skipped_steps) == 1


def test_merge_params_is_the_inverse_of_split_params():
    params = init_network(jax.random.key(0))
    trained, frozen = split_params(params, "head")
    assert [len(jax.tree.leaves(part)) for part in (trained, frozen)] == [1, 2]
    merged = merge_params(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
