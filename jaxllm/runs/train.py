"""One training run, from its config to its last checkpoint. `experiments/train.py` is its command line."""

import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.config import as_dict
from jaxllm.config_versions import stamped
from jaxllm.data.chat_template import ChatTemplate, PlainTextTemplate, load_template
from jaxllm.data.rows import Dataset, RecordConfig
from jaxllm.data.tokenizer import BaseTokenizer, build_tokenizer, check_vocabulary, load_tokenizer
from jaxllm.errors import ConfigError, DataError
from jaxllm.files import to_json
from jaxllm.parallel import processes
from jaxllm.parallel.global_arrays import gather
from jaxllm.parallel.sharding import Device
from jaxllm.runs.checkpoints import (
    TEMPLATE_FILE,
    Base,
    ModelKind,
    read_metadata,
    read_tokenizer,
    saved_template,
)
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import InitialWeights, RunContext, RunInputs
from jaxllm.runs.process import set_up_process
from jaxllm.runs.program import Program
from jaxllm.runs.resume import MAY_DIFFER, check_number_of_sources, parent_note, resume_notes
from jaxllm.runs.stage import Stage
from jaxllm.runs.step_by_length import compile_step
from jaxllm.runs.weights import initial_weights, model_note, run_with_parent, with_frozen, with_model_of
from jaxllm.store import url_of
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.loop import Loop
from jaxllm.training.metrics import MetricWriter, NoMetrics, Throughput, last_complete_row
from jaxllm.training.run_folder import RunFolder, lock_run, logs_of, open_run, record_start
from jaxllm.training.state import TrainState
from jaxllm.training.trackers import start_trackers
from jaxllm.training.watchdog import Watchdog


def train(
    stage: Stage,
    config: TrainConfig,
    *,
    workdir: str,
    resume: str = "auto",
    init_from: str | None = None,
    profile: tuple[int, int] | None = None,
    command: list[str],
    devices: Sequence[Device] | None = None,
) -> None:
    """Run to config.training.steps, from where `workdir` stands, on these devices (default: all).

    Args:
      resume: as in `open_run`. init_from: a run or a Hugging Face model, whose weights a fresh run has.
      profile: first and last step to trace. command: the command line, which a stopped run prints to resume.
    """
    set_up_process()
    given, config = config, with_model_of(config, run_with_parent(workdir) or init_from)
    if note := model_note(given, config):
        print(note, flush=True)
    program: Program[Any, Any] = Program(stage, config, devices)
    with lock_run(workdir) as upload, processes.own_output(logs_of(workdir)):
        folder = open_run(workdir, as_dict(config), resume=resume, may_differ=MAY_DIFFER)
        if folder.before is not None:
            check_number_of_sources(folder.before, config)
        train_in(folder, stage, program, init_from=init_from, profile=profile, command=command, upload=upload)


def train_in(
    folder: RunFolder,
    stage: Stage,
    program: Program[Any, Any],
    *,
    init_from: str | None,
    profile: tuple[int, int] | None,
    command: list[str],
    upload: Callable[[], None] = lambda: None,
) -> None:
    """`train` in a run folder that this process holds. `upload`: as `lock_run` yields it."""
    config: TrainConfig = program.config
    initial = initial_weights(stage, program, folder, init_from)
    tokenizer = run_tokenizer(stage, config, folder, initial)
    print(program.describe(), flush=True)
    template = run_template(stage, config, tokenizer, folder, initial)
    inputs = RunInputs(program, tokenizer, template, folder, initial)
    files = tokenizer.files() | template_files(tokenizer, template)
    with jax.set_mesh(program.mesh):
        data = stage.load(inputs)
    processes.check_equal("tokenizer", tokenizer.hash, DataError)
    processes.check_equal("data", data.fingerprint, DataError)
    print(f"{data.report}\nrun folder: {url_of(folder.path)}", flush=True)
    check_best_metric(config, data)
    with (
        closing(stage.make_source(inputs, data)) as source,
        saving(
            Checkpoints(folder.checkpoints, keep=config.checkpoint.keep, log=tqdm.write, before_commit=upload)
        ) as checkpoints,
    ):
        record_start(
            folder,
            as_dict(config),
            command=command,
            fingerprints={"data": data.fingerprint, "tokenizer": tokenizer.hash, **source.fingerprints},
            parent=parent_record(initial),
            files=files,
            clock=template.clock,
        )
        upload()
        state, metadata = initial_state(stage, program, folder, checkpoints, initial)
        if folder.before is not None:
            step, skipped = int(state.step), int(state.skipped_steps)
            notes = resume_notes(folder.before, config, url_of(folder.path), step, step - skipped)
            for line in (*notes, *parent_note(init_from, initial.parent)):
                print(f"note: {line}", flush=True)
        source.restore(metadata)
        early_stopping = make_early_stopping(config, metadata.get("best"))
        unfinished_row = metadata.get("unfinished_row")
        if not folder.resuming and config.training.evaluate_at_start:
            unfinished_row = {}
        if is_finished(config, int(state.step), early_stopping, unfinished_row):
            return
        print("compiling the train step ...", end=" ", flush=True)
        began = time.perf_counter()
        train_step = compile_step(program)
        print(f"{time.perf_counter() - began:.1f} s", flush=True)
        processes.barrier("compiled train step", processes.NO_TIMEOUT)  # else the first seems to hang
        tokens = program.tokens_per_step
        last_row = last_complete_row(int(state.step), folder.resuming, unfinished_row)
        with (
            jax.set_mesh(program.mesh),
            Watchdog(folder.path, config.training.hang_timeout) as watchdog,
            closing(make_writer(folder, last_row, config)) as writer,
        ):
            context = RunContext(
                **vars(inputs),
                data=data,
                source=source,
                check=watchdog.check_together,
                own_check=watchdog.check,
            )
            loop = Loop(
                config=config.training,
                train_step=train_step,
                source=source,
                schedule=program.schedule,
                hooks=tuple(stage.make_hooks(context)),
                save=make_save(stage, context, checkpoints, early_stopping, files),
                wait=checkpoints.wait,
                writer=writer,
                throughput=Throughput(tokens, program.flops_per_token),
                watchdog=watchdog,
                early_stopping=early_stopping,
                resume_command=shlex.join(command),
                profile=profile,
                profile_folder=str(folder.path / "profile"),
                row=metadata.get("metrics") or {},
            )
            with processes.naming_lost():
                state = loop.run(state, unfinished_row)
    print(f"done: {describe_end(int(state.step), early_stopping)}, all in {url_of(folder.path)}")


def run_tokenizer(
    stage: Stage, config: TrainConfig, folder: RunFolder, initial: InitialWeights
) -> BaseTokenizer:
    """The run's if it resumes, else its parent checkpoint's if it has one, else the config's."""
    saved = folder.path if folder.resuming else initial.parent
    if saved is not None:
        tokenizer = read_tokenizer(saved)
        if config.tokenizer.path is not None and not folder.resuming:
            print(f"note: tokenizer.path={config.tokenizer.path} is not used: --init_from has a tokenizer")
    else:
        tokenizer = first_tokenizer(lambda: build_tokenizer(config.tokenizer, stage.tokenizer_text(config)))
    check_vocabulary(tokenizer, config.model.vocab_size)
    return tokenizer


def first_tokenizer(build: Callable[[], BaseTokenizer]) -> BaseTokenizer:
    """What the first process builds, in every process: to train one takes reading all of the text."""
    if jax.process_count() == 1:
        return build()
    files = build().files() if processes.is_first() else {}
    found, _ = gather({name: np.frombuffer(content, np.uint8) for name, content in files.items()})[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in found.items():
            Path(folder, name).write_bytes(content.tobytes())
        return load_tokenizer(Path(folder))


def make_writer(folder: RunFolder, last_row: int, config: TrainConfig) -> MetricWriter | NoMetrics:
    """Where the metrics go: into the run folder, by the first process."""
    if not processes.is_first():
        return NoMetrics()
    projects = {"wandb": config.wandb_project, "trackio": config.trackio_project}
    trackers = start_trackers(folder.path, folder.id, projects, as_dict(config))
    return MetricWriter(folder.path, last_row, trackers)


def run_template(
    stage: Stage, config: Any, tokenizer: BaseTokenizer, folder: RunFolder, initial: InitialWeights
) -> ChatTemplate:
    """The run's if it resumes; else the config's, its parent checkpoint's or the tokenizer's. Whose template
    it is, his is its clock."""
    if not stage.conversational:
        return PlainTextTemplate(tokenizer)
    path, clock, where, options = config.data.template, None, None, config.data.template_options
    if folder.resuming:
        where, clock, options = folder.path, folder.record.get("clock"), ()  # its template has them
    elif path is None and initial.parent is not None:
        where, clock = initial.parent, read_metadata(initial.parent).get("clock")
    if where is not None:
        path = saved_template(where) or path
    template = load_template(tokenizer, path, clock, options)
    if folder.resuming and not is_same_file(config.data, template):
        print(f"note: data.template={config.data.template} is not used: the run keeps its chat template")
    if template.clock is not None:
        print(f"the chat template is told that it is {template.clock}, in this run and with its checkpoints")
    return template


def is_same_file(config: RecordConfig, template: ChatTemplate) -> bool:
    """Whether the config names no other template than this; a file that is gone is none."""
    try:
        named = config.template and Path(config.template).expanduser().read_text(encoding="utf-8-sig")
        return named is None or (template.source or "").endswith(named)  # options stand before it
    except (OSError, UnicodeDecodeError):
        return True


def template_files(tokenizer: BaseTokenizer, template: ChatTemplate) -> dict[str, bytes]:
    """The file of a template that is not the tokenizer's own."""
    if template.source is None or template.source == tokenizer.chat_template:
        return {}
    return {TEMPLATE_FILE: template.source.encode()}


def parent_record(initial: InitialWeights) -> dict[str, Any] | None:
    """What run.json holds of the checkpoint that a run is initialized from."""
    if initial.parent is None:
        return None
    record = {"path": url_of(initial.parent), "hash": initial.hash}
    return record if initial.base is None else record | {"base": base_record(initial.base)}


def base_record(base: Base) -> dict[str, str | None]:
    """What run.json and the checkpoints of a run with adapters hold of their base."""
    return {"path": url_of(base.path), "hash": base.hash}


def initial_state(
    stage: Stage,
    program: Program[Any, Any],
    folder: RunFolder,
    checkpoints: Checkpoints,
    initial: InitialWeights,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to train from and its checkpoint's metadata: restored, fresh, or fresh with given weights."""
    if folder.resuming:
        state, metadata = checkpoints.restore(folder.step, program.saved(program.placed_state))
        state = with_frozen(stage, program, state, initial.base)
        step = int(state.step)
        checkpoints.rewind(step)
        print(f"resumed at step {step}", flush=True)
        return state, metadata
    state = program.fresh_state(None if initial.parent is None else initial.params())
    weights = (
        f"the weights of {url_of(initial.parent)}" if initial.parent else "random weights (no --init_from)"
    )
    print(f"fresh run with {weights}", flush=True)
    return state, {}


def check_best_metric(config: TrainConfig, data: Dataset) -> None:
    """ConfigError where there is nothing to measure it on."""
    if config.checkpoint.best_metric is not None and not data.validation:
        raise ConfigError(
            f"checkpoint.best_metric={config.checkpoint.best_metric} needs held-out data: raise "
            f"data.validation_fraction, name data.validation, or set checkpoint.best_metric=none"
        )


def is_finished(
    config: TrainConfig,
    step: int,
    early_stopping: EarlyStopping | None,
    unfinished_row: Mapping[str, float] | None,
) -> bool:
    """Whether there is nothing left to do, which is then printed."""
    stopped = early_stopping is not None and early_stopping.should_stop
    left = step < config.training.steps and not stopped
    if left or ((step == config.training.steps or stopped) and unfinished_row is not None):
        return False
    if step >= config.training.steps:
        fix = "raise training.steps"
    else:
        reached = early_stopping is not None and early_stopping.target_reached
        fix = "set training.target=none" if reached else "raise training.patience"
    print(f"nothing to do: {step} steps are done; to train further, {fix}")
    return True


def make_save(
    stage: Stage,
    context: RunContext[Any, Any],
    checkpoints: Checkpoints,
    early_stopping: EarlyStopping | None,
    files: Mapping[str, bytes],
) -> Callable[[int, TrainState, dict[str, float], bool], None]:
    """What saves a step of this run: its state, and all that a resumption or a user of the weights needs.

    `files` are those of the tokenizer and the chat template.
    """
    folder, tokenizer = context.folder, context.tokenizer
    files = {"config.json": to_json(stamped(as_dict(context.program.config))), **files}
    kind = ModelKind(stage.generates, stage.conversational, stage.policy_prefix)
    base = context.initial.base

    def save(step: int, state: TrainState, row: dict[str, float], finished: bool) -> None:
        metadata = {
            "run": folder.id,
            "model": kind._asdict(),
            "tokenizer": tokenizer.hash,
            "data": context.data.fingerprint,
            "clock": context.template.clock,
            "metrics": row if finished else None,
            "unfinished_row": None if finished else row,
            "best": None if early_stopping is None else asdict(early_stopping),
        }
        if base is not None:
            metadata["base"] = base_record(base)
        checkpoints.best_step = None if early_stopping is None else early_stopping.step
        checkpoints.save(step, context.program.saved(state), metadata | context.source.metadata(), files)

    return save


def make_early_stopping(config: TrainConfig, saved: dict[str, Any] | None) -> EarlyStopping | None:
    """What the config compares, and what a checkpoint has recorded of it."""
    if config.checkpoint.best_metric is None:
        return None
    early_stopping = EarlyStopping(
        config.checkpoint.best_metric,
        config.checkpoint.best_is == "highest",
        config.training.patience,
        config.training.target,
    )
    if saved is not None:
        early_stopping.value, early_stopping.step = saved["value"], saved["step"]
        early_stopping.waited = saved["waited"]
    return early_stopping


def describe_end(step: int, early_stopping: EarlyStopping | None) -> str:
    """How far the run came, and which step was best."""
    text = f"{step} steps"
    if early_stopping is not None and early_stopping.step is not None:
        stopped = early_stopping.should_stop and not early_stopping.target_reached
        text += ", stopped early" if stopped else ""
        text += f" (best {early_stopping.metric} {early_stopping.value:.4g} at step {early_stopping.step})"
    return text


@contextmanager
def saving(checkpoints: Checkpoints) -> Iterator[Checkpoints]:
    """However the block ends, the save in flight is on disk before the process continues."""
    try:
        yield checkpoints
    finally:
        checkpoints.wait()
