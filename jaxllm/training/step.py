"""One optimizer step, the same for every stage."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.losses import Weighted
from jaxllm.training.state import Params, TrainState, merge_params, split_params

Batch = Any  # a tree of arrays [B, ...]: one of jaxllm.batches, each loss function with its own
LossAndMetrics = tuple[Weighted, dict[str, Weighted]]
GradientSums = tuple[Params, Weighted, dict[str, Weighted]]  # not divided by their weights
LossFn = Callable[[Params, Batch, jax.Array], LossAndMetrics]  # (params, batch, key)


def split_rows(batch: Batch, num_microbatches: int) -> Batch:
    """[B, ...] to [num_microbatches, B / num_microbatches, ...], every device keeping its own rows.

    Micro-batch i takes rows i, i + n, i + 2n, ...: contiguous micro-batches would move most rows to another
    device.
    """
    return jax.tree.map(lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def gradient_sums(
    loss_fn: LossFn, trained: Params, frozen: Params, batch: Batch, key: jax.Array, num_microbatches: int
) -> GradientSums:
    """Gradient of the summed loss with respect to `trained`, the loss and the metrics, over all rows.

    They are sums: nothing is divided by its weight yet.
    """

    def one(microbatch: Batch, key: jax.Array) -> GradientSums:
        def loss_sum(trained: Params) -> tuple[jax.Array, LossAndMetrics]:
            loss, metrics = loss_fn(merge_params(trained, frozen), microbatch, key)
            return loss.sum, (loss, metrics)

        grads, (loss, metrics) = jax.grad(loss_sum, has_aux=True)(trained)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss, metrics

    if num_microbatches == 1:
        return one(batch, key)
    rows = split_rows(batch, num_microbatches)
    keys = jax.random.split(key, num_microbatches)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(one, *jax.tree.map(lambda x: x[0], (rows, keys))),
    )
    sums, _ = jax.lax.scan(
        lambda total, x: (jax.tree.map(jnp.add, total, one(*x)), None), zeros, (rows, keys)
    )
    return sums


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    trainable: str = "",
) -> tuple[TrainState, dict[str, Weighted]]:
    """The next state, and metrics as `Weighted` sums.

    Sums and weights are added over micro-batches and divided once, so the gradient does not depend on
    how rows are grouped. A step is skipped where its loss or gradient is not finite, and where its gradient
    is 0, as that of a batch of weight 0 is: an optimizer with momentum would move the parameters all the
    same. It changes only `step`, `skipped_steps` and `bad_streak`; the optimizer's count, and with it the
    learning-rate schedule, stays. Jit with the state donated and the state's shardings as out_shardings.

    Args:
      batch: a tree of arrays [B, ...]; num_microbatches divides B.
      loss_fn: (params, microbatch, key) -> (Weighted, metrics), with a new key for every micro-batch.
      trainable: as in `split_params`; the other parameters have no gradient, no optimizer state, and do not
        change.
    """
    key = jax.random.fold_in(state.key, state.step)
    trained, frozen = split_params(state.params, trainable)
    sums = gradient_sums(loss_fn, trained, frozen, batch, key, num_microbatches)
    return apply_gradient(state, sums, optimizer=optimizer, trainable=trainable)


def add_gradient(
    sums: GradientSums,
    state: TrainState,
    microbatch: Batch,
    index: jax.Array,
    *,
    loss_fn: LossFn,
    trainable: str,
) -> GradientSums:
    """`gradient_sums` of a step whose micro-batches have several shapes, one after the other: with those of
    micro-batch `index`."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)
    own = gradient_sums(loss_fn, *split_params(state.params, trainable), microbatch, key, 1)
    return jax.tree.map(jnp.add, sums, own)


def apply_gradient(
    state: TrainState, sums: GradientSums, *, optimizer: optax.GradientTransformation, trainable: str
) -> tuple[TrainState, dict[str, Weighted]]:
    """The end of `train_step`: the next state from the sums over all micro-batches."""
    grads, loss, metrics = sums
    trained, frozen = split_params(state.params, trainable)
    grads = jax.tree.map(lambda g: g / jnp.maximum(loss.weight, 1e-9), grads)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    updated = optax.apply_updates(trained, updates)

    finite = jnp.isfinite(loss.sum) & jnp.isfinite(grad_norm)
    applied = finite & (grad_norm > 0)
    updated, opt_state = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old), (updated, opt_state), (trained, state.opt_state)
    )
    state = TrainState(
        step=state.step + 1,
        params=merge_params(updated, frozen),
        opt_state=opt_state,
        key=state.key,
        skipped_steps=state.skipped_steps + ~applied,
        bad_streak=jnp.where(finite, 0, state.bad_streak + 1),
    )
    counters = {"grad_norm": grad_norm, "skipped_steps": state.skipped_steps, "bad_streak": state.bad_streak}
    return state, metrics | {name: Weighted(jnp.float32(x), jnp.float32(1)) for name, x in counters.items()}
