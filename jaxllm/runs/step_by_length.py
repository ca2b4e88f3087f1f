"""The train step of rows with padding, which computes short rows at a smaller width.

The rows of a batch are sorted by length and split into training.num_microbatches, each of which is cut to the
first of a few widths that holds it. Sums and weights are added over micro-batches and divided once, as in
`train_step`, so that the gradient is that of the whole batch, to rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.length_groups import by_length, cut
from jaxllm.losses import Weighted
from jaxllm.parallel.global_arrays import place
from jaxllm.parallel.sharding import shardings
from jaxllm.runs.program import Program
from jaxllm.training.state import TrainState, split_params
from jaxllm.training.step import Batch, add_gradient, apply_gradient, gradient_sums

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Weighted]]]


def compile_step(program: Program[Any, Any]) -> Step:
    """The step for what `split_batch` makes of a batch. For rows with padding, the widest program is compiled
    at once, since it takes the most memory, and a narrower one when it is first used."""
    if not has_padding(program):
        return program.compile()
    return StepByLength(program) if program.config.training.num_microbatches > 1 else WholeStep(program)


def has_padding(program: Program[Any, Any]) -> bool:
    """Whether rows end with padding, rather than being packed."""
    return hasattr(type(program.batch_shapes), "row_lengths")


def split_batch(program: Program[Any, Any], batch: Batch) -> list[Batch]:
    """Micro-batches of a host batch [B, ...] that every process has whole, by length, on the devices."""
    widths, groups = program.widths, []
    for rows, width in by_length(batch.row_lengths, program.microbatch_rows, program.widths):
        own = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        groups.append(place(cut(own, widths[-1], width), program.batch_sharding))
    return groups


class WholeStep:
    """The step of a batch that is one micro-batch."""

    def __init__(self, program: Program[Any, Any]):
        self.step = functools.cache(program.compile)
        self.step(program.widths[-1])

    def __call__(self, state: TrainState, batches: list[Batch]) -> tuple[TrainState, dict[str, Weighted]]:
        [batch] = batches
        return self.step(batch.tokens.shape[-1])(state, batch)


class StepByLength:
    """The step of micro-batches of several widths: a program for each adds to the sums of the gradient."""

    def __init__(self, program: Program[Any, Any]):
        self.program = program
        options = program.train_step.keywords
        loss_fn, trainable = options["loss_fn"], options["trainable"]
        apply = functools.partial(apply_gradient, optimizer=options["optimizer"], trainable=trainable)
        sums = jax.eval_shape(
            functools.partial(gradient_sums, loss_fn, num_microbatches=1),
            *split_params(program.placed_state.params, trainable),
            program.placed_shapes(program.microbatch_rows, program.widths[-1]),
            program.placed_state.key,
        )
        whole = NamedSharding(program.mesh, P())
        places = (shardings(sums[0], program.mesh), *jax.tree.map(lambda _: whole, sums[1:]))
        self.sums = jax.tree.map(lambda x, to: x.update(sharding=to), sums, places)
        zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, sums), out_shardings=places)
        apply = jax.jit(apply, donate_argnums=0, out_shardings=(program.shardings, None))
        add = functools.partial(add_gradient, loss_fn=loss_fn, trainable=trainable)
        self.add_gradient = jax.jit(add, donate_argnums=0, out_shardings=places)
        with jax.set_mesh(program.mesh):
            self.zeros = zeros.lower().compile()
            self.apply = apply.lower(program.placed_state, self.sums).compile()
        self.add = functools.cache(self.compile_add)
        self.add(program.widths[-1])

    def compile_add(self, width: int) -> jax.stages.Compiled:
        """The program that adds a micro-batch of this width."""
        program, index = self.program, jax.ShapeDtypeStruct((), np.int32)
        batch = program.placed_shapes(program.microbatch_rows, width)
        with jax.set_mesh(program.mesh):
            return self.add_gradient.lower(self.sums, program.placed_state, batch, index).compile()

    def __call__(self, state: TrainState, batches: list[Batch]) -> tuple[TrainState, dict[str, Weighted]]:
        sums = self.zeros()
        for i, batch in enumerate(batches):
            sums = self.add(batch.tokens.shape[-1])(sums, state, batch, np.int32(i))
        return self.apply(state, sums)
