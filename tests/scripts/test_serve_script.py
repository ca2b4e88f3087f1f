"""experiments/serve.py as it is started: what it says, refuses in one line, and closes again."""

import re
import shutil
import signal
import subprocess
import sys

import pytest
from test_serve import ROOT, Client

from experiments import serve
from jaxllm.config import run_script
from jaxllm.errors import ConfigError


def test_it_says_where_it_is_serves_and_ends_on_ctrl_c(chat_model, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "experiments" / "serve.py"),
        f"--checkpoint={chat_model}",
        "--port=0",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        address = re.search(r"http://127\.0\.0\.1:(\d+)", lines[0])
        try:
            assert str(chat_model) in lines[1]
            assert str(tmp_path / "preferences.jsonl") in lines[2]
            assert Client(int(address[1]), None).chat(max_tokens=1)[0] == 200
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint=RUN_FOLDER is missing"),
        (["--host=0.0.0.0"], "lets others in, who must have a token: add --token=SECRET"),
        (["--token=short"], "--token has 5 characters, give at least 12"),
        (["--raters_per_pair=0"], "--raters_per_pair=0 must be at least 1"),
        (["--port=99999"], "--port=99999 must be from 0 to 65535"),
        (["--host=no.such.host.invalid", "--token=123456789012"], "--host=no.such.host.invalid"),
        (["--temperature=0", "--prompts=synthetic:problems"], "--temperature=0 gives the same answer twice"),
        (["--preferences=/no/such/folder/a.jsonl"], "there is no folder /no/such/folder"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint = ["--checkpoint=runs/none", "--port=0"] if flags else []
    code = run_script(serve.main, None, serve.define_flags, ["serve.py", *checkpoint, *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert (code, message in line) == (78, True), line


@pytest.fixture
def start(chat_model, monkeypatch, tmp_path, capsys):
    """(checkpoint, load) -> what a start with chat_model and another checkpoint says; `load` loads them."""

    def start(other, load):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(serve, "load_speaker", load)
        arguments = ["serve.py", f"--checkpoint={chat_model},{other}", "--port=0"]
        assert run_script(serve.main, None, serve.define_flags, arguments) > 0
        return capsys.readouterr().err

    return start


def test_a_checkpoint_that_is_not_there_is_named_before_any_is_loaded(start):
    loaded = []
    assert "runs/none does not exist" in start("runs/none", lambda *given: loaded.append(given))
    assert loaded == []


def test_an_engine_is_closed_where_the_next_checkpoint_cannot_be_loaded(start, chat_model, tmp_path):
    other, load, threads = shutil.copytree(chat_model, tmp_path / "other"), serve.load_speaker, []

    def load_one(name, *given):
        if name == str(other):
            raise ConfigError("cannot be loaded")
        speaker = load(name, *given)
        threads.append(speaker.engine._thread)
        return speaker

    assert "cannot be loaded" in start(other, load_one)
    assert not threads[0].is_alive(), "a process that ends while its threads compile aborts"


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert run_script(serve.main, None, serve.define_flags, ["serve.py", "--checkpoint=runs/x"]) == 78
    assert "pip install 'jaxllm[serve]'" in capsys.readouterr().err
