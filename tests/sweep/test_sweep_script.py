"""experiments/sweep.py: what its flags do, and one clear line for what cannot be."""

import dataclasses
import functools
import json
import re
import shlex
import shutil

import pytest
from sweeps import LOSS, RATE, write_config, write_script

from experiments import sweep as script
from jaxllm.config import as_dict, load_config, parse, run_script, with_fields
from jaxllm.errors import ConfigError
from jaxllm.launch import slurm
from jaxllm.pipeline.config import PipelineConfig
from jaxllm.sweep import local, record
from jaxllm.sweep import run as runs
from jaxllm.sweep.goal import Goal, find_goal

SWEEP = "def sweep(): return seeds(grid({'optimizer.learning_rate': [0.1, 0.2]}), 2)\n"
SEARCH = "def search(trial): return {'optimizer.learning_rate': trial.suggest_float('r', 0.1, 0.9)}\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(body of the config file, *flags) -> exit code, stdout, stderr; the workdir is tmp_path/runs."""
    monkeypatch.setattr(local, "POLL", 0.02)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "sweep.py"))  # beside which SCRIPT is train.py
    write_script(tmp_path)

    def run(body, *flags):
        config = body if body.endswith(".py") else write_config(tmp_path, body)
        argv = ["sweep.py", f"--config={config}", f"--workdir={tmp_path / 'runs'}", *flags]
        code = run_script(
            functools.partial(script.main, argv), script.config_class, script.define_flags, argv
        )
        return code, *capsys.readouterr()

    return run


def test_the_same_command_again_runs_nothing_twice(run, tmp_path):
    code, out, _ = run(SWEEP, "--config.evaluation.max_rows=7", "--metric=eval/loss")
    assert code == 0
    assert "[4/4] learning_rate_0.2-seed_1-" in out
    assert "finished  eval/loss 0.2 at step 20" in out
    sweep = record.read(tmp_path / "runs")
    assert (sweep.goal, sweep.base["evaluation"]["max_rows"]) == (LOSS, 7)
    assert [trial.overrides for trial in sweep.trials] == [
        {RATE: rate, "seed": seed} for rate in (0.1, 0.2) for seed in (0, 1)
    ]
    code, out, _ = run(SWEEP, "--config.evaluation.max_rows=7", "--metric=eval/loss")
    assert (code, out.splitlines()[0]) == (0, "4 of 4 trials are done")
    starts = list((tmp_path / "runs").glob("*/starts.jsonl"))
    assert [len(file.read_text().splitlines()) for file in starts] == [1] * 4

    code, out, _ = run(SWEEP, "--config.evaluation.max_rows=7", "--confirm=2")
    assert [trial.overrides for trial in record.read(tmp_path / "runs").trials if trial.confirms] == [
        {RATE: 0.1, "seed": 2},
        {RATE: 0.1, "seed": 3},
    ]


def test_dry_run_lists_the_trials_and_writes_nothing(run, tmp_path):
    code, out, err = run(
        "def sweep(): return [{'seed': 0}, {'seed': 1}, {'data.batch_size': 8}]\n", "--dry_run"
    )
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["waiting", "waiting", "2"]
    assert "left out: trial 3 (batch_size=8) has the config of seed_0-" in err
    assert not (tmp_path / "runs").exists()


def test_another_metric_is_one_that_trials_have_logged(run, tmp_path):
    assert run(SWEEP, "--metric=eval/loss")[0] == 0
    code, _, err = run(SWEEP, "--metric=eval/nope", "--goal=lowest")
    assert (code, record.read(tmp_path / "runs").goal) == (78, LOSS)
    assert "--metric=eval/nope: no finished trial has logged it, only eval/" in err


def test_a_folder_that_is_none_or_not_a_sweep_s_is_refused_by_a_dry_run_too(run, tmp_path):
    (tmp_path / "runs").write_text("")
    assert "is a file: name a folder" in run(SWEEP, "--dry_run")[2]
    (tmp_path / "runs").unlink()
    (tmp_path / "runs" / "checkpoints").mkdir(parents=True)
    assert "holds checkpoints and no sweep: choose another --workdir" in run(SWEEP, "--dry_run")[2]


def test_print_prints_commands_that_a_shell_understands(run, tmp_path):
    code, out, _ = run(SWEEP, "--launcher=print", "--init_from=runs/a b", "--config.wandb_project=x y")
    commands = [shlex.split(line) for line in out.splitlines()]
    assert code == 0
    assert len(commands) == 4
    assert all(command[0] == "python" and command[1].endswith("train.py") for command in commands)
    assert {"--init_from=runs/a b", "--config.wandb_project=x y", "--config.seed=1"} <= set(commands[1])
    assert {trial.status for trial in record.read(tmp_path / "runs").trials} == {"waiting"}


def test_a_run_that_finished_elsewhere_is_not_printed_again(run, tmp_path):
    _, out, _ = run(SWEEP, "--launcher=print")
    folder = tmp_path / "runs" / record.read(tmp_path / "runs").trials[0].name
    (folder / "checkpoints" / "100").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"training": {"steps": 100}}))
    _, again, _ = run(SWEEP, "--launcher=print")
    assert again.splitlines() == out.splitlines()[1:]
    for trial in record.read(tmp_path / "runs").trials[1:]:
        shutil.copytree(folder, tmp_path / "runs" / trial.name)
    assert run(SWEEP, "--launcher=print")[1:] == ("", "all 4 trials are done\n")


def test_slurm_gets_the_trials_that_are_neither_done_nor_queued(run, tmp_path, monkeypatch):
    submitted, queued = [], set()

    def submit(commands, folder, options):
        submitted.append((options, commands, folder))
        return "17"

    monkeypatch.setattr(slurm, "submit_array", submit)
    monkeypatch.setattr(runs, "queued_jobs", lambda: queued)
    assert run(SWEEP, "--launcher=slurm", "--slurm=mem=1G", "--slurm=time=1:00")[:2] == (
        0,
        "submitted 4 trials as job 17\n",
    )
    ((options, commands, folder),) = submitted
    sweep = record.read(tmp_path / "runs")
    assert (options.mem, options.time, folder) == ("1G", "1:00", sweep.folder / "logs")
    assert [
        any(trial.name in word for word in command)
        for trial, command in zip(sweep.trials, commands, strict=True)
    ]
    assert {trial.status for trial in sweep.trials} == {"submitted"}
    queued |= {"17_0", "17_1", "17_3"}
    assert run(SWEEP, "--launcher=slurm")[1] == (
        "submitted 1 trials as job 17\n3 trials are queued or running already\n"
    )
    assert sweep.trials[2].name in " ".join(submitted[1][1][0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--launcher=slurm", "--slurm=nodse=1"], "--slurm.nodse: unknown key, did you mean 'nodes'?"),
        (["--launcher=local", "--slurm=nodes=1"], "--slurm is for --launcher=slurm, not local"),
        (["--init_from=nowhere", "--dry_run"], "--init_from=nowhere does not exist"),
        (["--parallel=10000", "--dry_run"], "--parallel=10000 must be between 1 and"),
        (["--launcher=print", "--workdir=gs://b/runs"], "--workdir=gs://b/runs must be a local path"),
    ],
)
def test_what_cannot_be_launched_claims_no_folder(run, tmp_path, flags, message):
    code, _, err = run(SWEEP, *flags)
    assert code == 78
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_options_of_slurm_are_read_as_the_command_line_is():
    @dataclasses.dataclass(frozen=True)
    class SlurmOptions:
        nodes: int = 1
        mem: str | None = None
        setup: tuple[str, ...] = ()

    found = with_fields(SlurmOptions(), ["nodes=1e1", "mem=64G", "setup=a,b"], "--slurm")
    assert found == SlurmOptions(10, "64G", ("a", "b"))
    for given, message in {
        "node=1": "--slurm.node: unknown key, did you mean 'nodes'?",
        "nodes": "--slurm=nodes must be FIELD=VALUE",
        "nodes=x": "--slurm.nodes: must be an int, got 'x'",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            with_fields(found, [given], "--slurm")


def test_failed_trials_are_counted_and_are_the_exit_code(run, tmp_path):
    write_script(tmp_path, r0_1=[78])
    code, out, err = run(SWEEP)
    assert code == 1
    assert out.count("  failed") == 2
    assert "exit code 78: error: as planned" in out
    assert err == "error: 2 of 4 trials failed; the same command runs them again\n"


def test_a_search_and_a_sweep_do_not_mix_in_one_folder(run):
    pytest.importorskip("optuna", reason="needs the extra 'sweep'")
    assert run(SEARCH, "--trials=2", "--metric=eval/loss")[0] == 0
    assert "holds a search: add --trials=N, or choose another --workdir" in run(SWEEP)[2]
    error = run(SEARCH, "--trials=2", "--metric=eval/accuracy")[2]
    assert "holds a search for eval/loss, not eval/accuracy: choose another --workdir" in error
    assert run(SEARCH, "--trials=3")[0] == 0  # the goal is the one that it has
    assert run(SEARCH, "--confirm=1")[0] == 0


@pytest.mark.parametrize(
    ("body", "flags", "message"),
    [
        ("", (), "defines no sweep(); docs/how-to/sweep.md shows one"),
        (
            "def sweep(): return [{'optimizer.lr': 1}]\n",
            (),
            "sweep(): trial 1 (lr=1): config.optimizer.lr: unknown key",
        ),
        (
            "def sweep(): return [{'stage': 'sft'}]\n",
            (),
            "sweep(): trial 1 (stage=sft): the stage is that of the config file",
        ),
        (
            SWEEP,
            ("--config.optimizer.learning_rate=1",),
            "--config.optimizer.learning_rate: sweep() sets it too; remove one of the two",
        ),
        (
            SWEEP,
            ("--metric=eval/loss", "--goal=highest"),
            "--goal=highest: of eval/loss the lowest values are",
        ),
        (SWEEP, ("--parallel=0",), "--parallel=0 must be at least 1"),
        (SWEEP, ("--parallel=4096",), "--parallel=4096 must be between 1 and "),
        (SWEEP, ("--retries=-1",), "--retries=-1 must be at least 0"),
        (SWEEP, ("--launcher=ssh",), "flag --launcher=ssh"),
        (SWEEP, ("--metric=eval/x",), "--metric=eval/x: which values are better? add --goal=lowest"),
        (SWEEP, ("--metric=grpo:eval/x",), "only a pipeline has runs; leave out 'grpo':"),
        (SWEEP, ("--confirm=2",), "holds no sweep yet"),
        (SEARCH, ("--trials=2", "--launcher=slurm"), "--trials needs --launcher=local, not slurm"),
        (SEARCH, ("--trials=2", "--confirm=1"), "leave out --trials"),
        ("configs/smoke.py", ("--init_from=a",), "--init_from: a pipeline trains from random weights"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_sweep(run, tmp_path, body, flags, message):
    code, out, err = run(body, *flags)
    assert code == ConfigError.exit_code
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "runs" / "sweep.json").exists()


def test_a_pipeline_is_swept_by_a_metric_of_one_of_its_runs(run, tmp_path):
    body = "from configs.smoke import get_config\ndef sweep(): yield {'grpo.optimizer.learning_rate': 0.1}\n"
    code, out, _ = run(body, "--launcher=print")
    assert code == 0
    assert shlex.split(out)[1].endswith("pipeline.py")
    assert record.read(tmp_path / "runs").goal == Goal("grpo:eval/sampled_pass@1", highest=True)


def test_the_goal_is_that_of_the_stage():
    pipeline = as_dict(parse(PipelineConfig, load_config("configs/smoke.py")))
    assert find_goal(pipeline["pretrain"], None, None) == Goal("eval/bits_per_byte", highest=False)
    assert find_goal(pipeline["pretrain"], "eval/accuracy", None) == Goal("eval/accuracy", highest=True)
    assert find_goal(pipeline, "sft:eval/loss", None) == Goal("sft:eval/loss", highest=False)
    assert find_goal(pipeline, "sft:eval/x", "highest") == Goal("sft:eval/x", highest=True)
    with pytest.raises(ConfigError, match="the pipeline has no run 'data'"):
        find_goal(pipeline, "data:eval/loss", None)
