"""A run that is killed or stopped, and resumed, ends bit for bit as an uninterrupted one."""

import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rl_runs import read_all

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


def command(stage, shared, workdir, *more):
    """A run on the rows in `shared`. Later stages are initialized from the pretraining run there."""
    overrides = OVERRIDES | STAGE_OVERRIDES[stage] | {"data.train": shared / f"{stage}.jsonl"}
    return [
        sys.executable,
        str(ROOT / "experiments" / "train.py"),
        f"--config={ROOT / 'configs' / CONFIGS[stage]}:tiny",
        f"--workdir={workdir}",
        f"--cache_dir={cache_of(workdir)}",
        *([] if stage == "pretrain" else [f"--init_from={whole(shared, 'pretrain')}"]),
        *(f"--config.{field}={value}" for field, value in overrides.items()),
        *more,
    ]


def whole(shared, stage):
    """The folder of the uninterrupted run of this stage."""
    return shared / f"{stage}-whole"


def cache_of(workdir):
    """The data cache of the run in `workdir`."""
    return workdir.with_name(f"{workdir.name}-cache")


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
    """stage -> the outcome of an uninterrupted run."""

    @functools.cache
    def run_whole(stage):
        if stage != "pretrain":
            run_whole("pretrain")
        code, output = run(command(stage, shared, whole(shared, stage)))
        assert code == 0, output
        return outcome(whole(shared, stage))

    return run_whole


def test_a_run_writes_each_step_once_and_samples(uninterrupted):
    step, arrays, rows, samples, _ = uninterrupted("pretrain")
    assert step == str(STEPS)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval/bits_per_byte" in row] == [0, 4, 8, 12]
    assert set(samples) == {"0.txt", "6.txt", "12.txt"}
    assert {"step", "key", "params/embed/table"} <= arrays.keys()


@pytest.mark.parametrize(
    ("stage", "parts"),  # of three steps each, by the first, in which it is killed
    [("pretrain", (1, 4, 8)), ("sft", (7,)), ("reward_model", (7,)), ("dpo", (7,))],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, shared, uninterrupted, stage, parts):
    workdir, draw, expected = tmp_path / "killed", random.Random(), uninterrupted(stage)
    for first in parts:  # before, between and after checkpoints; just after the line of a step or of a save
        step = first + draw.randrange(3)
        # The part before has not printed these lines yet.
        line = draw.choice([f"step {step}/", f"step {step}/", f"saved step {(first + 2) // 3 * 3}"])
        code, output = interrupt(command(stage, shared, workdir), signal.SIGKILL, line)
        assert code == -signal.SIGKILL, output
    if stage == "dpo":  # computes the reference again, from the initial weights
        shutil.rmtree(cache_of(workdir))
    code, output = run(command(stage, shared, workdir, "--resume=must"))
    assert code == 0, output
    assert "resumed at step" in output
    assert outcome(workdir) == expected


def test_a_run_on_an_object_store_is_killed_and_resumed_by_another_machine(tmp_path, shared, uninterrupted):
    store = tmp_path / "store"

    def on_store(cache):
        arguments = command("pretrain", shared, store)
        named = {
            f"--workdir={store}": f"--workdir=file://{store}",
            f"--cache_dir={cache_of(store)}": f"--cache_dir={tmp_path / cache}",
        }
        return [named.get(each, each) for each in arguments]

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
    assert outcome(store) == uninterrupted("pretrain")
    assert not (store / "lock").exists()


def test_a_stopped_run_saves_exits_with_75_and_prints_the_command_that_resumes(
    tmp_path, shared, uninterrupted
):
    workdir = tmp_path / "stopped"
    code, output = interrupt(command("pretrain", shared, workdir), signal.SIGTERM, "step 5/")
    assert code == 75, output
    (line,) = [line for line in output.splitlines() if "resume with: " in line]
    code, output = run(shlex.split(line.partition("resume with: ")[2]))
    assert code == 0, output
    assert outcome(workdir) == uninterrupted("pretrain")


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, shared, uninterrupted):
    workdir = tmp_path / "damaged"
    code, output = interrupt(command("pretrain", shared, workdir), signal.SIGTERM, "step 8/")
    assert code == 75, output
    newest = max((path for path in (workdir / "checkpoints").iterdir()), key=lambda path: int(path.name))
    victim = max(
        (path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, output = run(command("pretrain", shared, workdir))
    assert code == 0, output
    assert f"{newest.name} is damaged" in output
    assert "resumed at step 6" in output
    assert outcome(workdir) == uninterrupted("pretrain")


def test_resuming_with_another_seed_is_an_error_and_changes_no_file(tmp_path, shared, uninterrupted):
    workdir = tmp_path / "foreign"
    code, stopped = interrupt(command("pretrain", shared, workdir), signal.SIGTERM, "step 5/")
    assert code == 75, stopped
    before = sorted(path for path in workdir.rglob("*"))
    code, output = run(command("pretrain", shared, workdir, "--config.seed=1"))
    assert code == 78, output
    assert "seed 0 -> 1" in output.splitlines()[-1]
    assert sorted(path for path in workdir.rglob("*")) == before
    step = int(re.search(r"saved at step (\d+)", stopped)[1])
    code, output = run(
        command("pretrain", shared, workdir, f"--config.training.steps={step - 1}")
    )  # the number of steps may differ
    assert code == 0, output
    assert f"nothing to do: {step} steps are done" in output
