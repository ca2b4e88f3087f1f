"""Arrays over the devices of several processes: which rows a process holds, and ways in and out.

A process can read only the parts of an array that its own devices hold. In a single process that is all of
it, and every function here does what JAX alone would.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding

from jaxllm.parallel.processes import any_process
from jaxllm.parallel.sharding import shardings, whole

Tree = Any  # of arrays, or of their shapes
OWN_WEIGHTS = 0.4  # of a device's memory, at most, for a copy of the weights to sample with
_SMALLEST = 1 << 12  # bytes to gather: fewer would only add programs


def own_rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    """Int [K], ascending: the rows of a batch [batch_size, ...] that this process's devices hold."""
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def place_rows(own: Tree, sharding: Sharding, rows: np.ndarray | None, batch_size: int | None) -> Tree:
    """Global arrays [batch_size, ...] of the values `own` [K, ...] of this process's `rows`; None: of all."""
    if rows is None or batch_size is None or len(rows) == batch_size:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), own)
    size: int = batch_size

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return x[(np.searchsorted(rows, np.arange(size)[index[0]]), *index[1:])]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, own)


def place(tree: Tree, sharding: Sharding) -> Tree:
    """Global arrays of host arrays that every process has whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)  # elsewhere this would compare the arrays of all processes

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)

        def part(index: Any) -> np.ndarray:
            return x[index]

        return jax.make_array_from_callback(x.shape, sharding, part)

    return jax.tree.map(one, tree)


def to_host(tree: Tree) -> Tree:
    """The arrays of a tree, whole, on the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_replicated and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(one, tree)


def share(number: int) -> slice:
    """This process's part of so many things: consecutive ones, whose counts differ by one at most."""
    bounds = np.linspace(0, number, jax.process_count() + 1).round().astype(int)
    return slice(*bounds[jax.process_index() :][:2].tolist())


def gather_bytes(content: bytes) -> list[bytes]:
    """What every process gives, in the order of the processes."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.array([len(content)], np.int32)).ravel()
    room = max(_SMALLEST, 1 << (int(sizes.max()) - 1).bit_length())  # few sizes: each compiles a program
    padded = np.zeros(room, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def gather(arrays: Mapping[str, np.ndarray], facts: Any = None) -> list[tuple[dict[str, np.ndarray], Any]]:
    """Arrays and a JSON value of every process, in the order of the processes: (arrays, facts) of each."""
    if jax.process_count() == 1:
        return [(dict(arrays), facts)]
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(file, allow_pickle=False, **{f"array {name}": x for name, x in arrays.items()}, facts=text)
    found = []
    for content in gather_bytes(file.getvalue()):
        with np.load(io.BytesIO(content), allow_pickle=False) as each:
            own = {name.removeprefix("array "): each[name] for name in each.files if name != "facts"}
            found.append((own, json.loads(each["facts"].tobytes())))
    return found


# The devices of one process


def own_mesh(mesh: Mesh, process: int | None = None) -> Mesh:
    """The mesh of a process's devices (default: this one's): its part of `mesh` where that is a block of it
    with `tensor` whole, else all its devices along `data`."""
    process = jax.process_index() if process is None else process
    is_own = np.vectorize(lambda device: device.process_index == process)(mesh.devices)
    places = np.argwhere(is_own)
    shape = tuple((places.max(0) + 1 - places.min(0)).tolist())
    if np.prod(shape) != len(places) or shape[-1] != mesh.devices.shape[-1]:
        shape = (len(places), *(1,) * (mesh.devices.ndim - 1))
    return Mesh(mesh.devices[is_own].reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)


def own_shardings(params: Tree, mesh: Mesh, replicate: bool) -> Tree:
    """How a process holds parameters on its own devices alone: split over these, or whole on each."""
    return (whole if replicate else shardings)(params, own_mesh(mesh))


def fits_own_devices(params: Tree, mesh: Mesh, replicate: bool) -> bool:
    """Whether every process has room for the parameters on its own devices, beside those that are trained."""
    layout = own_shardings(params, mesh, replicate)
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, params, layout)
    stats = jax.local_devices()[0].memory_stats() or {}
    room = OWN_WEIGHTS * stats.get("bytes_limit", float("inf"))
    return not any_process("weights on own devices", sum(jax.tree.leaves(sizes)) > room)


def own_copy(params: Tree, mesh: Mesh, replicate: bool) -> Tree:
    """Parameters over `mesh` as arrays of this process's own devices, by `own_shardings`."""
    parts = [own_mesh(mesh, process).devices for process in range(jax.process_count())]
    together = Mesh(np.stack(parts), ("process", *mesh.axis_names))
    layout = own_shardings(params, mesh, replicate)
    moved = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(together, s.spec), layout))

    def own(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shard.data for shard in x.addressable_shards]
        )

    return jax.tree.map(own, moved, layout)
