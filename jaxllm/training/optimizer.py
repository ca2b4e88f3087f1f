"""Optimizers and learning-rate schedules by name, all from optax."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxllm.config import check_choice
from jaxllm.errors import ConfigError
from jaxllm.parallel.sharding import constrain, matching, path_name, rule_for
from jaxllm.training.parametrization import scaled

# The embedding and the head act row by row rather than as maps between features: Muon leaves them, and all
# vectors, to AdamW.
MUON_MATRICES = r"(^|/)blocks/.*kernel$"

NAMES = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule, and which parameters they apply to."""

    name: str  # "adamw", or "muon": the matrices of the blocks by Muon, the rest by AdamW
    learning_rate: float  # at the peak; the same for Muon, whose updates are scaled to the size of AdamW's
    schedule: str  # after warm-up: "cosine", "linear", "wsd" (constant, then linear) or "constant"
    warmup_steps: int
    decay_fraction: float  # wsd: fraction of all steps in the final decay
    final_learning_rate: float  # at the last step, as a fraction of the peak
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    decay_pattern: str  # regular expression: parameters with it in their path have weight decay
    clip_norm: float | None  # gradients of a larger global norm are scaled down to it; None: never
    muon_momentum: float
    trainable: str  # regular expression: only parameters with it in their path are trained; "": all
    base_width: int | None  # the learning rate was tuned at this width: see `parametrization`; None: at any
    base_layers: int | None  # and at this depth

    def __post_init__(self):
        check_choice("optimizer.name", self.name, NAMES)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name in ("base_width", "base_layers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"optimizer.{name}={value} must be at least 1, or none")
        for name in ("decay_pattern", "trainable"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)!r}: {error}") from None


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one optimizer trains otherwise than the rest."""

    pattern: str  # regular expression: parameters with it in their path
    rate: float  # their learning rate, as a multiple of that of the rest at every step
    clip_norm: float | None  # their gradients are clipped to this norm of their own; None: with the rest


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far.

    Linear warm-up over `warmup_steps`, then: `cosine` (Loshchilov and Hutter 2017) or `linear` decay to the
    final rate, `wsd` (constant, then linear decay: Hu et al. 2024, arXiv:2404.06395), or `constant`.
    Raises ConfigError where the parts do not fit into `steps`.
    """
    if not 0 <= config.warmup_steps < steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} must be at least 0 and less than "
            f"training.steps={steps}"
        )
    peak, final, left = config.learning_rate, config.final_learning_rate, steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, alpha=final)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * final, left)
    elif config.schedule == "wsd":
        decay = round(config.decay_fraction * steps)
        if not 0 < decay <= left:
            raise ConfigError(
                f"optimizer.decay_fraction={config.decay_fraction} is {decay} of training.steps={steps}; "
                f"between 1 and {left} fit after optimizer.warmup_steps={config.warmup_steps}"
            )
        after = optax.linear_schedule(peak, peak * final, decay, transition_begin=left - decay)
    else:
        after = optax.constant_schedule(peak)
    # The first update is made at 1 / (warmup_steps + 1) of the peak; at 0 it would be wasted.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def split_layers(tree: Any, whole: bool) -> Any:
    """Matrices [layer, in, out] with the layers split over `fsdp` and `tensor` under a mesh, and each matrix
    whole on its device: orthogonalizing a matrix that is itself split communicates in each of 15 products.

    One axis moves at a time, as an all-to-all; with `whole` false only the first has moved, which is the way
    back. Where the number of layers is not divisible, the matrices stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def move(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        _, rows, columns = rule_for(path_name(path))
        sizes = mesh.shape.get(rows, 1), mesh.shape.get(columns, 1)
        if x.shape[0] % math.prod(sizes) or x.shape[2] % sizes[1]:
            return x
        x = constrain(x, P(rows, None, columns))
        return constrain(x, P((rows, columns))) if whole else x

    return jax.tree_util.tree_map_with_path(move, tree)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Orthogonalized momentum for stacked matrices [layer, in, out] (Jordan et al. 2024).

    It is scaled to an RMS of 0.2, so that the learning rate and weight decay of AdamW suit it too (Liu et al.
    2025, arXiv:2502.16982).
    """
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    orthogonalize = optax.contrib.scale_by_muon(
        beta=momentum, weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: dimensions, updates)
    )
    # An orthogonal [m, n] matrix has an RMS of 1 / sqrt(max(m, n)).
    rescale = optax.stateless_with_tree_map(
        lambda update, _: update * 0.2 * max(jnp.shape(update)[-2:]) ** 0.5
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = state._replace(mu=split_layers(state.mu, whole=True))
        updates, state = orthogonalize.update(split_layers(updates, whole=True), state, params)
        return split_layers(updates, whole=False), state._replace(mu=split_layers(state.mu, whole=False))

    return optax.chain(optax.GradientTransformation(orthogonalize.init, update), rescale)


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    group: ParameterGroup | None = None,
    rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """Gradient clipping, update direction, weight decay and learning rate, in this order.

    `rates` multiply the update of the parameters whose path has a match, but not their weight decay. AdamW:
    Loshchilov and Hutter 2019 (arXiv:1711.05101). Muon: see `scale_by_muon`.
    """
    direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "muon":
        direction = optax.partition(
            {True: scale_by_muon(config.muon_momentum), False: direction},
            lambda params: matching(MUON_MATRICES, params),
        )
    if rates:
        direction = optax.chain(direction, optax.stateless(lambda updates, _: scaled(updates, rates)))
    clip, learning_rates = clip_by(config.clip_norm), [optax.scale_by_learning_rate(schedule)]
    if group is not None:
        inside = functools.partial(matching, group.pattern)
        if group.clip_norm is not None:
            clip = optax.partition({True: clip_by(group.clip_norm), False: clip}, inside)
        learning_rates.append(optax.masked(optax.scale(group.rate), inside))
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: matching(config.decay_pattern, params)
    )
    return optax.chain(clip, direction, decay, *learning_rates)


def clip_by(norm: float | None) -> optax.GradientTransformation:
    """Scale gradients of a larger global norm down to it; None: never."""
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)
