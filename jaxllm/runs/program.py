"""What a training run puts on the devices: model, sharded state and compiled step, from the config alone."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxllm.config import nearest_multiples
from jaxllm.errors import ConfigError
from jaxllm.length_groups import cut, widths
from jaxllm.models import Params
from jaxllm.models.config import ATTENTION, flops_per_token, runs_on
from jaxllm.models.quantize import is_quantized
from jaxllm.parallel.global_arrays import own_rows
from jaxllm.parallel.sharding import (
    Device,
    batch_sharding,
    make_mesh,
    order_of_devices,
    placed,
    shardings,
    width_multiple,
)
from jaxllm.runs.config import TrainConfig, factors_of
from jaxllm.runs.process import give_back_freed_memory
from jaxllm.training.metrics import parameter_count
from jaxllm.training.optimizer import make_optimizer, make_schedule
from jaxllm.training.parametrization import scaled
from jaxllm.training.state import TrainState, init_state, is_none, merge_params, split_params
from jaxllm.training.step import LossFn, train_step


class TrainableModel(Protocol):
    """What every model that is trained has; a stage knows more of its own."""

    @property
    def init(self) -> Callable[[jax.Array], Params]: ...


class BatchShapes(Protocol):
    """A batch's fields as `jax.ShapeDtypeStruct`s. All batches have tokens."""

    @property
    def tokens(self) -> jax.ShapeDtypeStruct: ...


ConfigT = TypeVar("ConfigT", bound=TrainConfig)
ModelT = TypeVar("ModelT", bound=TrainableModel)


class Trainable(Protocol):
    """The part of a stage that a `Program` is made of."""

    @property
    def Config(self) -> type[TrainConfig]: ...

    def build(self, config: Any) -> tuple[TrainableModel, LossFn]:
        """The model and the loss of a run."""
        ...

    def batch_shapes(self, config: Any) -> BatchShapes:
        """Shape and dtype of every field of a batch, as `jax.ShapeDtypeStruct`s."""
        ...


class Program(Generic[ConfigT, ModelT]):
    """What runs on the devices: the model, the sharded state and the train step, from the config alone.

    Building it compiles nothing and reads no data, and raises ConfigError for whatever does not fit.
    """

    config: ConfigT
    model: ModelT

    def __init__(self, stage: Trainable, config: ConfigT, devices: Sequence[Device] | None = None):
        self.config = config
        if not isinstance(config, stage.Config):
            raise ConfigError(f"stage={config.stage!r} is not that of the config file: choose another file")
        self.mesh = make_mesh(config.mesh, devices)
        platform = self.mesh.devices.flat[0].platform
        if not runs_on(config.model, platform):
            attention = config.model.attention
            raise ConfigError(
                f"model.attention={attention} needs a {ATTENTION[attention]}, this is a {platform}: "
                "set model.attention=xla"
            )
        check_sizes(config, self.mesh)
        model, loss_fn = stage.build(config)
        self.model = cast(ModelT, model)
        self.batch_shapes = stage.batch_shapes(config)
        self.schedule = make_schedule(config.optimizer, config.training.steps)
        factors = factors_of(config.optimizer, config.model)
        optimizer = make_optimizer(config.optimizer, self.schedule, config.parameter_group, factors.rate)
        self.trainable = trainable = config.trainable
        self.init = functools.partial(
            init_state,
            init=lambda key: scaled(model.init(key), factors.init),
            optimizer=optimizer,
            trainable=trainable,
        )
        self.abstract_state = jax.eval_shape(self.init, jax.random.key(config.seed))
        self.shardings = shardings(self.abstract_state, self.mesh)
        self.batch_sharding = batch_sharding(self.mesh)
        self.own_rows = own_rows(self.batch_sharding, config.data.batch_size)  # of a batch, of this process
        self.trained_bytes, self.num_trained = trained_size(self.abstract_state.params, trainable)
        self.train_step = functools.partial(
            train_step,
            loss_fn=loss_fn,
            optimizer=optimizer,
            num_microbatches=config.training.num_microbatches,
            trainable=trainable,
        )

    @property
    def placed_state(self) -> TrainState:
        """The state's shapes with their shardings: what a checkpoint is restored into."""
        return placed(self.abstract_state, self.mesh)

    def fresh_state(self, params: Any = None) -> TrainState:
        """The state at step 0, every array made where it belongs: with these weights, which it takes over
        (they are donated), or random ones."""
        key = jax.random.key(self.config.seed)
        if params is None:
            return jax.jit(self.init, out_shardings=self.shardings)(key)

        def with_params(key, params):  # to make random ones as well would take seconds to compile
            return self.init(key, init=lambda _: params)

        return jax.jit(with_params, out_shardings=self.shardings, donate_argnums=1)(key, params)

    def fresh_params(self) -> Params:
        """The parameters of `fresh_state` alone: no optimizer state is made."""
        fresh = jax.jit(lambda key: self.init(key).params, out_shardings=self.shardings.params)
        return fresh(jax.random.key(self.config.seed))

    def complete(self, params: Params) -> Params:
        """The same parameters, with those of `fresh_state` in place of None; no others are made."""

        def missing(tree: Params) -> Params:
            return jax.tree.map(lambda x, new: new if x is None else None, params, tree, is_leaf=is_none)

        def fresh(key: jax.Array) -> Params:
            return missing(self.init(key).params)

        key = jax.random.key(self.config.seed)
        made = jax.jit(fresh, out_shardings=missing(self.shardings.params))(key)
        return merge_params(params, made)

    def saved(self, state: TrainState) -> TrainState:
        """What a checkpoint holds of a state, of arrays or shapes: with adapters, only what trains."""
        if self.config.model.lora.rank is None:
            return state
        return state._replace(params=split_params(state.params, self.trainable)[0])

    def compile(self, width: int | None = None) -> jax.stages.Compiled:
        """The train step for batches of just one width, by default that of the config, which can therefore
        never compile again."""
        step = self.trace(width).lower().compile()
        give_back_freed_memory()  # of the compiler: 0.3 GB
        return step

    def trace(self, width: int | None = None) -> jax.stages.Traced:
        """The train step for just these shapes, to be compiled for the devices of the mesh."""
        batch = self.placed_shapes(self.config.data.batch_size, width or self.widths[-1])
        step = jax.jit(self.train_step, donate_argnums=0, out_shardings=(self.shardings, None))
        with jax.set_mesh(self.mesh):
            return step.trace(self.placed_state, batch)

    def placed_shapes(self, rows: int, width: int) -> Any:
        """The shapes of a batch of so many rows, cut to a width, with their sharding."""

        def first(batch: Any) -> Any:
            return jax.tree.map(lambda x: x[:rows], cut(batch, self.widths[-1], width))

        shapes = jax.eval_shape(first, self.batch_shapes)
        return jax.tree.map(lambda x: x.update(sharding=self.batch_sharding), shapes)

    @property
    def widths(self) -> tuple[int, ...]:
        """To which rows with padding may be cut."""
        return widths(self.config.data.sequence_length, width_multiple(self.mesh))

    @property
    def tokens_per_step(self) -> int:
        """Positions of all sequences of a batch."""
        return math.prod(self.batch_shapes.tokens.shape)

    @property
    def microbatch_rows(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.config.data.batch_size // self.config.training.num_microbatches

    @property
    def models(self) -> list[Any]:
        """The parameters of each model that is trained: one, but for an actor with its critic."""
        params = self.abstract_state.params
        return [params] if "embed" in params else list(params.values())

    @property
    def state_bytes(self) -> str:
        """What the state consists of, over all devices."""
        state = self.abstract_state
        parameters, optimizer = tree_bytes(state.params), tree_bytes(state.opt_state)
        frozen = (parameters - self.trained_bytes) / 1e9
        return (
            f"{self.trained_bytes / 1e9:.3f} GB trained parameters + {frozen:.3f} GB frozen + "
            f"{optimizer / 1e9:.3f} GB optimizer"
        )

    @property
    def flops_per_token(self) -> float:
        """Of training, for all models."""
        model, length = self.config.model, self.config.data.sequence_length
        heads = [0.0 if "scalar_head" in params else self.config.unembedded for params in self.models]
        last_block = self.config.last_block
        return sum(flops_per_token(model, length, unembedded=each, last_block=last_block) for each in heads)

    def describe(self) -> str:
        """Devices, mesh, parameters and batch arithmetic, in a few lines."""
        config, data, mesh = self.config, self.config.data, dict(self.mesh.shape)
        parameters = parameter_count(kernels(self.abstract_state.params))
        table = sum(parameter_count(params["embed"]) for params in self.models)
        quantize = config.model.lora.quantize
        stored = config.model.param_dtype + (
            "" if quantize == "none" else f" and {quantize} (frozen kernels)"
        )
        trained = "" if self.num_trained == parameters else f"; {self.num_trained:,} trained"
        tokens, steps = self.tokens_per_step, config.training.steps
        flops = self.flops_per_token
        rows = data.batch_size // (mesh["data"] * mesh["fsdp"]) // config.training.num_microbatches
        processes = f"processes: {jax.process_count()}, devices as PROCESS.DEVICE: "
        return "\n".join(
            [
                f"devices: {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}), "
                f"mesh {' x '.join(f'{axis}={size}' for axis, size in mesh.items())}",
                *([processes + order_of_devices(self.mesh)] if jax.process_count() > 1 else []),
                f"model: {parameters:,} parameters ({parameters - table:,} outside the embedding{trained}), "
                f"{config.model.compute_dtype} over {stored}",
                f"batch: {data.batch_size} rows, {tokens:,} tokens of {data.sequence_length} a sequence; "
                f"{rows} rows a device at a time",
                f"run: {steps:,} steps, {steps * tokens:,} tokens, "
                f"{flops:.3g} FLOPs per token, {steps * tokens * flops:.3g} FLOPs in total",
            ]
        )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kernels(params: Any) -> Any:
    """The shapes of parameters, those of the kernels themselves where they are quantized."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    return jax.tree.map(lambda x: shape(x.shape), params, is_leaf=is_quantized)


def trained_size(params: Any, trainable: str) -> tuple[int, int]:
    """Bytes and number of the parameters that are trained; ConfigError where none would be."""
    trained = split_params(params, trainable)[0]
    if not jax.tree.leaves(trained):
        raise ConfigError(f"optimizer.trainable={trainable!r} is found in the path of no parameter")
    if any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(trained)):
        raise ConfigError(
            "optimizer.trainable is found in the path of quantized kernels, which cannot train: narrow it, "
            "or set model.lora.quantize=none"
        )
    return tree_bytes(trained), parameter_count(trained)


def check_sizes(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """ConfigError, with the nearest values that work, where batch, mesh and lengths do not go together."""
    data, pieces = config.data, config.training.num_microbatches
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    for name in ("steps", "num_microbatches", "max_bad_steps"):
        if getattr(config.training, name) < 1:
            raise ConfigError(f"training.{name}={getattr(config.training, name)} must be at least 1")
    if data.batch_size % (row_devices * pieces):
        sizes = " or ".join(map(str, nearest_multiples(data.batch_size, row_devices * pieces)))
        raise ConfigError(
            f"data.batch_size={data.batch_size} does not divide over {row_devices} devices (mesh data x "
            f"fsdp) times training.num_microbatches={pieces}: use {sizes}"
        )
    if data.sequence_length % (shards := mesh.shape["sequence"]):
        lengths = " or ".join(map(str, nearest_multiples(data.sequence_length, shards)))
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} does not divide over mesh.sequence={shards}: use "
            f"{lengths}"
        )
    if shards > 1 and config.model.attention != "xla":
        raise ConfigError(
            f"mesh.sequence={shards} is not supported with model.attention={config.model.attention}: use xla"
        )
    if data.sequence_length > config.model.max_length:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} is over "
            f"model.max_length={config.model.max_length}: lower the first or raise the second"
        )


def dry_run(program: Program[Any, Any]) -> str:
    """Compile the train step: its sizes, its memory on each device, and which fields change that."""
    start = time.perf_counter()
    memory = program.compile().memory_analysis()
    if memory is None:
        return f"{program.describe()}\nthis backend does not report memory"
    state, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return "\n".join(
        [
            program.describe(),
            f"compiled in {time.perf_counter() - start:.1f} s (no data or weights were read)",
            f"state: {program.state_bytes}",
            f"memory a device: {(state + temporary) / 1e9:.3f} GB = {state / 1e9:.3f} GB state and batch + "
            f"{temporary / 1e9:.3f} GB temporaries",
            "to lower temporaries: training.num_microbatches, model.remat (attention, dots, full), "
            "data.batch_size, model.compute_dtype=bfloat16; to lower the state: mesh.fsdp, mesh.tensor",
        ]
    )
