"""A run that is killed, stopped and resumed ends bit for bit like one that was left alone."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
STEPS = 12
OVERRIDES = {
    "model.num_layers": 1,
    "data.sequence_length": 32,
    "optimizer.name": "adamw",
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.evaluate_every": 4,
    "training.sample_every": 6,
    "training.checkpoint_every": 3,
    "evaluation.max_rows": 8,
    "sample.sampling.max_new_tokens": 4,
    "optimizer.warmup_steps": 2,
}


def command(workdir, cache, *more):
    overrides = [f"--config.{field}={value}" for field, value in OVERRIDES.items()]
    return [
        sys.executable,
        str(ROOT / "experiments" / "train.py"),
        f"--config={ROOT / 'configs' / 'pretrain_text.py'}:tiny",
        f"--workdir={workdir}",
        f"--config.data.cache_dir={cache}",
        f"--config.data.train={cache / 'text.jsonl'}",
        *overrides,
        *more,
    ]


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
    """Send a signal when a line of output holds this text; exit code and output."""
    with start(arguments) as process:
        output = ""
        for text in process.stdout:
            output += text
            if line in text:
                process.send_signal(number)
                break
        output += process.stdout.read()
    return process.returncode, output


def outcome(workdir):
    """All that a run leaves behind that does not measure time."""
    from jaxllm.training.checkpoint import find_checkpoint

    folder = find_checkpoint(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: x for k, x in row.items() if not k.startswith("perf/")} for row in rows]
    samples = {path.name: path.read_text() for path in (workdir / "samples").iterdir()}
    return folder.name, read_all(folder), rows, samples


def read_all(folder):
    """Every array of a checkpoint as bytes, whatever its meaning."""
    import jax
    import jax.numpy as jnp

    from jaxllm.training.checkpoint import read_arrays

    abstract = {}
    for name, text in json.loads((folder / "arrays.json").read_text()).items():
        dtype, _, shape = text.rstrip("]").partition("[")
        dtype = jax.random.key(0).dtype if dtype.startswith("key<") else jnp.dtype(dtype)
        abstract[name] = jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], dtype)
    arrays = read_arrays(folder, abstract)
    return {
        name: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()
        for name, x in arrays.items()
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for tokenised text, with some text in it."""
    folder, draw = tmp_path_factory.mktemp("cache"), random.Random(0)
    words = ["".join(draw.choices("aeiounrstlk", k=draw.randrange(2, 8))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(5, 60))) + "." for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, output = run(command(workdir, cache))
    assert code == 0, output
    return outcome(workdir)


def test_a_run_leaves_each_step_once_and_samples(uninterrupted):
    step, arrays, rows, samples = uninterrupted
    assert step == str(STEPS)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval/bits_per_byte" in row] == [0, 4, 8, 12]
    assert set(samples) == {"0.txt", "6.txt", "12.txt"}
    assert {"step", "key", "params/embed/table"} <= arrays.keys()


def test_killed_three_times_it_ends_the_same(tmp_path, cache, uninterrupted):
    workdir, draw = tmp_path / "killed", random.Random()
    for first in (1, 5, 9):  # before, between and after checkpoints; just after a step's line, or a save's
        step = first + draw.randrange(3)
        line = draw.choice([f"step {step}/", f"step {step}/", f"saved step {-(-step // 3) * 3}"])
        code, output = interrupt(command(workdir, cache), signal.SIGKILL, line)
        assert code == -signal.SIGKILL, output
    code, output = run(command(workdir, cache, "--resume=must"))
    assert code == 0, output
    assert "resumed at step" in output
    assert outcome(workdir) == uninterrupted


def test_asked_to_stop_it_saves_exits_75_and_the_printed_command_resumes(tmp_path, cache, uninterrupted):
    workdir = tmp_path / "stopped"
    code, output = interrupt(command(workdir, cache), signal.SIGTERM, "step 5/")
    assert code == 75, output
    (line,) = [line for line in output.splitlines() if "resume with: " in line]
    code, output = run(shlex.split(line.partition("resume with: ")[2]))
    assert code == 0, output
    assert outcome(workdir) == uninterrupted


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, cache, uninterrupted):
    workdir = tmp_path / "damaged"
    code, output = interrupt(command(workdir, cache), signal.SIGTERM, "step 8/")
    assert code == 75, output
    newest = max((path for path in (workdir / "checkpoints").iterdir()), key=lambda path: int(path.name))
    victim = max(
        (path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, output = run(command(workdir, cache))
    assert code == 0, output
    assert f"{newest.name} is damaged" in output
    assert "resumed at step 6" in output
    assert outcome(workdir) == uninterrupted


def test_another_seed_or_other_data_is_refused_and_nothing_is_lost(tmp_path, cache, uninterrupted):
    workdir = tmp_path / "foreign"
    code, stopped = interrupt(command(workdir, cache), signal.SIGTERM, "step 5/")
    assert code == 75, stopped
    before = sorted(path for path in workdir.rglob("*"))
    code, output = run(command(workdir, cache, "--config.seed=1"))
    assert code == 78, output
    assert "seed 0 -> 1" in output.splitlines()[-1]
    assert sorted(path for path in workdir.rglob("*")) == before
    step = int(re.search(r"saved at step (\d+)", stopped)[1])
    code, output = run(command(workdir, cache, f"--config.training.steps={step - 1}"))  # steps may differ
    assert code == 0, output
    assert f"nothing to do: {step} steps are done" in output
