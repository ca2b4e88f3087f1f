"""Weights that are not trained: to sample with, in another dtype or sharded otherwise; and frozen models.

Where a run has several processes, each has a copy on its own devices and samples its own prompts, whatever
pace the others have; where that does not fit, all sample together with the weights over all devices.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.models import ModelConfig, Params, unstack_layers
from jaxllm.parallel.global_arrays import fits_own_devices, own_copy, own_mesh, to_host
from jaxllm.parallel.sharding import path_name, shardings, whole


def cast_floats(params: Params, dtype: str) -> Params:
    """Parameters in another dtype, but for the codes of quantized kernels."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


FLOAT32 = re.compile("norm|scalar_head")  # parameters that are computed with as they are


def in_compute_dtype(params: Params, config: ModelConfig) -> Params:
    """Parameters as the model computes with them, each sharded as it was: kernels and tables in
    model.compute_dtype, where that is smaller.

    Cast before a program rather than within it, where XLA may leave out a cast whose result it widens again:
    only so do two copies of the same parameters give the same log-probs to the bit.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        narrower = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > dtype.itemsize
        return x.astype(dtype) if narrower and not FLOAT32.search(path_name(path)) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def unstacked(places: Any, params: Any) -> Any:
    """The shardings of `unstack_layers(params)`, from those of the parameters."""
    number = jax.tree.leaves(params["blocks"])[0].shape[0]
    layer = jax.tree.map(lambda place: NamedSharding(place.mesh, P(*place.spec[1:])), places["blocks"])
    return {**places, "blocks": (layer,) * number}


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
            places = shardings(params, mesh)
            if not self.copied:  # all at once, as decoding reads them: each step would make a copy
                places = unstacked(whole(params, mesh) if replicate else places, params)

            def place(params: Params) -> Params:
                cast = params if dtype is None else cast_floats(params, dtype)
                return cast if self.copied else unstack_layers(cast)

            self.place = jax.jit(place, out_shardings=places)

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
