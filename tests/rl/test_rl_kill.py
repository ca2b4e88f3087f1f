"""An RL run that is killed while it samples, scores, updates or saves ends as an uninterrupted one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rl_runs import CONFIGS, FILES, arrays_of, make_config, make_policy, metadata_of, rows_of, run, settings

ROOT = Path(__file__).parents[2]
STEPS = 8  # two per iteration
ROUNDS = int(os.environ.get("JAXLLM_KILLS", "1"))  # runs to kill, each in all phases

# Runs the training script in a process that kills itself in a phase of an iteration, or while it saves.
PROGRAM = """
import os, runpy, signal, sys

phase, iteration, *sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.dirname(sys.argv[0])))

from jaxllm.rewards import scorer
from jaxllm.rl import rollouts
from jaxllm.runs.program import Program
from jaxllm.training import checkpoint

now = []  # the iterations so far


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def here(wanted):
    return phase == wanted and now and now[-1] == int(iteration)


def roll_out(self, state, iteration, check, whole=rollouts.RolloutSource.roll_out):
    now.append(iteration)
    return whole(self, state, iteration, check)


def collect(*args, on_done, whole=rollouts.collect, **options):
    return whole(*args, on_done=lambda *ended: die() if here("rollout") else on_done(*ended), **options)


def result(self, *args, whole=scorer.Scoring.result):
    return die() if here("reward") else whole(self, *args)


def compile(self, width, whole=Program.compile):
    step = whole(self, width)

    def train_step(state, batch):
        second = int(state.step) % 2
        state, metrics = step(state, batch)
        return die() if here("update") and second else (state, metrics)

    return train_step


def own_files(folder, whole=checkpoint.own_files):  # just before the manifest
    return die() if phase == "save" and folder.name == str(2 * int(iteration) + 2) else whole(folder)


rollouts.RolloutSource.roll_out, rollouts.collect, scorer.Scoring.result = roll_out, collect, result
Program.compile, checkpoint.own_files = compile, own_files
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, rewards, a policy that ends its completions and a reward model."""
    folder = tmp_path_factory.mktemp("kill")
    policy = make_policy(folder)
    reward_model = make_config("reward_model", data__train=folder / "reward_model.jsonl")
    run(reward_model, folder / "reward", init_from=policy)
    return folder


def command(folder, stage, workdir):
    """The training script and its arguments."""
    changes = {
        "data__train": folder / "prompts.jsonl",
        "training__steps": STEPS,
        "training__log_every": 2,
        "training__sample_every": 4,
        "training__checkpoint_every": 2,
        "sample__group_size": 2,
    }
    if stage == "ppo":
        changes |= {"reward__model": folder / "reward", "objective__kl_target": 0.05}
        changes |= {"objective__kl_horizon": 100.0, "objective__critic_warmup": 1}
    else:
        changes |= {"reward__functions": f"{folder}/mine.py:vowels", "objective__kl_coefficient": 0.1}
    return [
        str(ROOT / "experiments" / "train.py"),
        f"--config={CONFIGS / FILES[stage]}:tiny",
        f"--workdir={workdir}",
        f"--init_from={folder / 'policy'}",
        *(f"--config.{field}={value}" for field, value in settings(stage, **changes).items()),
    ]


def start(arguments):
    """Exit code and output of a Python process."""
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def outcome(workdir):
    """All that a run writes, without times."""
    timed = r'"(time|perf)/[^"]*": [^,}]*(, )?'
    written = {
        path.relative_to(workdir).as_posix(): re.sub(timed, "", path.read_text())
        for name in ("samples", "evals")
        for path in workdir.glob(f"{name}/*")
    }
    known = {name: x for name, x in metadata_of(workdir).items() if name not in ("run", "metrics")}
    return arrays_of(workdir), rows_of(workdir), written, known


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_run_killed_in_every_phase_ends_as_an_uninterrupted_one(folder, tmp_path, stage):
    code, output = start(command(folder, stage, tmp_path / "whole"))
    assert code == 0, output
    expected = outcome(tmp_path / "whole")
    assert expected[3]["prompts_consumed"] == STEPS // 2 * 4
    for number in range(ROUNDS):
        workdir = tmp_path / f"killed-{number}"
        arguments = command(folder, stage, workdir)
        for phase, iteration in (("rollout", 1), ("reward", 2), ("update", 2), ("save", 2)):
            code, output = start(["-c", PROGRAM, phase, str(iteration), *arguments])
            assert code == -signal.SIGKILL, output
            saved = max([0, *(int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json"))])
            assert saved in (2 * iteration - 2, 2 * iteration), output  # the last may be incomplete
        code, output = start(arguments)
        assert code == 0, output
        assert "resumed at step 4" in output
        assert outcome(workdir) == expected
