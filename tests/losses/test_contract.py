"""What holds for every loss: formula, gradient, masks, merging, devices, dtypes."""

import operator
from functools import cache, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from loss_cases import CASES, ROW_FUNCTIONS, Arrays, B, Case, row_arrays

from jaxllm.losses import Weighted

every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def split(case: Case, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The arrays that the loss is differentiated by, and the others."""
    inside = {k: arrays[k] for k in case.differentiated}
    return inside, {k: v for k, v in arrays.items() if k not in inside}


@cache
def compiled(case: Case):
    """arrays -> (loss, metrics, gradients of loss.mean), jitted once for all tests of a case."""

    def mean(inside, rest):
        loss, metrics = case.loss(inside | rest)
        return loss.mean, (loss, metrics)

    run = jax.jit(jax.value_and_grad(mean, has_aux=True))

    def call(arrays):
        (_, (loss, metrics)), gradients = run(*split(case, arrays))
        return loss, metrics, gradients

    return call


def finite_differences(case: Case, arrays: Arrays) -> Arrays:
    """The gradient of the restatement's mean, by central differences in float64."""
    arrays = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()}
    step = 1e-5

    def mean(name, index, change):
        moved = arrays[name].copy()
        moved[index] += change
        total, weight, _ = case.restated(arrays | {name: moved}, arrays)
        return total / weight

    def gradient(name):
        slopes = np.zeros(arrays[name].shape)
        for index in np.ndindex(*slopes.shape):
            slopes[index] = (mean(name, index, step) - mean(name, index, -step)) / (2 * step)
        return slopes

    return {name: gradient(name) for name in case.differentiated}


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def assert_merged_equal(actual: Weighted, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@every_loss
def test_values_and_metrics_equal_the_restatement(case):
    arrays = case.make()
    loss, metrics, _ = compiled(case)(arrays)
    total, weight, expected = case.restated(arrays, arrays)
    assert_merged_equal(loss, (total, weight))
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert_merged_equal(metrics[name], value)


@every_loss
def test_gradients_equal_finite_differences_of_the_restatement(case):
    arrays = case.make()
    _, _, gradients = compiled(case)(arrays)
    for name, expected in finite_differences(case, arrays).items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-4, atol=2e-6, err_msg=name)


@every_loss
def test_eager_equals_jit(case):
    arrays = {k: jnp.asarray(v) for k, v in case.make().items()}
    loss, metrics, _ = compiled(case)(arrays)
    eager_loss, eager_metrics = case.loss(arrays)
    jax.tree.map(assert_merged_equal, (eager_loss, eager_metrics), (loss, metrics), is_leaf=is_weighted)


def is_weighted(x) -> bool:
    return isinstance(x, Weighted)


def hide(case: Case, arrays: Arrays, garbage: float) -> Arrays:
    """Garbage wherever the mask is 0, in every array but the mask and the shared ones."""
    counted = arrays["mask"] != 0

    def spoil(name, x):
        if name == "mask" or name in case.shared:
            return x
        rows = counted if x.ndim >= counted.ndim else counted.any(axis=1)
        if x.dtype.kind == "i":
            garbage_id = -100 if garbage < 0 else 10**6
            return np.where(rows, x, garbage_id)
        return np.where(rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim)), x, np.float32(garbage))

    return {name: spoil(name, x) for name, x in arrays.items()}


@every_loss
def test_garbage_under_the_mask_changes_nothing(case):
    run, arrays = compiled(case), case.make()
    expected = jax.tree.leaves(run(arrays))
    for garbage in (np.nan, np.inf, -np.inf, 1e30, -1e30):
        for clean, spoiled in zip(expected, jax.tree.leaves(run(hide(case, arrays, garbage))), strict=True):
            np.testing.assert_array_equal(spoiled, clean, err_msg=f"{garbage}")


@every_loss
def test_all_masked_is_a_finite_zero(case):
    arrays = case.make()
    arrays = hide(case, arrays | {"mask": np.zeros_like(arrays["mask"])}, np.nan)
    loss, metrics, gradients = compiled(case)(arrays)
    assert loss.mean == 0
    assert all(metric.mean == 0 for metric in metrics.values())
    assert all((gradient == 0).all() for gradient in gradients.values())


def sum_of_parts(case: Case, arrays, parts: int):
    """Loss, metrics and gradient of the SUM, computed on parts of consecutive rows and added up."""

    def total(inside, rest):
        loss, metrics = case.loss(inside | rest)
        return loss.sum, (loss, metrics)

    def batched(tree, leading):
        return {k: leading if k not in case.shared else None for k in tree}

    cut = {k: v if k in case.shared else v.reshape(parts, -1, *v.shape[1:]) for k, v in arrays.items()}
    inside, rest = split(case, cut)
    in_axes = batched(inside, 0), batched(rest, 0)
    (_, weighted), gradients = jax.vmap(jax.value_and_grad(total, has_aux=True), in_axes)(inside, rest)
    weighted = jax.tree.map(lambda x: x.sum(0), weighted)
    whole = {k: v.sum(0) if k in case.shared else v.reshape(arrays[k].shape) for k, v in gradients.items()}
    return weighted, whole


@every_loss
def test_ragged_micro_batches_merge_exactly(case):
    """1 x 8, 2 x 4 and 8 x 1 rows: equal sums, weights, metrics and gradients, through vmap."""
    arrays = case.make()
    results = jax.jit(lambda arrays: [sum_of_parts(case, arrays, n) for n in (1, 2, 8)])(arrays)
    for parts in results[1:]:
        jax.tree.map(close, parts, results[0])


@every_loss
def test_devices_merge_exactly(case):
    """Under shard_map with its checks on: one row per device, sums and weights by psum, one division."""
    arrays = case.make()
    mesh = Mesh(np.array(jax.devices()[:B]), "data")
    inside, rest = split(case, arrays)

    def local(inside, rest):
        return jax.lax.psum(case.loss(inside | rest), "data")

    specs = [{k: PartitionSpec(None if k in case.shared else "data") for k in d} for d in (inside, rest)]
    sharded = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=PartitionSpec())

    def mean(inside, rest):
        loss, metrics = sharded(inside, rest)
        return loss.mean, (loss, metrics)

    (_, weighted), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(inside, rest)
    *expected, expected_gradients = compiled(case)(arrays)
    jax.tree.map(close, weighted, tuple(expected))
    jax.tree.map(close, gradients, expected_gradients)


@every_loss
def test_bfloat16_inputs_are_computed_in_float32(case):
    arrays = {k: jnp.asarray(v) for k, v in case.make().items()}
    narrow = {k: v.astype(jnp.bfloat16) if v.dtype == jnp.float32 else v for k, v in arrays.items()}
    wide = {k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v for k, v in narrow.items()}
    result, expected = case.loss(narrow), case.loss(wide)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result))
    jax.tree.map(assert_merged_equal, result, expected, is_leaf=is_weighted)


@every_loss
def test_metrics_carry_no_gradient(case):
    arrays = case.make()
    inside, rest = split(case, arrays)

    def metric_sum(inside):
        return reduce(operator.add, (metric.sum for metric in case.loss(inside | rest)[1].values()))

    gradients = jax.grad(metric_sum)(inside)
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("function", ROW_FUNCTIONS.values(), ids=ROW_FUNCTIONS)
def test_functions_of_rows_give_the_same_however_they_are_run(function):
    """Eager, jitted, one row at a time by vmap, one row per device by shard_map: values, types, gradients."""
    arrays = row_arrays()
    spec = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()[:B]), "data")
    one_row = {k: v[:, None] for k, v in arrays.items()}
    expected = function(arrays)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(expected))
    mapped = jax.jit(jax.vmap(function))(one_row)
    jax.tree.map(lambda a, b: close(a.reshape(b.shape), b), mapped, expected)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.tree.map(close, jax.jit(sharded)(arrays), expected)

    floats = {k: v for k, v in arrays.items() if v.dtype == jnp.float32}
    total = lambda run, x: sum(jnp.sin(y).sum() for y in jax.tree.leaves(run(arrays | x)))  # noqa: E731
    gradient, local = (
        jax.jit(jax.grad(lambda x, run=run: total(run, x)))(floats) for run in (function, sharded)
    )
    jax.tree.map(close, local, gradient)
