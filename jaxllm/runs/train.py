"""One training run, from its config to its last checkpoint. `experiments/train.py` is its command line."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import jax
from tqdm import tqdm

from jaxllm.runs.process import set_up_process
from jaxllm.runs.program import Program, find_stage
from jaxllm.runs.config import MAY_DIFFER, TrainConfig
from jaxllm.runs.weights import InitialWeights, starting_point
from jaxllm.config import as_dict
from jaxllm.data.chat_template import ChatTemplate, load_template
from jaxllm.data.loader import device_batches, evaluation_batches, training_batches
from jaxllm.data.rows import Dataset
from jaxllm.data.show import printable
from jaxllm.data.tokenizer import BaseTokenizer, build_tokenizer, check_vocabulary, load_tokenizer
from jaxllm.errors import ConfigError
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.checkpoint import Checkpoints, to_json, write_file
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Loop
from jaxllm.training.metrics import MetricWriter, Throughput
from jaxllm.training.run_folder import RunFolder, open_run, record_start
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import Watchdog

TEMPLATE_FILE = "template.jinja"  # of a run whose conversations have another template than the tokenizer's


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


def write_samples(folder: RunFolder, step: int, texts: Sequence[str], width: int | None = None) -> None:
    """All into `samples/STEP.txt`, the first onto the terminal, with its lines cut to `width` characters."""
    file = folder.file("samples", f"{step}.txt")
    file.write_text("".join(f"{text}\n{'-' * 20}\n" for text in texts))
    first = "\n".join(line[:width] for line in texts[0].splitlines())
    tqdm.write(printable(f"sample at step {step} (all in {file.parent}): {first}"))


def run_tokenizer(config: TrainConfig, folder: RunFolder, start: InitialWeights) -> BaseTokenizer:
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
    path: str | None, tokenizer: BaseTokenizer, folder: RunFolder, start: InitialWeights
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
    program: Program, folder: RunFolder, checkpoints: Checkpoints, start: InitialWeights
) -> tuple[TrainState, dict[str, Any]]:
    """The state to train from and its checkpoint's metadata: restored, fresh, or fresh with given weights."""
    if folder.resuming:
        state, metadata = checkpoints.restore(folder.step, program.placed_state)
        step = int(state.step)
        checkpoints.rewind(step)
        print(f"resumed at step {step}", flush=True)
        return state, metadata
    state = program.fresh_state(None if start.parent is None else start.params())
    weights = f"the weights of {start.parent}" if start.parent else "random weights (no --init_from)"
    print(f"fresh run with {weights}", flush=True)
    return state, {}


class RowSource(BatchSource):
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


def row_source(program: Program, data: Dataset, tokenizer: BaseTokenizer, start: InitialWeights) -> BatchSource:
    """The feed of every stage that learns from rows of files."""
    return RowSource(program, data)


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
    set_up_process()
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
        closing(program.stage.make_source(program, data, tokenizer, begin)) as feed,
        saving(Checkpoints(folder.checkpoints, keep=config.checkpoint.keep, log=tqdm.write)) as checkpoints,
    ):
        record_start(
            folder,
            as_dict(config),
            command=command,
            fingerprints={"data": data.fingerprint, "tokenizer": tokenizer.hash, **feed.fingerprints},
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
        tokens = program.tokens_per_step
        last_row = int(state.step) if folder.resuming else -1
        with (
            jax.set_mesh(program.mesh),
            Watchdog(folder.path, config.training.hang_timeout) as watch,
            closing(MetricWriter(folder.path, last_row, config.wandb_project, as_dict(config))) as writer,
        ):
            loop = Loop(
                config=config.training,
                train_step=train_step,
                feed=feed,
                schedule=program.schedule,
                hooks=tuple(program.stage.make_hooks(program, data, tokenizer, folder, watch.check, feed)),
                save=make_save(config, folder, checkpoints, tokenizer, data, feed, best),
                wait=checkpoints.wait,
                writer=writer,
                throughput=Throughput(tokens, tokens * program.flops_per_token),
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
    config: TrainConfig, step: int, best: EarlyStopping | None, unfinished_row: dict[str, float] | None
) -> bool:
    """Whether there is nothing left to do, which is then said."""
    over = best is not None and best.over
    left = step < config.training.steps and not over
    if left or ((step == config.training.steps or over) and unfinished_row is not None):
        return False
    if step >= config.training.steps:
        mend = "raise training.steps"
    else:
        mend = "set training.target=none" if best.reached else "raise training.patience"
    print(f"nothing to do: {step} steps are done; for more, {mend}")
    return True


def make_save(
    config: TrainConfig,
    folder: RunFolder,
    checkpoints: Checkpoints,
    tokenizer: BaseTokenizer,
    data: Dataset,
    feed: BatchSource,
    best: EarlyStopping | None,
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


def make_best(config: TrainConfig, saved: dict[str, Any] | None) -> EarlyStopping | None:
    """What the config compares, and what a checkpoint knows of it."""
    if config.checkpoint.best_metric is None:
        return None
    best = EarlyStopping(
        config.checkpoint.best_metric,
        config.checkpoint.best_is == "highest",
        config.training.patience,
        config.training.target,
    )
    if saved is not None:
        best.value, best.step, best.waited = saved["value"], saved["step"], saved["waited"]
    return best


def describe_end(step: int, best: EarlyStopping | None) -> str:
    """How far the run came, and which step was best."""
    text = f"{step} steps"
    if best is not None and best.step is not None:
        early = ", stopped early" if best.over and not best.reached else ""
        text += f"{early} (best {best.metric} {best.value:.4g} at step {best.step})"
    return text


@contextmanager
def saving(checkpoints: Checkpoints) -> Iterator[Checkpoints]:
    """However the block ends, what it began to save is on disk before the process goes on."""
    try:
        yield checkpoints
    finally:
        checkpoints.wait()
