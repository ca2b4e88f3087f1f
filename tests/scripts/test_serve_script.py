"""experiments/serve.py as it is started: its output, its one-line errors, and what it closes again."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import serve as script
from jaxllm.config import run_script
from jaxllm.errors import ConfigError, RunError
from jaxllm.serve import server

ROOT = Path(__file__).parents[2]


def test_it_prints_what_it_serves_and_stops_on_ctrl_c(chat_model, tmp_path):
    path, pipe = str(ROOT / "experiments" / "serve.py"), subprocess.PIPE
    command = [sys.executable, path, f"--checkpoint={chat_model}", "--port=0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        memory, *lines = [process.stdout.readline() for _ in range(4)]
        assert memory.startswith("memory for 16 rows of up to 64 tokens: 0.00 GB params, 0.00 GB cache")
        address = re.search(r"http://127\.0\.0\.1:\d+", lines[0])
        try:
            assert lines[1].startswith(f"model chat: {chat_model}")
            assert str(tmp_path / "preferences.jsonl") in lines[2]
            body = {"model": "chat", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 1}
            with urllib.request.urlopen(
                f"{address[0]}/v1/chat/completions", json.dumps(body).encode(), timeout=60
            ) as response:
                assert json.load(response)["model"] == "chat"
            with urllib.request.urlopen(address[0], timeout=60) as page:
                assert b'<script type="module" src="page.js">' in page.read()
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint=RUN_FOLDER is missing"),
        (["--host=0.0.0.0"], "opens the server to other machines and requires a token; put one, such as"),
        (["--token=short"], "the token has 5 characters; use at least 12"),
        (["--token=123456789012", "--token_file=a"], "--token and --token_file are both given"),
        (["--token_file=/no/such"], "--token_file=/no/such: No such file or directory"),
        (["--token_file=/dev/null"], "--token_file=/dev/null is empty"),
        (["--raters_per_pair=0"], "--raters_per_pair=0 must be at least 1"),
        (["--port=99999"], "--port=99999 must be from 0 to 65535"),
        (["--host=no.such.host.invalid", "--token=123456789012"], "--host=no.such.host.invalid"),
        (["--temperature=0", "--prompts=synthetic:problems"], "--temperature=0 generates the same answer"),
        (["--preferences=/no/such/folder/a.jsonl"], "the folder /no/such/folder does not exist"),
        (["--checkpoint=runs/none,runs/none"], "--checkpoint names runs/none twice"),
        (["--checkpoint=a=runs/x,a=runs/y"], "--checkpoint uses the name 'a' twice"),
    ],
)
def test_bad_flags_are_errors_of_one_line(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint = ["--checkpoint=runs/none", "--port=0"] if flags else []
    code = run_script(script.main, None, script.define_flags, ["serve.py", *checkpoint, *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert (code, message in line) == (78, True), line


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("from the file\n")
    monkeypatch.delenv(server.TOKEN_VARIABLE, raising=False)
    assert server.read_token(None, None) is None
    assert server.read_token(None, str(file)) == "from the file"
    monkeypatch.setenv(server.TOKEN_VARIABLE, "from the environment")
    assert server.read_token(None, None) == "from the environment"
    assert server.read_token(None, str(file)) == "from the file"
    assert server.read_token("from the flag", None) == "from the flag"


@pytest.fixture
def signals():
    """Puts back the handler of SIGTERM, which running the server sets."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("signals")
def test_an_engine_that_fails_ends_the_process_with_an_error():
    engine = SimpleNamespace(error=None)

    async def app(scope, receive, send): ...

    threading.Timer(0.3, lambda: setattr(engine, "error", "XlaRuntimeError: out of memory")).start()
    with server.bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(RunError, match="model chat has stopped: XlaRuntimeError: out of memory") as error:
            server.run_server(app, bound, {"chat": SimpleNamespace(engine=engine)})
    assert error.value.exit_code == 1


@pytest.fixture
def start(chat_model, monkeypatch, tmp_path, capsys):
    """(checkpoint, load) -> stderr of a failing start with chat_model and another checkpoint.

    `load` takes the place of load_model.
    """

    def start(other, load):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(server, "load_model", load)
        arguments = ["serve.py", f"--checkpoint={chat_model},{other}", "--port=0"]
        assert run_script(script.main, None, script.define_flags, arguments) > 0
        return capsys.readouterr().err

    return start


def test_a_missing_checkpoint_is_an_error_before_any_is_loaded(start):
    loaded = []
    assert "runs/none does not exist" in start("runs/none", lambda *given: loaded.append(given))
    assert loaded == []


def test_an_engine_is_closed_where_the_next_checkpoint_cannot_be_loaded(start, chat_model, tmp_path):
    other, load, threads = shutil.copytree(chat_model, tmp_path / "other"), server.load_model, []

    def load_one(name, *given, **options):
        if name == "other":
            raise ConfigError("cannot be loaded")
        model = load(name, *given, **options)
        threads.append(model.engine._thread)
        return model

    assert "cannot be loaded" in start(other, load_one)
    assert not threads[0].is_alive(), "a process that exits while its threads compile aborts"


def test_a_reward_model_cannot_be_served(chat_model, reward_model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["serve.py", f"--checkpoint={reward_model}", "--port=0"]
    assert run_script(script.main, None, script.define_flags, arguments) == 78
    assert "is a reward model and cannot generate" in capsys.readouterr().err


def test_a_missing_extra_is_an_error_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jaxllm.serve.server")
    assert run_script(script.main, None, script.define_flags, ["serve.py", "--checkpoint=runs/x"]) == 78
    assert "pip install 'jaxllm[serve]'" in capsys.readouterr().err
