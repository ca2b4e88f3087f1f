"""All stages, from random weights to a reasoning model, and whether each of them reached its gate.

Every stage is a run of experiments/train.py in a folder of its own; `record` keeps what is done. The same
call again resumes where it was.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxllm.config import as_dict, as_flag, differences, load_config, parse
from jaxllm.errors import ConfigError, DataError, RunError, Stopped
from jaxllm.files import is_url
from jaxllm.pipeline.completions import HELD_OUT
from jaxllm.pipeline.config import PARENTS, PipelineConfig
from jaxllm.pipeline.held_out import write_held_out
from jaxllm.pipeline.record import Record, rewarded_by_model
from jaxllm.report import check_extra, write_report
from jaxllm.stages import build_program, find_stage
from jaxllm.store import url_of, working_path
from jaxllm.training.metrics import read_metrics
from jaxllm.training.workdir import held, stored_folder

SPEND_EVERY = 10.0  # seconds

# A killed pipeline cannot stop its stage; Linux does, as a SIGTERM would (1 is PR_SET_PDEATHSIG).
_DIE_TOO = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
END_WITH_PARENT = (sys.executable, "-c", _DIE_TOO) if sys.platform == "linux" else ()


class Scripts(NamedTuple):
    """The command lines that a pipeline runs: of a stage, of the synthesized set, of the gates."""

    train: Path
    synthesize: Path
    gates: Path


def run_pipeline(
    config: PipelineConfig,
    *,
    config_file: str,
    workdir: str,
    scripts: Scripts,
    process: int = 0,
    process_flags: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run what is left to run; 0 if all gates are passed.

    Args:
      config_file: as given to --config, FILE.py.
      process: number of this process where several run the stages together; `process_flags`: those of
        experiments/train.py that say so.
    """
    check_extra()  # now, and not after the last stage
    check_sources(config)
    if is_url(workdir) and process_flags:
        raise ConfigError(
            f"--workdir={workdir}: a pipeline of several processes needs a folder that all of them share"
        )
    if process > 0:
        return follow_pipeline(config, config_file, workdir, scripts, process, process_flags)
    with claimed(workdir) as folder:
        if not (folder / "pipeline.json").exists() and not (folder / HELD_OUT).exists():
            write_held_out(config, folder)
        keeps_apart = (folder / HELD_OUT).exists()  # a pipeline of an earlier version resumes as it began
        commands = stage_commands(config, config_file, workdir, scripts, keeps_apart, process_flags)
        record = Record(folder, config, config_file)
        for number, (name, command) in enumerate(commands.items(), 1):
            if record.is_done(name):
                continue
            title = f"[{number}/{len(commands)}] {name:13}"
            log = folder / "logs" / f"{name}.txt"
            spend = functools.partial(record.spend, name)
            report = functools.partial(show_progress, title, folder / name, config, record)
            seconds, memory = run_stage(command, log, report, spend, *record.spent(name))
            record.add(name, command, seconds, memory)
            outcome = f"{headline(config, folder, name)}{time_left(config, record)}"
            print(f"{title} {clock(seconds):>6}  {outcome}", flush=True)
            for warning in warnings(log):
                print(f"      {warning}", flush=True)
        return conclude(folder, record, must_pass=config.gates.must_pass)


def follow_pipeline(
    config: PipelineConfig,
    config_file: str,
    workdir: str,
    scripts: Scripts,
    process: int,
    process_flags: Mapping[str, str],
) -> int:
    """Run this process's part of every stage; the first process keeps the record and measures the gates."""
    folder = Path(workdir).expanduser().absolute()
    while not (folder / "pipeline.json").exists() and not (folder / HELD_OUT).exists():
        time.sleep(1.0)  # until the first process has begun
    keeps_apart = (folder / HELD_OUT).exists()
    commands = stage_commands(config, config_file, workdir, scripts, keeps_apart, process_flags)
    record = Record(folder, config, config_file)
    for name in PARENTS:
        if not record.is_done(name):
            log = folder / "logs" / f"{name}-{process}.txt"
            run_stage(commands[name], log, report=lambda: None, spend=lambda seconds, memory: None)
    return 0


def check_sources(config: PipelineConfig) -> None:
    """DataError for data that does not exist: now, and not after an hour of the stages before."""
    from jaxllm.data.sources import check_source

    named = {f"data.{field}": names for field, names in vars(config.data).items()}
    named |= {f"{name}.data.held_out": getattr(config, name).data.held_out or () for name in PARENTS}
    named["gates.prompts"] = config.gates.prompts
    if config.synthesize.rows:
        named["synthesize.instructions.seeds"] = config.synthesize.instructions.seeds
    for field, names in named.items():
        for name in names:
            try:
                check_source(name)
            except DataError as error:
                raise DataError(f"{field}: {error}") from None


def conclude(folder: Path, record: "Record", must_pass: bool) -> int:
    """Write the report and print which gates were passed; the exit code."""
    gates = json.loads((folder / "gates.json").read_text())
    marks = {True: "passed", False: "FAILED" if must_pass else "not reached", None: "not measured"}
    for gate in gates["gates"]:
        print(f"{marks[gate['passed']]:12}  {gate['name']:12} {gate['says']}")
    value = record.value
    print(f"{clock(value['seconds'])} in all, {value['peak_memory_bytes'] / 1e9:.1f} GB of memory at most")
    print(f"report: {url_of(write_report([folder], folder))}")
    return 0 if gates["passed"] or not must_pass else RunError.exit_code


def dry_run(config: PipelineConfig) -> None:
    """Compile the train step of every stage, and print what it takes."""
    from jaxllm.runs.process import set_up_process
    from jaxllm.runs.program import dry_run as compile_stage

    set_up_process()
    for name in PARENTS:
        section = getattr(config, name)
        print(f"{name}\n{compile_stage(build_program(section))}\n")


# Commands


def stage_commands(
    config: PipelineConfig,
    config_file: str,
    workdir: str,
    scripts: Scripts,
    keeps_apart: bool = True,
    process_flags: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, list[str]]:
    """The command of each stage, with what differs from the config file as flags.

    Args:
      keeps_apart: whether stages leave out the rows in WORKDIR/held_out.jsonl.
    """
    plain = as_dict(parse(PipelineConfig, load_config(config_file)))
    changed = differences(plain, as_dict(config))

    def command(script: Path, file: str, folder: str, section: str, **more: str) -> list[str]:
        flags = {"config": file, "workdir": folder} | more
        for path, _, value in changed:
            flag = f"config.{path.removeprefix(section)}"
            if path.startswith(section) and not (flag == "config.data.held_out" and flag in more):
                flags[flag] = as_flag(value)
        path = os.path.relpath(script)
        return [sys.executable, path, *(f"--{name}={value}" for name, value in flags.items())]

    commands = {}
    # In fields, whose values a run compares when it resumes.
    folder = working_path(workdir)
    for name, parent in PARENTS.items():
        more = {**process_flags} if parent is None else {**process_flags, "init_from": f"{workdir}/{parent}"}
        if rewarded_by_model(getattr(config, name)):
            more["config.reward.model"] = f"{url_of(folder)}/reward_model"
        if keeps_apart and name != "pretrain":
            file, own = f"{folder}/{HELD_OUT}", getattr(config, name).data.held_out or ()
            more["config.data.held_out"] = as_flag([*own, file]) if own or "," in file else file
        commands[name] = command(
            scripts.train, f"{config_file}:{name}", f"{workdir}/{name}", f"{name}.", **more
        )
    # On a store the pipeline holds the folder, and uploads what is written into its copy.
    local = str(folder) if is_url(workdir) else workdir
    if config.synthesize.rows:
        more = {"config.answers.model": f"{url_of(folder)}/sft"}
        if config.synthesize.judge.kind == "reward_model":
            more["config.judge.model"] = f"{url_of(folder)}/reward_model"
        if keeps_apart:
            more["config.filters.evaluation_sets"] = f"{folder}/{HELD_OUT}"
        file = f"{config_file}:synthesize"
        commands["synthesize"] = command(
            scripts.synthesize, file, f"{local}/synthesize", "synthesize.", **more
        )
    commands["gates"] = command(scripts.gates, config_file, local, "")
    return commands


def run_stage(
    command: Sequence[str],
    log: Path,
    report: Callable[[], None],
    spend: Callable[[float, int], None],
    seconds: float = 0.0,
    memory: int = 0,
) -> tuple[float, int]:
    """Run a command to its end, its output in `log`; the seconds and the peak bytes of memory it took.

    `seconds` and `memory` are those of earlier invocations, to which this one is added. `spend` is called
    with the sums so far: now and then, in case this process is killed, and at the end. SIGINT and SIGTERM are
    passed on, and the command saves its state.
    """
    log.parent.mkdir(exist_ok=True)
    began = saved = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*END_WITH_PARENT, *command], stdout=output, stderr=output, start_new_session=True
        )
        with passing_on(process) as passed:
            code = None
            while code is None:
                memory = max(memory, peak_memory(process.pid))
                report()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=1.0)
                if (now := time.perf_counter()) - saved > SPEND_EVERY or code is not None:
                    spend(seconds + now - began, memory)
                    saved = now
    if code == Stopped.exit_code or (passed and code == -signal.SIGTERM):  # before there was anything to save
        raise Stopped(f"resume with the same command: {shlex.join([sys.executable, *sys.argv])}")
    if code:
        last = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        raise StageFailed(f"{Path(command[1]).name} ended with exit code {code}: {last} (see {log})", code)
    return seconds + saved - began, memory


def peak_memory(pid: int) -> int:
    """The most bytes that a process has held so far; 0 where the system does not tell. (wait4 reports of a
    child at least its parent's size.)"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


class StageFailed(RunError):
    """A stage ended with an exit code, which is then the pipeline's."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else RunError.exit_code


@contextlib.contextmanager
def passing_on(process: subprocess.Popen) -> Iterator[list[int]]:
    """SIGINT and SIGTERM are passed on to the child. Yields those that have come."""
    passed: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        passed.append(number)
        process.send_signal(signal.SIGTERM)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, pass_on) for each in signals]
    try:
        yield passed
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


# The folder


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[Path]:
    """Lock the folder for this process. Yields its path, or that of its copy."""
    folder = working_path(workdir)
    if is_url(workdir):
        with stored_folder(workdir):
            yield folder
        return
    with held(folder, "another pipeline is running"):
        yield folder


# Progress


def show_progress(title: str, folder: Path, config: PipelineConfig, record: Record) -> None:
    """On a terminal, the step of the running stage."""
    if not sys.stdout.isatty():
        return
    row = last_row(folder)
    step = f"step {row['step']}" if "step" in row else "starting"
    print(f"{title} {step}{time_left(config, record)}", end="\033[K\r", flush=True)


def time_left(config: PipelineConfig, record: Record) -> str:
    """From the expected times of the stages, and the times of those that have finished."""
    expected = dataclasses.asdict(config.expected_seconds)
    if not all(expected.values()):
        return ""
    done = {stage["name"]: stage["seconds"] for stage in record.value["stages"]}
    if len(done) == len(expected):
        return ""
    pace = sum(done.values()) / sum(expected[name] for name in done) if done else 1.0
    left = pace * sum(expected[name] for name in expected if name not in done)
    return f"  about {max(1, round(left / 60))} min left"


def warnings(log: Path) -> list[str]:
    """What a stage warned of, each thing once. The built-in data is truncated on purpose."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("warning:")]
    return [line for line in dict.fromkeys(lines) if "synthetic:" not in line]


def headline(config: PipelineConfig, folder: Path, name: str) -> str:
    """The headline metric of a stage, if it has measured it; of a synthesized set, what is kept of it."""
    if name == "synthesize":
        report = json.loads((folder / name / "report.json").read_text())
        return f"{report['kept']} rows and {report['pairs']} pairs kept of {report['rows']} rows"
    if name not in PARENTS:
        return ""
    metric = find_stage(getattr(config, name).stage).headline.metric
    row = last_row(folder / name)
    return f"{metric} {row[metric]:.3f}" if metric in row else ""


def last_row(folder: Path) -> dict[str, float]:
    """Of the metrics of a run so far."""
    file = folder / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    return rows[-1] if rows else {}


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
