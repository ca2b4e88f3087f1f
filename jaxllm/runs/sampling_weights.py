"""Weights to sample with: a run's parameters, perhaps in another dtype, perhaps sharded otherwise.

Where a run has several processes, each has a copy on its own devices and samples its own prompts, whatever
pace the others have; where that does not fit, all sample together with the weights over all devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.models import Params
from jaxllm.parallel.global_arrays import fits_own_devices, own_copy, own_mesh, to_host
from jaxllm.parallel.sharding import whole


def cast_floats(params: Params, dtype: str) -> Params:
    """Parameters in another dtype, but for the codes of quantized kernels."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


class SamplingWeights:
    """Makes the weights to sample with from the parameters that are trained."""

    def __init__(self, params: Any, mesh: Mesh, *, dtype: str | None, replicate: bool):
        """For parameters of these shapes over `mesh`.

        Args:
          dtype: of the weights; None: the parameters'.
          replicate: whole on every device, but for the tensor axis; else sharded as the parameters.
        """
        self.mesh, self.replicate, self.place = mesh, replicate, None
        several = jax.process_count() > 1
        self.alone = not several or fits_own_devices(params, mesh, replicate)  # each samples its own prompts
        self.copied = several and self.alone
        if not self.alone:
            print("note: the weights do not fit the devices of one process: all sample together", flush=True)
        if dtype is not None or (replicate and not self.copied):
            self.place = jax.jit(
                lambda params: params if dtype is None else cast_floats(params, dtype),
                out_shardings=whole(params, mesh) if replicate and not self.copied else None,
            )

    @contextmanager
    def of(self, params: Params, keys: jax.Array, rows: slice) -> Iterator[tuple[Params, jax.Array]]:
        """The weights, and of keys [N] those of the `rows` that this process samples; a context in which the
        mesh of these is the current one. In a single process these rows are all."""
        if self.place is not None:
            params = self.place(params)
        if not self.copied:
            yield params, keys
            return
        data = to_host(jax.random.key_data(keys))[rows]
        params = own_copy(params, self.mesh, self.replicate)
        with jax.set_mesh(own_mesh(self.mesh)):
            yield params, jax.random.wrap_key_data(jnp.asarray(data))
