"""Matrix-product FLOPs of a traced program, recomputation included.

A compiler's own count has the body of a loop once, and none is at hand for hardware that is not there.
"""

import math
from typing import Any

from jax.extend import core


def traced_flops(jaxpr: core.Jaxpr, devices: int = 1) -> float:
    """Of all devices together: 2 per multiply-add of every dot_general. A `while` loop counts once, of a
    `cond` the larger branch, and kernels (Pallas, cuDNN) not at all."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            terms = math.prod(left.shape[axis] for axis in contracted)
            total += 2.0 * terms * math.prod(result.shape)
        elif name == "pallas_call":
            continue
        elif name == "cond":
            total += max(traced_flops(branch.jaxpr, devices) for branch in params["branches"])
        else:
            inner = sum(traced_flops(each, devices) for each in subprograms(params))
            if name == "scan":
                inner *= params["length"]
            elif name == "shard_map":  # its body is what one device does
                inner *= devices
            total += inner
    return total


def subprograms(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs among the parameters of an operation."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if isinstance(each, core.Jaxpr):
                found.append(each)
    return found
