"""One training run, from its config to its last checkpoint. `experiments/train.py` is its command line."""

import functools
import importlib
import os
import pkgutil
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxllm.objectives
from experiments.train_config import MAY_DIFFER, TrainConfig
from jaxllm.batches import TokenBatch
from jaxllm.config import as_dict, nearest_multiples
from jaxllm.data.loader import device_batches, evaluation_batches, training_batches
from jaxllm.data.text import TextData, load_text, text_documents
from jaxllm.data.tokenizer import Tokenizer, build_tokenizer, check_vocabulary, load_tokenizer
from jaxllm.errors import ConfigError
from jaxllm.evaluation.perplexity import evaluate, row_sums
from jaxllm.models import build_model
from jaxllm.models.config import flops_per_token
from jaxllm.rollout.generate import generate
from jaxllm.sharding import batch_sharding, make_mesh, shardings
from jaxllm.training.checkpoint import (
    Checkpoints,
    checkpoint_hash,
    find_checkpoint,
    read_arrays,
    to_json,
)
from jaxllm.training.loop import Hook, Loop
from jaxllm.training.metrics import MetricWriter, Throughput, parameter_count
from jaxllm.training.optimizer import make_optimizer, make_schedule
from jaxllm.training.run_folder import RunFolder, open_run, record_start
from jaxllm.training.state import TrainState, init_state
from jaxllm.training.step import train_step
from jaxllm.training.watch import Watch


class Program:
    """What runs on the devices: the model, the sharded state and the train step, from the config alone.

    Building it compiles nothing and reads no data, and raises ConfigError for whatever does not fit.
    """

    def __init__(self, config: TrainConfig, devices: list[jax.Device] | None = None):
        self.config = config
        self.mesh = make_mesh(config.mesh, devices)
        check_sizes(config, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        self.model = build_model(config.model)
        self.schedule = make_schedule(config.optimizer, config.training.steps)
        optimizer = make_optimizer(config.optimizer, self.schedule)
        self.init = functools.partial(init_state, init=self.model.init, optimizer=optimizer)
        self.abstract_state = jax.eval_shape(self.init, jax.random.key(config.seed))
        self.shardings = shardings(self.abstract_state, self.mesh)
        self.batch_sharding = batch_sharding(self.mesh)
        objective = find_objective(config.stage)
        loss_fn = functools.partial(objective.loss_fn, model=self.model, z_loss=config.objective.z_loss)
        self.train_step = functools.partial(
            train_step,
            loss_fn=loss_fn,
            optimizer=optimizer,
            num_microbatches=config.training.num_microbatches,
        )

    @property
    def placed_state(self) -> TrainState:
        """The state's shapes with their shardings: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.abstract_state,
            self.shardings,
        )

    def fresh_state(self) -> TrainState:
        """Random weights, every array made where it belongs."""
        return jax.jit(self.init, out_shardings=self.shardings)(jax.random.key(self.config.seed))

    def compile(self) -> jax.stages.Compiled:
        """The train step for just these shapes, which can therefore never compile again."""
        size = (self.config.data.batch_size, self.config.data.sequence_length)
        batch = TokenBatch(
            *(
                jax.ShapeDtypeStruct(
                    size, bool if field == "mask" else jnp.int32, sharding=self.batch_sharding
                )
                for field in TokenBatch._fields
            )
        )
        step = jax.jit(self.train_step, donate_argnums=0, out_shardings=(self.shardings, None))
        with jax.set_mesh(self.mesh):
            return step.lower(self.placed_state, batch).compile()

    def describe(self) -> str:
        """Devices, mesh, parameters and batch arithmetic, in a few lines."""
        config, data, mesh = self.config, self.config.data, dict(self.mesh.shape)
        parameters = parameter_count(self.abstract_state.params)
        table = parameter_count(self.abstract_state.params["embed"])
        tokens = data.batch_size * data.sequence_length
        flops = flops_per_token(config.model, data.sequence_length)
        rows = data.batch_size // (mesh["data"] * mesh["fsdp"]) // config.training.num_microbatches
        return "\n".join(
            [
                f"devices: {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}), "
                f"mesh {' x '.join(f'{axis}={size}' for axis, size in mesh.items())}",
                f"model: {parameters:,} parameters ({parameters - table:,} outside the embedding), "
                f"{config.model.compute_dtype} over {config.model.param_dtype}",
                f"batch: {data.batch_size} sequences x {data.sequence_length} tokens = {tokens:,} tokens a "
                f"step; {rows} sequences a device at a time",
                f"run: {config.training.steps:,} steps, {config.training.steps * tokens:,} tokens, "
                f"{flops:.3g} FLOPs a token, {config.training.steps * tokens * flops:.3g} in all",
            ]
        )


def find_objective(stage: str) -> ModuleType:
    """The module of jaxllm.objectives with this name."""
    stages = sorted(module.name for module in pkgutil.iter_modules(jaxllm.objectives.__path__))
    if stage not in stages:
        raise ConfigError(f"stage={stage!r}: choose one of {', '.join(stages)}")
    return importlib.import_module(f"jaxllm.objectives.{stage}")


def check_sizes(config: TrainConfig, row_devices: int) -> None:
    """ConfigError, with the nearest values that work, where batch, mesh and lengths do not go together."""
    data, pieces = config.data, config.training.num_microbatches
    for name in ("steps", "num_microbatches", "max_bad_steps"):
        if getattr(config.training, name) < 1:
            raise ConfigError(f"training.{name}={getattr(config.training, name)} must be at least 1")
    if data.batch_size % (row_devices * pieces):
        sizes = " or ".join(map(str, nearest_multiples(data.batch_size, row_devices * pieces)))
        raise ConfigError(
            f"data.batch_size={data.batch_size} does not divide over {row_devices} devices (mesh data x "
            f"fsdp) times training.num_microbatches={pieces}: use {sizes}"
        )
    if data.sequence_length > config.model.max_length:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} is over "
            f"model.max_length={config.model.max_length}: lower the first or raise the second"
        )


def dry_run(program: Program) -> str:
    """Compile, and say what the step takes of each device and which knobs change that."""
    start = time.perf_counter()
    memory = program.compile().memory_analysis()
    state, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return "\n".join(
        [
            program.describe(),
            f"compiled in {time.perf_counter() - start:.1f} s",
            f"memory a device: {(state + temporary) / 1e9:.3f} GB = {state / 1e9:.3f} GB state and batch + "
            f"{temporary / 1e9:.3f} GB temporaries",
            "to lower temporaries: training.num_microbatches, model.remat (attention, dots, full), "
            "data.batch_size, model.compute_dtype=bfloat16; to lower the state: mesh.fsdp, mesh.tensor",
        ]
    )


def make_evaluation(
    program: Program, data: TextData, tokenizer: Tokenizer, check: Callable[[], None]
) -> Hook:
    """Score the held-out windows."""
    config = program.config
    byte_lengths = np.zeros(config.model.vocab_size, np.int32)
    byte_lengths[: tokenizer.vocab_size] = tokenizer.token_byte_lengths
    score = jax.jit(functools.partial(row_sums, byte_lengths=byte_lengths, model=program.model))
    batches = evaluation_batches(
        data.validation,
        batch_size=config.data.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if config.evaluation.max_windows is not None:
        batches = batches[: max(1, config.evaluation.max_windows // config.data.batch_size)]

    def run(step: int, state: TrainState) -> dict[str, float]:
        del step
        return evaluate(state.params, device_batches(batches, program.batch_sharding), score, check)

    return Hook(config.training.evaluate_every, run)


def make_sampling(program: Program, tokenizer: Tokenizer, folder: RunFolder) -> Hook:
    """Continue the config's prompts into `samples/STEP.txt` and onto the terminal."""
    config = program.config.sample
    every = program.config.training.sample_every if config.prompts else 0
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]

    def run(step: int, state: TrainState) -> dict[str, float]:
        said = generate(
            program.model,
            state.params,
            prompts,
            sampling=config.sampling,
            stop_ids=(tokenizer.eos_id,),
            keys=jax.random.split(jax.random.fold_in(state.key, step), len(prompts)),
        )
        texts = [
            prompt + tokenizer.decode(tokens, from_start=False)
            for prompt, tokens in zip(config.prompts, said.tokens, strict=True)
        ]
        file = folder.file("samples", f"{step}.txt")
        file.write_text("".join(f"{text}\n{'-' * 20}\n" for text in texts))
        tqdm.write(f"sample at step {step} (all in {file.parent}): {texts[0]}")
        return {}

    return Hook(every, run)


def run_tokenizer(config: TrainConfig, folder: RunFolder, init_from: Path | None) -> Tokenizer:
    """That of the run if it goes on, of the weights it begins with if there are some, else the config's."""
    if folder.resuming or init_from is not None:
        tokenizer = load_tokenizer((folder.path if folder.resuming else init_from) / "tokenizer.model")
    else:
        tokenizer = build_tokenizer(config.tokenizer, text_documents(config.data, seed=config.seed))
    check_vocabulary(tokenizer, config.model.vocab_size)
    if not folder.resuming:
        tokenizer.save(folder.file("tokenizer.model"))
    return tokenizer


def initial_state(
    program: Program, folder: RunFolder, checkpoints: Checkpoints, init_from: Path | None
) -> tuple[TrainState, dict[str, Any]]:
    """The state to train from and its checkpoint's metadata: restored, fresh, or fresh with given weights."""
    if folder.resuming:
        state, metadata = checkpoints.restore(folder.step, program.placed_state)
        step = int(state.step)
        checkpoints.rewind(step)
        print(f"resumed at step {step}", flush=True)
        return state, metadata
    state = program.fresh_state()
    if init_from is not None:
        state = state._replace(params=read_arrays(init_from, program.placed_state.params, prefix="params"))
    print("fresh run" + (f" with the weights of {init_from}" if init_from else ""), flush=True)
    return state, {}


def train(
    config: TrainConfig,
    *,
    workdir: str,
    resume: str,
    init_from: str | None,
    profile: tuple[int, int] | None,
    command: list[str],
) -> None:
    """Run to config.training.steps, from where `workdir` stands."""
    enable_compilation_cache()
    program = Program(config)
    folder = open_run(workdir, as_dict(config), resume=resume, may_differ=MAY_DIFFER)
    parent = None if init_from is None else find_checkpoint(init_from)
    tokenizer = run_tokenizer(config, folder, parent)
    data = load_text(config.data, tokenizer, seed=config.seed, run_folder=folder.path)
    batches = training_batches(
        data.train,
        weights=data.weights,
        batch_size=config.data.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    print(f"{program.describe()}\n{data.report}\nrun folder: {folder.path}", flush=True)
    record_start(
        folder,
        as_dict(config),
        command=command,
        fingerprints={"data": data.fingerprint, "tokenizer": tokenizer.hash},
        parent=None if parent is None else {"path": str(parent), "hash": checkpoint_hash(parent)},
    )
    with saving(Checkpoints(folder.checkpoints, keep=config.checkpoint.keep, log=tqdm.write)) as checkpoints:
        state, metadata = initial_state(program, folder, checkpoints, parent)
        start = int(state.step)
        unfinished_row = metadata.get("unfinished_row")
        if start > config.training.steps or (start == config.training.steps and unfinished_row is None):
            print(f"nothing to do: {start} steps are done; for more, raise training.steps")
            return
        files = {
            "config.json": to_json(as_dict(config)),
            "tokenizer.model": folder.file("tokenizer.model").read_bytes(),
        }

        def save(step: int, state: TrainState, unfinished_row: dict[str, float] | None) -> None:
            metadata = {
                "run": folder.id,
                "tokenizer": tokenizer.hash,
                "data": data.fingerprint,
                "unfinished_row": unfinished_row,
            }
            checkpoints.save(step, state, metadata, files)

        print("compiling the train step ...", end=" ", flush=True)
        began = time.perf_counter()
        train_step = program.compile()
        print(f"{time.perf_counter() - began:.1f} s", flush=True)
        tokens_per_step = config.data.batch_size * config.data.sequence_length
        flops = flops_per_token(config.model, config.data.sequence_length)
        with (
            jax.set_mesh(program.mesh),
            Watch(folder.path, config.training.hang_timeout) as watch,
            closing(MetricWriter(folder.path, start, config.wandb_project, as_dict(config))) as writer,
        ):
            hooks = [make_sampling(program, tokenizer, folder)]
            if data.validation:
                hooks.append(make_evaluation(program, data, tokenizer, watch.check))
            loop = Loop(
                config=config.training,
                train_step=train_step,
                schedule=program.schedule,
                hooks=tuple(hooks),
                save=save,
                wait=checkpoints.wait,
                writer=writer,
                throughput=Throughput(tokens_per_step, tokens_per_step * flops),
                watch=watch,
                resume_command=shlex.join(command),
                profile=profile,
                profile_folder=str(folder.path / "profile"),
            )
            device = device_batches(batches, program.batch_sharding, start_step=start)
            loop.run(state, device, unfinished_row)
    print(f"done: {config.training.steps} steps, all in {folder.path}")


@contextmanager
def saving(checkpoints: Checkpoints) -> Iterator[Checkpoints]:
    """However the block ends, what it began to save is on disk before the process goes on."""
    try:
        yield checkpoints
    finally:
        checkpoints.wait()


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, where JAX_COMPILATION_CACHE_DIR does not say otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jaxllm/compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
