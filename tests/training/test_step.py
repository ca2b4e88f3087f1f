"""The train step, on a loss small enough to work out by hand: (w x - y)^2 over counted entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.losses import Weighted
from jaxllm.training.state import init_state
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


def test_a_step_follows_the_gradient_of_the_mean_over_counted_entries():
    batch, optimizer = make_batch(), optax.sgd(0.1)
    state, metrics = run(make_state(optimizer), batch, optimizer)
    x, y, mask = batch["x"], batch["y"], batch["mask"]
    gradient = (2 * x * (2 * x - y))[mask].mean()
    np.testing.assert_allclose(state.params["w"], 2 - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].mean, ((2 * x - y) ** 2)[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"].mean, abs(gradient), rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_ragged_microbatches_give_the_gradient_of_the_whole(num_microbatches):
    batch, optimizer = make_batch(), optax.sgd(0.1)
    batch["mask"][:5] = False  # some micro-batches count nothing at all
    whole, whole_metrics = run(make_state(optimizer), batch, optimizer)
    parts, parts_metrics = run(make_state(optimizer), batch, optimizer, num_microbatches)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(parts_metrics["loss"].mean, whole_metrics["loss"].mean, rtol=1e-6)
    assert float(parts_metrics["loss"].weight) == batch["mask"].sum()


def test_microbatches_share_out_the_rows_of_every_device():
    pieces = split_rows({"x": np.arange(8)}, 2)["x"]
    np.testing.assert_array_equal(pieces, [[0, 2, 4, 6], [1, 3, 5, 7]])  # 4 devices hold 2 rows each


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters(poison):
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
    healed, _ = run(after, good, optimizer)
    assert (int(healed.step), int(healed.skipped_steps), int(healed.bad_streak)) == (3, 1, 0)
    assert float(healed.params["w"]) != float(after.params["w"])


def test_a_batch_that_counts_nothing_is_a_finite_zero():
    batch, optimizer = make_batch(), optax.sgd(0.1)
    batch["mask"][:] = False
    batch["x"][:] = np.nan
    state, metrics = run(make_state(optimizer), batch, optimizer)
    assert float(state.params["w"]) == 2.0
    assert float(metrics["loss"].mean) == 0.0
    assert int(state.skipped_steps) == 0


def test_randomness_is_a_function_of_the_run_s_key_and_the_step():
    batch, optimizer = make_batch(), optax.sgd(0.0)
    first, noise_0 = run(make_state(optimizer), batch, optimizer)
    _, noise_1 = run(first, batch, optimizer)
    _, again = run(make_state(optimizer), batch, optimizer)
    assert float(noise_0["noise"].sum) != float(noise_1["noise"].sum)
    assert float(noise_0["noise"].sum) == float(again["noise"].sum)
    _, parts = run(make_state(optimizer), batch, optimizer, 2)
    assert float(parts["noise"].weight) == 2


def test_the_state_given_away_is_gone():
    batch, optimizer = make_batch(), optax.adam(0.1)
    step = functools.partial(train_step, loss_fn=squared_error, optimizer=optimizer, num_microbatches=1)
    state = make_state(optimizer)
    jax.jit(step, donate_argnums=0)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
