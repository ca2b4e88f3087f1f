"""A run that is killed or stopped, and resumed, ends bit for bit as an uninterrupted one."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from rl_runs import read_all
from tiny_runs import parse_config

from jaxllm.errors import ConfigError
from jaxllm.runs.train import train
from jaxllm.stages import find_stage
from jaxllm.training.loop import Progress
from jaxllm.training.step_folder import find_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 12
CONFIGS = {
    "pretrain": "pretrain_text.py",
    "sft": "sft_chat.py",
    "reward_model": "reward_model_pairs.py",
    "dpo": "dpo_pairs.py",
}
OVERRIDES = {
    "model.num_layers": 1,
    "optimizer.name": "adamw",
    "optimizer.warmup_steps": 2,
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.evaluate_every": 4,
    "training.sample_every": 6,
    "training.checkpoint_every": 3,
    "evaluation.max_rows": 8,
}
STAGE_OVERRIDES = {
    "pretrain": {"data.sequence_length": 32, "sample.sampling.max_new_tokens": 4},
    "sft": {"data.sequence_length": 64, "sample.sampling.max_new_tokens": 4, "sample.num_held_out": 4},
    "reward_model": {"data.sequence_length": 64, "data.batch_size": 8},
    "dpo": {"data.sequence_length": 64, "data.batch_size": 8},
}


def fields_of(stage, shared):
    """Config fields of a run on the rows in `shared`."""
    return OVERRIDES | STAGE_OVERRIDES[stage] | {"data.train": shared / f"{stage}.jsonl"}


def command(shared, workdir, cache_dir=None):
    """A pretraining run in a process of its own."""
    return [
        sys.executable,
        str(ROOT / "experiments" / "train.py"),
        f"--config={ROOT / 'configs' / CONFIGS['pretrain']}:tiny",
        f"--workdir={workdir}",
        f"--cache_dir={cache_dir or f'{workdir}-cache'}",
        *(f"--config.{field}={value}" for field, value in fields_of("pretrain", shared).items()),
    ]


def run_here(stage, shared, workdir, *, resume="auto", **changes):
    """A run in this process. Later stages are initialized from the uninterrupted pretraining run."""
    train(
        find_stage(stage),
        parse_config(f"{CONFIGS[stage]}:tiny", fields_of(stage, shared) | changes),
        workdir=str(workdir),
        resume=resume,
        init_from=None if stage == "pretrain" else str(shared / "whole"),
        command=[],
        devices=jax.devices()[:1],
    )


def start(arguments):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def run(arguments):
    with start(arguments) as process:
        output = process.stdout.read()
    return process.returncode, output


def interrupt(arguments, number, line):
    """Send a signal once a line of output has the text `line`. Returns exit code and output."""
    with start(arguments) as process:
        output = ""
        for text in process.stdout:
            output += text
            if line in text:
                process.send_signal(number)
                break
        output += process.stdout.read()
    return process.returncode, output


class Outcome(NamedTuple):
    step: str
    arrays: dict[str, bytes]
    rows: list[dict[str, float]]
    samples: dict[str, str]
    best: Any  # metadata of the best step, and its arrays


def outcome(workdir):
    """All that a run writes, without times."""
    folder = find_checkpoint(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: x for k, x in row.items() if not k.startswith("perf/")} for row in rows]
    samples = {path.name: path.read_text() for path in workdir.glob("samples/*")}
    best = json.loads((folder / "metadata.json").read_text())["best"]
    if best is not None and best["step"]:
        best = best, read_all(find_checkpoint(workdir / "best"))
    return Outcome(folder.name, read_all(folder), rows, samples, best)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with rows of random words for every stage."""
    folder, draw = tmp_path_factory.mktemp("runs"), random.Random(0)
    words = ["".join(draw.choices("aeiounrstlk", k=draw.randrange(2, 8))) for _ in range(300)]

    def text(shortest, longest):
        return " ".join(draw.choices(words, k=draw.randrange(shortest, longest))) + "."

    rows = {
        "pretrain": [{"text": text(5, 60)} for _ in range(300)],
        "sft": [{"prompt": text(1, 5), "completion": text(1, 5)} for _ in range(150)],
        "reward_model": [
            {"prompt": text(1, 4), "chosen": text(1, 5), "rejected": text(1, 5)} for _ in range(80)
        ],
    }
    rows["dpo"] = rows["reward_model"]
    for stage, records in rows.items():
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(shared):
    """The outcome of an uninterrupted pretraining run."""
    code, output = run(command(shared, shared / "whole"))
    assert code == 0, output
    return outcome(shared / "whole")


def test_a_run_writes_each_step_once_and_samples(uninterrupted):
    step, arrays, rows, samples, _ = uninterrupted
    assert step == str(STEPS)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval/bits_per_byte" in row] == [0, 4, 8, 12]
    assert set(samples) == {"0.txt", "6.txt", "12.txt"}
    assert {"step", "key", "params/embed/table"} <= arrays.keys()


@pytest.fixture(scope="module")
def stopped(shared, tmp_path_factory):
    """The folder of a run that was killed before its first checkpoint and after it, and then stopped; and
    what the last process printed."""
    workdir, draw = tmp_path_factory.mktemp("stopped") / "run", random.Random()
    for first in (1, 4):  # of three steps; just after the line of a step or of a save
        step = first + draw.randrange(3)
        # The process before has not printed these lines yet.
        line = draw.choice([f"step {step}/", f"step {step}/", f"saved step {first + 2}"])
        code, output = interrupt(command(shared, workdir), signal.SIGKILL, line)
        assert code == -signal.SIGKILL, output
    code, output = interrupt(command(shared, workdir), signal.SIGTERM, "step 8/")
    assert code == 75, output
    return workdir, output


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of the folder of the stopped run."""
    return shutil.copytree(stopped[0], tmp_path / "copy")


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(shared, uninterrupted, copy):
    newest = max((path for path in (copy / "checkpoints").iterdir()), key=lambda path: int(path.name))
    victim = max(
        (path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, output = run(command(shared, copy))
    assert code == 0, output
    assert f"{newest.name} is damaged" in output
    assert "resumed at step 6" in output
    assert outcome(copy) == uninterrupted


def test_resuming_with_another_seed_is_an_error_and_changes_no_file(shared, copy):
    before = sorted(path for path in copy.rglob("*"))
    with pytest.raises(ConfigError, match="seed 0 -> 1"):
        run_here("pretrain", shared, copy, seed=1)
    assert sorted(path for path in copy.rglob("*")) == before


def test_a_run_of_fewer_steps_than_are_done_has_nothing_to_do(shared, stopped, copy, capsys):
    step = int(re.search(r"saved at step (\d+)", stopped[1])[1])
    run_here("pretrain", shared, copy, **{"training.steps": step - 1})
    assert f"nothing to do: {step} steps are done" in capsys.readouterr().out


def test_a_killed_and_stopped_run_ends_as_an_uninterrupted_one_by_the_printed_command(stopped, uninterrupted):
    workdir, printed = stopped
    (line,) = [line for line in printed.splitlines() if "resume with: " in line]
    code, output = run([*shlex.split(line.partition("resume with: ")[2]), "--resume=must"])
    assert code == 0, output
    assert "resumed at step" in output
    assert outcome(workdir) == uninterrupted


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_each_stage_resumes_to_the_end_of_an_uninterrupted_run(
    stage, shared, uninterrupted, tmp_path, cache, monkeypatch, capsys
):
    whole, killed, show = tmp_path / "whole", tmp_path / "killed", Progress.show

    def copied(progress, step, row):
        """Keep the folder as a kill would leave it now."""
        show(progress, step, row)
        if step == 8:
            while not (whole / "checkpoints" / "6" / "manifest.json").exists():
                time.sleep(0.01)
            shutil.copytree(whole, killed)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", copied)
        run_here(stage, shared, whole)
    shutil.rmtree(cache)  # DPO computes the reference again, from the initial weights
    run_here(stage, shared, killed, resume="must")
    assert "resumed at step 6" in capsys.readouterr().out
    assert outcome(killed) == outcome(whole)


def test_a_run_on_an_object_store_is_killed_and_resumed_by_another_machine(tmp_path, shared, uninterrupted):
    store = tmp_path / "store"

    def on_store(cache):
        return command(shared, f"file://{store}", tmp_path / cache)

    code, output = interrupt(on_store("one"), signal.SIGKILL, "saved step 6")
    assert code == -signal.SIGKILL, output
    assert (store / "lock").exists()
    code, output = interrupt(on_store("two"), signal.SIGTERM, "step 8/")
    assert code == 75, output
    assert "was left behind: that process has ended" in output
    assert "resumed at step " in output
    code, output = run(on_store("one"))
    assert code == 0, output
    assert f"run folder: file://{store}" in output
    assert outcome(store) == uninterrupted
    assert not (store / "lock").exists()
