"""Signals and hangs, in processes of their own."""

import contextlib
import signal
import subprocess
import sys

SCRIPT = """
import sys, time
from pathlib import Path
from jaxllm.training.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), hang_timeout=float(sys.argv[2])) as watchdog:
    watchdog.beat()
    print("ready", flush=True)
    {body}
"""


@contextlib.contextmanager
def started(folder, body, hang_timeout=60.0):
    command = [sys.executable, "-c", SCRIPT.format(body=body), str(folder), str(hang_timeout)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def test_a_hang_writes_all_stacks_and_exits_71(tmp_path):
    body = "def stuck_here(): time.sleep(60)\n    stuck_here()"
    with started(tmp_path, body, hang_timeout=0.2) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 71
    assert "training.hang_timeout" in errors
    assert "stuck_here" in (tmp_path / "logs" / "hang.txt").read_text()


def test_beats_checks_and_pauses_are_not_a_hang(tmp_path):
    body = "\n    ".join(
        [
            "for _ in range(20): time.sleep(0.05); watchdog.check()",
            "with watchdog.paused(): time.sleep(1)",
            "watchdog.beat()",
        ]
    )
    with started(tmp_path, body, hang_timeout=0.5) as process:
        assert process.wait(timeout=30) == 0


def test_the_first_signal_requests_a_stop_and_the_second_ends_at_once(tmp_path):
    body = "\n    ".join(
        [
            "while not watchdog.requested: time.sleep(0.01)",
            "print('requested', flush=True)",
            "time.sleep(60)",
        ]
    )
    with started(tmp_path, body) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "requested\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_hang_timeout_of_0_is_never(tmp_path):
    with started(tmp_path, "time.sleep(0.3)", hang_timeout=0) as process:
        assert process.wait(timeout=30) == 0


def test_a_hang_whose_stacks_cannot_be_written_exits_71_too(tmp_path):
    (tmp_path / "logs").touch()
    body = "def stuck_here(): time.sleep(60)\n    stuck_here()"
    with started(tmp_path, body, hang_timeout=0.2) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 71
    assert "stuck_here" in errors
