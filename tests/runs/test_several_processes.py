"""A run of two processes, stopped and resumed, has the numbers, samples and rows of a run of one."""

import json
import signal
import time

import numpy as np
import pytest
from rl_runs import CONFIGS, FILES, arrays_of, make_config, make_policy, rows_of, run, settings
from tiny_runs import ROOT, start_processes

CHANGES = {
    "mesh__data": 1,
    "mesh__fsdp": 2,
    "training__sample_every": 4,
    "sample__group_size": 2,
    "rollout__max_resamples": 1,
    "objective__kl_coefficient": 0.1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, a reward, and a policy that ends its completions."""
    folder = tmp_path_factory.mktemp("processes")
    make_policy(folder)
    suites = {
        "mc": [{"prompt": f"{i}?", "choices": ["aa", "no", "yes"], "answer": i} for i in range(3)],
        "qa": [{"prompt": f"{i}?", "answer": "no"} for i in range(3)],
    }
    for name, rows in suites.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def changes(folder):
    rewards = f"{folder}/mine.py:vowels"
    return {
        **CHANGES,
        "data__train": folder / "prompts.jsonl",
        "reward__functions": rewards,
        "evaluation__suites": f"{folder}/mc.jsonl,{folder}/qa.jsonl",
        "evaluation__max_new_tokens": 4,
    }


def start(folder, workdir):
    """Two processes of one device each."""
    fields = settings("grpo", **changes(folder))
    arguments = [
        str(ROOT / "experiments" / "train.py"),
        f"--config={CONFIGS / FILES['grpo']}:tiny",
        f"--workdir={workdir}",
        f"--init_from={folder / 'policy'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    return start_processes(arguments, 2, devices=1)


def end(started):
    """Exit codes and outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], outputs


def files(workdir, *names):
    return {
        path.relative_to(workdir): path.read_text() for name in names for path in workdir.glob(f"{name}/*")
    }


def test_two_processes_stopped_and_resumed_equal_one(folder, tmp_path):
    one = run(
        make_config("grpo", **changes(folder)), tmp_path / "one", init_from=folder / "policy", devices=2
    )
    two = tmp_path / "two"

    started = start(folder, two)
    while not (two / "metrics.jsonl").exists() and started[0].poll() is None:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)  # to one of them
    codes, outputs = end(started)
    assert codes == [75, 75], outputs
    assert "all processes save and stop after the same step" in outputs[0]
    assert "devices as PROCESS.DEVICE: data x fsdp x sequence x tensor = [[[[0.0]] [[1.0]]]]" in outputs[0]
    assert "\nstep " not in outputs[1]  # what it prints is in a file of its own
    codes, outputs = end(start(folder, two))
    assert codes == [0, 0], outputs
    assert "resumed at step" in outputs[0]
    assert "done: 8 steps" in (two / "logs" / "process-1.txt").read_text()

    expected, found = rows_of(one), rows_of(two)
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        assert found[step].keys() == row.keys()
        for name, value in row.items():
            np.testing.assert_allclose(
                found[step][name], value, rtol=1e-4, atol=1e-5, err_msg=f"{step} {name}"
            )
    assert {"eval/suite/mc/accuracy", "eval/suite/qa/exact_match_se"} <= expected[4].keys()
    assert files(two, "samples", "evals", "suites/qa") == files(one, "samples", "evals", "suites/qa")
    weights = arrays_of(one, "params/")
    for name, content in arrays_of(two, "params/").items():
        ours, theirs = (np.frombuffer(each, np.float32) for each in (content, weights[name]))
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)
