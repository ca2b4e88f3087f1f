"""One training run, from its config to its last checkpoint. `experiments/train.py` is its command line."""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from experiments.program import Program, find_stage
from experiments.train_config import MAY_DIFFER, TrainConfig
from jaxllm.config import as_dict
from jaxllm.data.chat_template import ChatTemplate, load_template
from jaxllm.data.loader import device_batches, evaluation_batches, training_batches
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer, build_tokenizer, check_vocabulary, load_tokenizer
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models.config import flops_per_token
from jaxllm.training.best import Best
from jaxllm.training.checkpoint import (
    Checkpoints,
    checkpoint_hash,
    find_checkpoint,
    read_arrays,
    to_json,
    write_file,
)
from jaxllm.training.feed import Feed
from jaxllm.training.loop import Loop
from jaxllm.training.metrics import MetricWriter, Throughput
from jaxllm.training.run_folder import RunFolder, open_run, record_start
from jaxllm.training.state import TrainState, merge_params
from jaxllm.training.watch import Watch

TEMPLATE_FILE = "template.jinja"  # of a run whose conversations have another template than the tokenizer's


class Start(NamedTuple):
    """The weights that a run begins, or began, with."""

    parent: Path | None  # the checkpoint they are from; None: they are random
    hash: str
    params: Callable[[], Any]  # the weights themselves, laid out as the run's


def starting_point(program: Program, folder: RunFolder, init_from: str | None) -> Start:
    """From --init_from; for a run that goes on, from what it wrote down then."""
    parent = find_checkpoint(init_from) if init_from and not folder.resuming else None
    digest = None if parent is None else checkpoint_hash(parent)
    if parent is not None:
        check_parent(program.config, init_from, parent)
    if folder.resuming and (record := json.loads(folder.file("run.json").read_bytes())["parent"]):
        parent, digest = Path(record["path"]), record["hash"]

    def params() -> Any:
        if parent is None:
            return program.fresh_state().params
        if folder.resuming and checkpoint_hash(find_checkpoint(parent)) != digest:
            raise CheckpointError(
                f"{parent} is not the checkpoint this run began with: its hash was {digest}"
            )
        wanted, optional = program.placed_state.params, program.stage.OPTIONAL_PARAMETERS
        read = read_arrays(parent, wanted, prefix="params", optional=optional)
        if jax.tree.structure(read) == jax.tree.structure(wanted):
            return read
        return merge_params(read, program.fresh_state().params)  # new ones, such as a reward model's head

    return Start(parent, digest or f"seed {program.config.seed}", params)


SHAPE = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


def check_parent(config: TrainConfig, init_from: str, parent: Path) -> None:
    """ConfigError where the weights to begin with are of another size, or of a model that says nothing."""
    given = json.loads((parent / "config.json").read_bytes())
    here = as_dict(config)["model"]
    pairs = [(name, given["model"][name], here[name]) for name in SHAPE]
    found = [f"{name} {theirs} -> {ours}" for name, theirs, ours in pairs if theirs != ours]
    if found:
        raise ConfigError(
            f"--init_from={init_from} is a model of another size: {', '.join(found)}; give the config that "
            f"size (--config=FILE.py:SIZE)"
        )
    if given["stage"] == "reward_model" != config.stage:
        raise ConfigError(f"--init_from={init_from} is a reward model, which says nothing: give another")


def held_out_batches(config: TrainConfig, validation: Sequence[Any]) -> Any:
    """The batches to evaluate on, as many as the config wants."""
    batches = evaluation_batches(
        validation,
        batch_size=config.data.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if config.evaluation.max_rows is not None:
        batches = batches[: max(1, config.evaluation.max_rows // config.data.batch_size)]
    return batches


def write_samples(folder: RunFolder, step: int, texts: Sequence[str]) -> None:
    """All into `samples/STEP.txt`, the first onto the terminal."""
    file = folder.file("samples", f"{step}.txt")
    file.write_text("".join(f"{text}\n{'-' * 20}\n" for text in texts))
    tqdm.write(f"sample at step {step} (all in {file.parent}): {texts[0]}")


def run_tokenizer(config: TrainConfig, folder: RunFolder, start: Start) -> BaseTokenizer:
    """That of the run if it goes on, of the weights it begins with if there are some, else the config's."""
    if folder.resuming or start.parent is not None:
        tokenizer = load_tokenizer(folder.path if folder.resuming else start.parent)
    else:
        tokenizer = build_tokenizer(config.tokenizer, find_stage(config.stage).tokenizer_text(config))
    check_vocabulary(tokenizer, config.model.vocab_size)
    if not folder.resuming:
        for name, content in tokenizer.files().items():
            write_file(folder.file(name), content)
    return tokenizer


def load_run_template(
    path: str | None, tokenizer: BaseTokenizer, folder: RunFolder, start: Start
) -> ChatTemplate:
    """The run's if it goes on; else the config's, that of the weights it begins with, or the tokenizer's."""
    if folder.resuming or path is None:
        where = folder.path if folder.resuming else start.parent
        saved = None if where is None else where / TEMPLATE_FILE
        path = str(saved) if saved is not None and saved.exists() else path
    template = load_template(tokenizer, path)
    if path is not None and not folder.resuming:
        write_file(folder.file(TEMPLATE_FILE), template.source.encode())
    return template


def initial_state(
    program: Program, folder: RunFolder, checkpoints: Checkpoints, start: Start
) -> tuple[TrainState, dict[str, Any]]:
    """The state to train from and its checkpoint's metadata: restored, fresh, or fresh with given weights."""
    if folder.resuming:
        state, metadata = checkpoints.restore(folder.step, program.placed_state)
        step = int(state.step)
        checkpoints.rewind(step)
        print(f"resumed at step {step}", flush=True)
        return state, metadata
    state = program.fresh_state()
    if start.parent is not None:
        state = state._replace(params=start.params())
    print("fresh run" + (f" with the weights of {start.parent}" if start.parent else ""), flush=True)
    return state, {}


class RowFeed(Feed):
    """Rows of files, in an order that is the seed's."""

    def __init__(self, program: Program, data: Dataset):
        self.program, self.data = program, data
        self.rows = training_batches(
            data.train,
            weights=data.weights,
            batch_size=program.config.data.batch_size,
            seed=program.config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def batches(self, state: TrainState, check: Callable[[], None]) -> Iterator[Any]:
        placed = device_batches(self.rows, self.program.batch_sharding, start_step=int(state.step))
        return map(self.data.complete, placed)


def row_feed(program: Program, data: Dataset, tokenizer: BaseTokenizer, start: Start) -> Feed:
    """The feed of every stage that learns from rows of files."""
    return RowFeed(program, data)


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
    begin = starting_point(program, folder, init_from)
    tokenizer = run_tokenizer(config, folder, begin)
    print(program.describe(), flush=True)
    with jax.set_mesh(program.mesh):
        data = program.stage.load(program, tokenizer, folder, begin)
    print(f"{data.report}\nrun folder: {folder.path}", flush=True)
    check_best_metric(config, data)
    with (
        closing(program.stage.make_feed(program, data, tokenizer, begin)) as feed,
        saving(Checkpoints(folder.checkpoints, keep=config.checkpoint.keep, log=tqdm.write)) as checkpoints,
    ):
        record_start(
            folder,
            as_dict(config),
            command=command,
            fingerprints={"data": data.fingerprint, "tokenizer": tokenizer.hash},
            parent=None if begin.parent is None else {"path": str(begin.parent), "hash": begin.hash},
        )
        state, metadata = initial_state(program, folder, checkpoints, begin)
        feed.restore(metadata)
        best = make_best(config, metadata.get("best"))
        unfinished_row = metadata.get("unfinished_row")
        if not folder.resuming and config.training.evaluate_at_start:
            unfinished_row = {}
        if is_over(config, int(state.step), best, unfinished_row):
            return
        print("compiling the train step ...", end=" ", flush=True)
        began = time.perf_counter()
        train_step = program.compile()
        print(f"{time.perf_counter() - began:.1f} s", flush=True)
        flops = program.tokens_per_step * flops_per_token(config.model, config.data.sequence_length)
        last_row = int(state.step) if folder.resuming else -1
        with (
            jax.set_mesh(program.mesh),
            Watch(folder.path, config.training.hang_timeout) as watch,
            closing(MetricWriter(folder.path, last_row, config.wandb_project, as_dict(config))) as writer,
        ):
            loop = Loop(
                config=config.training,
                train_step=train_step,
                feed=feed,
                schedule=program.schedule,
                hooks=tuple(program.stage.make_hooks(program, data, tokenizer, folder, watch.check)),
                save=make_save(config, folder, checkpoints, tokenizer, data, feed, best),
                wait=checkpoints.wait,
                writer=writer,
                throughput=Throughput(program.tokens_per_step, flops),
                watch=watch,
                best=best,
                resume_command=shlex.join(command),
                profile=profile,
                profile_folder=str(folder.path / "profile"),
            )
            state = loop.run(state, unfinished_row)
    print(f"done: {describe_end(int(state.step), best)}, all in {folder.path}")


def check_best_metric(config: TrainConfig, data: Dataset) -> None:
    """ConfigError where there is nothing to measure it on."""
    if config.checkpoint.best_metric is not None and not data.validation:
        raise ConfigError(
            f"checkpoint.best_metric={config.checkpoint.best_metric} needs held-out data: raise "
            f"data.validation_fraction, name data.validation, or set checkpoint.best_metric=none"
        )


def is_over(
    config: TrainConfig, step: int, best: Best | None, unfinished_row: dict[str, float] | None
) -> bool:
    """Whether there is nothing left to do, which is then said."""
    given_up = best is not None and best.given_up
    left = step < config.training.steps and not given_up
    if left or ((step == config.training.steps or given_up) and unfinished_row is not None):
        return False
    field = "patience" if step < config.training.steps else "steps"
    print(f"nothing to do: {step} steps are done; for more, raise training.{field}")
    return True


def make_save(
    config: TrainConfig,
    folder: RunFolder,
    checkpoints: Checkpoints,
    tokenizer: BaseTokenizer,
    data: Dataset,
    feed: Feed,
    best: Best | None,
) -> Callable[[int, TrainState, dict[str, float], bool], None]:
    """What saves a step of this run: its state, and all that a resumption or a user of the weights needs."""
    files = {"config.json": to_json(as_dict(config)), **tokenizer.files()}
    if (template := folder.file(TEMPLATE_FILE)).exists():
        files[TEMPLATE_FILE] = template.read_bytes()

    def save(step: int, state: TrainState, row: dict[str, float], finished: bool) -> None:
        metadata = {
            "run": folder.id,
            "tokenizer": tokenizer.hash,
            "data": data.fingerprint,
            "metrics": row if finished else None,
            "unfinished_row": None if finished else row,
            "best": None if best is None else asdict(best),
        }
        checkpoints.best_step = None if best is None else best.step
        checkpoints.save(step, state, metadata | feed.metadata(), files)

    return save


def make_best(config: TrainConfig, saved: dict[str, Any] | None) -> Best | None:
    """What the config compares, and what a checkpoint knows of it."""
    if config.checkpoint.best_metric is None:
        return None
    best = Best(
        config.checkpoint.best_metric, config.checkpoint.best_is == "highest", config.training.patience
    )
    if saved is not None:
        best.value, best.step, best.waited = saved["value"], saved["step"], saved["waited"]
    return best


def describe_end(step: int, best: Best | None) -> str:
    """How far the run came, and which step was best."""
    text = f"{step} steps"
    if best is not None and best.step is not None:
        early = ", stopped early" if best.given_up else ""
        text += f"{early} (best {best.metric} {best.value:.4g} at step {best.step})"
    return text


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
