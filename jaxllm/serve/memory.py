"""How much memory serving takes, planned before any checkpoint is loaded.

The engine's cache grows with the longest request that it holds, for all rows at once, so the plan is made for
rows that are all as long as --max_length allows.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig, build_model
from jaxllm.parallel.sharding import shardings
from jaxllm.rollout.engine import GROWTH, MIN_SLOTS

# A head and a pair of positions, of `prefill`: 3.7 to 4.7 by XLA's memory_analysis on a CPU.
SCORE_BYTES = 5
SHARE = 0.9  # of the memory; the rest is for what is not planned: programs, the page, fragments
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Sizes(NamedTuple):
    """What a plan needs to know about a checkpoint on one of its devices."""

    config: ModelConfig
    param_bytes: int
    tensor: int = 1  # devices among which the heads of the cache are split


def sizes_on(mesh: Callable[[ModelConfig], Mesh], config: ModelConfig) -> Sizes:
    """The sizes of a model on each device of its mesh."""
    chosen = mesh(config)
    params = jax.eval_shape(build_model(config).init, jax.random.key(0))
    own = jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize,
        params,
        shardings(params, chosen),
    )
    return Sizes(config, sum(jax.tree.leaves(own)), chosen.shape["tensor"])


class Plan(NamedTuple):
    """The memory of one device for all models that are served together, in bytes."""

    max_length: int  # tokens of a prompt and its completion
    params: int
    cache: int
    working: int  # the largest temporary arrays
    available: int

    @property
    def total(self) -> int:
        return self.params + self.cache + self.working

    def __str__(self) -> str:
        parts = (f"{getattr(self, name) / 1e9:.2f} GB {name}" for name in ("params", "cache", "working"))
        return f"{', '.join(parts)}; {self.available / 1e9:.1f} GB available"


def available_memory() -> int:
    """Bytes of one device; on a CPU its share of those of the machine or of its control group."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if CGROUP_LIMIT.exists() and (text := CGROUP_LIMIT.read_text().strip()).isdecimal():
            limit = min(limit, int(text))
        limit //= jax.local_device_count()
    return int(SHARE * limit)


def cache_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Keys and values of all rows and of one prompt that is prefilled, while the cache grows to `length`."""
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    rows_while_growing = rows * (1 + 1 / GROWTH)  # the smaller cache is freed once it is copied
    return int((rows_while_growing + 1) * length * slot * jnp.dtype(config.compute_dtype).itemsize)


def working_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """The temporary arrays of a prompt's prefill, attention scores and MLP, or of the rows' logits."""
    scores = SCORE_BYTES * config.num_heads * length**2 if config.attention == "xla" else 0
    mlp, logits = length * config.mlp_width, rows * config.vocab_size
    return max(scores + 3 * 4 * mlp, 3 * 4 * logits)


def plan(models: Mapping[str, Sizes], rows: int, max_length: int, available: int) -> Plan:
    """What serving these models takes, each with `rows` rows of up to `max_length` tokens."""
    lengths = {name: min(max_length, sizes.config.max_length) for name, sizes in models.items()}
    each = [(sizes.config, rows, lengths[name]) for name, sizes in models.items()]
    params = [sizes.param_bytes for sizes in models.values()]
    caches = [cache_bytes(*one) // sizes.tensor for one, sizes in zip(each, models.values(), strict=True)]
    return Plan(
        max(lengths.values()),
        sum(params),
        sum(caches),
        # While a checkpoint is loaded, its layers are copied apart; no request is there yet.
        max(max(working_bytes(*one) for one in each), max(params) - sum(caches)),
        available,
    )


def fitting_plan(models: Mapping[str, Sizes], rows: int, max_length: int | None, available: int) -> Plan:
    """The plan for --max_length; where that is None, for the models' longest, halved until it fits.

    Raises ConfigError where it is above every model's length, or does not fit `available` bytes.
    """
    longest = max(sizes.config.max_length for sizes in models.values())
    if max_length is not None and not 1 <= max_length <= longest:
        raise ConfigError(f"--max_length={max_length} must be from 1 to {longest} (model.max_length)")
    length = longest
    while (fitting := plan(models, rows, length, available)).total > available:
        length //= 2
        if length < MIN_SLOTS:
            raise ConfigError(
                f"--checkpoint and --rows={rows} do not fit the memory ({fitting}); serve fewer of them"
            )
    if max_length is None:
        return fitting
    wanted = plan(models, rows, max_length, available)
    if wanted.total > available:
        raise ConfigError(
            f"--max_length={max_length} with --rows={rows} does not fit the memory ({wanted}); "
            f"--max_length={length} does, or use fewer --rows"
        )
    return wanted
