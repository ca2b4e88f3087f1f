"""One learning rate for models of all sizes: how initial weights and rates follow width and depth.

muP (Yang et al. 2022, arXiv:2203.03466) with CompleteP's rule for depth (Dey et al. 2025, arXiv:2505.01618):
at every size, an update changes the activations as much as at the size where the rate was tuned. Their
multipliers in the forward pass are folded into initial weights and rates, which the optimizers' indifference
to the scale of a gradient allows. The architecture stays, so that checkpoints and exports are those of any
model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxllm.parallel.sharding import matching

OUTPUTS = r"(^|/)blocks/(attention/output|mlp/down)/kernel$"  # what a block adds to the residual stream
INPUTS = r"(^|/)blocks/(?!attention/output|mlp/down).*/kernel$"
READOUT = r"(^|/)final_norm/"  # of the hidden states that the head reads


class Factors(NamedTuple):
    """Regular expressions, and what parameters with a match in their path are multiplied by."""

    init: dict[str, float]  # their initial values
    rate: dict[str, float]  # their learning rate, but not their weight decay


def size_factors(optimizer: str, width: float, depth: float) -> Factors:
    """For a model of `width` and `depth` times the sizes where the learning rate was tuned.

    The rate of a kernel is divided by the width for AdamW, by its root for Muon, whose updates have one RMS
    at every width and are to have one spectral norm (Yang et al. 2023, arXiv:2310.17813). What a block adds
    to the residual stream is divided by the depth, in its rate and in its initial weights, which are already
    divided by the root. The logits are divided by the width, in the final norm.
    """
    kernel = 1 / width if optimizer == "adamw" else width**-0.5
    return Factors(
        init={OUTPUTS: depth**-0.5, READOUT: 1 / width},
        rate={INPUTS: kernel, OUTPUTS: kernel / depth, READOUT: 1 / width},
    )


def scaled(tree: Any, factors: Mapping[str, float]) -> Any:
    """Parameters, or updates of them, multiplied by the factors of the patterns in their paths."""
    for pattern, factor in factors.items():
        found = matching(pattern, tree)
        tree = jax.tree.map(lambda x, inside, by=factor: x * by if inside else x, tree, found)
    return tree
