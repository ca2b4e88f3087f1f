"""Helpers for the tests of all folders: configs, tiny runs trained once per session, processes of scripts.

`tests/conftest.py` loads it as a plugin.
"""

import importlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def parse_config(name, fields):
    """The config of one stage, from a file of configs/ such as "sft_chat.py:tiny", with these fields set."""
    from jaxllm.config import load_config, override, parse
    from jaxllm.stages import find_stage

    config = load_config(f"{ROOT / 'configs' / name}")
    Config = find_stage(config.stage).Config
    for field, value in fields.items():
        override(config, Config, field, str(value))
    return parse(Config, config)


def train_stage(name, workdir, init_from=None, **changes):
    """Train configs/NAME.py:tiny, made smaller, with these fields changed, on one device: programs for more
    take longer to compile."""
    import jax

    from jaxllm.runs.train import train
    from jaxllm.stages import find_stage

    fields = {
        "data.sequence_length": "64",
        "data.batch_size": "8",
        "data.validation_fraction": "0.3",
        "model.num_layers": "1",
        "model.width": "32",
        "model.max_length": "64",
        "training.steps": "30",
        "training.evaluate_every": "0",
        "training.sample_every": "0",
        "training.checkpoint_every": "30",
        "checkpoint.best_metric": "none",
        "optimizer.learning_rate": "0.02",
    }
    config = parse_config(f"{name}.py:tiny", fields | changes)
    train(
        find_stage(config.stage),
        config,
        workdir=str(workdir),
        init_from=init_from,
        command=[],
        devices=jax.devices()[:1],
    )


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A folder with chats.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [
        {"prompt": f"{a} and {b}?", "chosen": f"Yes, {a}.", "rejected": f"No, never {b}."}
        for a in NUMBERS
        for b in NUMBERS
    ]
    chats = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, records in (("pairs", pairs), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="session")
def chat_model(rows, tmp_path_factory):
    """The run folder of a model that generates: SFT on chats.jsonl."""
    workdir = tmp_path_factory.mktemp("models") / "chat"
    train_stage("sft_chat", workdir, **{"data.train": str(rows / "chats.jsonl")})
    return workdir


@pytest.fixture(scope="session")
def reward_model(rows, chat_model):
    """The run folder of a reward model, trained on pairs.jsonl."""
    workdir = chat_model.with_name("reward")
    fields = {"data.train": str(rows / "pairs.jsonl"), "training.evaluate_every": "30"}  # for its statistics
    train_stage("reward_model_pairs", workdir, str(chat_model), **fields)
    return workdir


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for what runs keep between them."""
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_process(tmp_path):
    """(script, *flags, stdin="") -> exit code, stdout and stderr of a process in an empty folder."""

    def run(script, *flags, stdin=""):
        done = subprocess.run(
            [sys.executable, str(ROOT / "experiments" / script), *flags],
            input=stdin if isinstance(stdin, bytes) else stdin.encode(),
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            timeout=120,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


@pytest.fixture
def one_device(monkeypatch):
    """A script in this process has one device: programs for more take longer to compile."""
    import jax

    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys, one_device):
    """As `run_process`, but in this process, which has imported all that a script needs."""
    from jaxllm.config import run_script

    def run(script, *flags, stdin=""):
        module = importlib.import_module(f"experiments.{Path(script).stem}")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = run_script(module.main, None, module.define_flags, [script, *flags])
        return code, *capsys.readouterr()

    return run


def start_processes(arguments, count, *, devices, positional=False):
    """Python processes of one run, each with so many CPU devices. `positional` appends their place as
    COORDINATOR COUNT INDEX instead of as flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    started = []
    for index in range(count):
        place = [coordinator, str(count), str(index)]
        names = ("coordinator", "num_processes", "process_id")
        if not positional:
            place = [f"--{name}={value}" for name, value in zip(names, place, strict=True)]
        process = subprocess.Popen(
            [sys.executable, *arguments, *place],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
    return started
