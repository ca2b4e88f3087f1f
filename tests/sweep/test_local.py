"""Trials as processes: in parallel, pinned, retried, stopped and continued."""

import json
import os
import re
import signal
import subprocess
import threading
import time

import pytest
from sweeps import LOSS, RATE, make_base, make_sweep, starts

from jaxllm.errors import ConfigError, RunError, Stopped
from jaxllm.files import locked
from jaxllm.sweep import local, record
from jaxllm.sweep.groups import confirming_trials, groups
from jaxllm.sweep.machine import Machine, Share, find_machine, split

ANYWHERE = Share((), {})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(local, "POLL", 0.02)


def run(sweep, base, *, shares=(ANYWHERE,), retries=2, **options):
    """Run what is not done; the statuses by learning rate."""
    left = [trial for trial in sweep.trials if not trial.is_done]
    local.run_trials(
        sweep,
        iter(left),
        lambda trial: base.command(trial, str(sweep.folder)),
        shares,
        retries=retries,
        report=lambda trial: None,
        **options,
    )
    return {trial.overrides[RATE]: trial.status for trial in sweep.trials}


def test_each_trial_runs_once_and_sweep_json_says_how_it_ended(tmp_path):
    base = make_base(tmp_path)
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.3}])
    assert run(sweep, base, shares=(ANYWHERE, ANYWHERE)) == dict.fromkeys((0.1, 0.2, 0.3), "finished")
    found = record.read(sweep.folder)
    assert [(each.status, each.value, each.error, each.step) for each in found.trials] == [
        ("finished", 0.1, 0.01, 20),
        ("finished", 0.2, 0.01, 20),
        ("finished", 0.3, 0.01, 20),
    ]
    assert all(len(starts(sweep, trial)) == 1 and trial.seconds > 0 for trial in sweep.trials)


@pytest.mark.parametrize(
    ("plan", "status", "count"),
    [
        ([1, 1, 0], "finished", 3),  # crashes
        ([1], "failed", 3),
        ([75, 75, 75, 75, 0], "finished", 5),  # stopped by a signal from elsewhere: resumes
        ([78], "failed", 1),  # a config error would only repeat itself
        ([70], "diverged", 1),
    ],
)
def test_what_follows_from_an_exit_code(tmp_path, plan, status, count):
    base = make_base(tmp_path, r0_1=plan)
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])
    assert run(sweep, base) == {0.1: status}
    (trial,) = sweep.trials
    assert len(starts(sweep, trial)) == count
    assert trial.exit_code == plan[-1]
    assert trial.message == ("" if status == "finished" else "error: as planned")


def test_the_same_command_again_runs_failed_trials_and_no_others(tmp_path):
    base = make_base(tmp_path, r0_1=[1, 0])
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}, {RATE: 0.2}])
    assert run(sweep, base, retries=0) == {0.1: "failed", 0.2: "finished"}
    sweep = record.open_sweep(make_sweep(sweep.folder, base, [{RATE: 0.1}, {RATE: 0.2}]), resume=True)
    assert run(sweep, base, retries=0) == {0.1: "finished", 0.2: "finished"}
    assert [len(starts(sweep, trial)) for trial in sweep.trials] == [2, 1]


def test_a_signal_stops_the_trials_so_that_they_save_and_the_same_command_continues(tmp_path):
    base = make_base(tmp_path, r0_1=[None, 0], r0_2=[None, 0])
    trials = [{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.3}]
    sweep = make_sweep(tmp_path / "runs", base, trials)

    def interrupt():
        files = [sweep.folder / trial.name / "metrics.jsonl" for trial in sweep.trials[:2]]
        while not all(file.exists() and len(file.read_text().splitlines()) == 3 for file in files):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped, match="the same command again continues"):
        run(sweep, base, shares=(ANYWHERE, ANYWHERE))
    assert [trial.status for trial in record.read(sweep.folder).trials] == ["stopped", "stopped", "waiting"]
    sweep = record.open_sweep(make_sweep(sweep.folder, base, trials), resume=True)
    assert set(run(sweep, base).values()) == {"finished"}


def test_an_error_while_trials_run_leaves_no_process_behind(tmp_path):
    base = make_base(tmp_path, r0_1=[None])
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])
    processes = []

    def fail(trial):
        processes.append(trial)
        if (sweep.folder / trial.name / "starts.jsonl").exists():
            raise ConfigError("no")
        return False

    began = time.monotonic()
    with pytest.raises(ConfigError):
        run(sweep, base, should_prune=fail)
    assert time.monotonic() - began < 30  # the script would sleep for 60 s


def test_a_pruned_trial_is_stopped_and_not_run_again(tmp_path):
    base = make_base(tmp_path, r0_1=[None])
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])

    def should_prune(trial):
        return len(record.evaluations(sweep.folder / trial.name, LOSS)) == 3

    assert run(sweep, base, should_prune=should_prune) == {0.1: "pruned"}
    assert sweep.trials[0].is_done


def test_a_run_whose_sweep_was_killed_is_waited_for(tmp_path):
    base = make_base(tmp_path)
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])
    folder = sweep.folder / sweep.trials[0].name
    folder.mkdir()
    lock = locked(folder / "lock")
    threading.Timer(0.3, lock.close).start()
    began = time.monotonic()
    assert run(sweep, base) == {0.1: "finished"}
    assert time.monotonic() - began > 0.3


# Shares of the machine


def test_trials_are_pinned_to_their_cores(tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not pin processes")
    core = min(os.sched_getaffinity(0))
    base = make_base(tmp_path)
    sweep = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])
    run(sweep, base, shares=(Share((core,), {}),))
    assert starts(sweep, sweep.trials[0]) == [{"cores": [core]}]


@pytest.mark.parametrize(
    ("machine", "parallel", "shares"),
    [
        (Machine("cpu", (), (0, 1, 4, 5, 6)), 2, [((0, 1), {}), ((4, 5), {})]),
        (Machine("cpu", (), (0, 1)), 1, [((0, 1), {})]),
        (
            Machine("gpu", ("2", "5"), (0, 1)),
            2,
            [((0,), {"CUDA_VISIBLE_DEVICES": "2"}), ((1,), {"CUDA_VISIBLE_DEVICES": "5"})],
        ),
        (
            Machine("rocm", ("0", "1", "2", "3"), ()),
            2,
            [((), {"ROCR_VISIBLE_DEVICES": "0,1"}), ((), {"ROCR_VISIBLE_DEVICES": "2,3"})],
        ),
        (Machine("gpu", ("0",), (0,)), 1, [((0,), {})]),
    ],
)
def test_shares_are_equal_and_disjoint(machine, parallel, shares):
    assert split(machine, parallel) == [Share(*each) for each in shares]


def test_tpu_chips_are_given_with_the_grid_that_they_form():
    first, second = split(Machine("tpu", ("0", "1", "2", "3"), ()), 2)
    assert first.environment == {
        "TPU_VISIBLE_CHIPS": "0,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
    assert second.environment["TPU_VISIBLE_CHIPS"] == "2,3"


@pytest.mark.parametrize(
    ("machine", "parallel", "message"),
    [
        (Machine("cpu", (), (0, 1)), 3, "--parallel=3 must be between 1 and 2, the cores of this machine"),
        (Machine("cpu", (), (0, 1)), 0, "--parallel=0 must be between 1 and 2"),
        (Machine("gpu", ("0",), (0, 1)), 2, "--parallel=2 must be between 1 and 1, the gpu devices"),
        (Machine("tpu", tuple("012345"), ()), 2, "a trial cannot have 3 TPU chips, only 1, 2, 4 or 8"),
    ],
)
def test_what_cannot_be_shared(machine, parallel, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        split(machine, parallel)


@pytest.mark.parametrize(
    ("seen", "visible", "machine"),
    [
        ("gpu 2", {}, ("gpu", ("0", "1"))),
        ("gpu 2", {"CUDA_VISIBLE_DEVICES": "3,GPU-5a"}, ("gpu", ("3", "GPU-5a"))),
        ("rocm 1", {"ROCR_VISIBLE_DEVICES": "2"}, ("rocm", ("2",))),
        ("tpu 4", {}, ("tpu", ("0", "1", "2", "3"))),
        ("cpu 1", {"CUDA_VISIBLE_DEVICES": "3"}, ("cpu", ())),
    ],
)
def test_devices_are_those_that_jax_sees_by_the_names_of_their_variable(monkeypatch, seen, visible, machine):
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in visible.items():
        monkeypatch.setenv(name, value)
    done = subprocess.CompletedProcess([], 0, f"a warning\n{seen}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert find_machine()[:2] == machine


def test_a_machine_without_a_device_is_one_line(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no GPU\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RunError, match=r"JAX finds no device: RuntimeError: no GPU$"):
        find_machine()


# The folder, and the best of it


def test_a_folder_with_another_sweep_is_not_touched(tmp_path):
    base = make_base(tmp_path)
    first = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])
    first.save()
    second = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}])
    with pytest.raises(ConfigError, match="leave out --noresume to continue it"):
        record.open_sweep(second, resume=False)
    second.base = json.loads(json.dumps(second.base))
    second.base["training"]["steps"] = 7
    with pytest.raises(
        ConfigError, match=r"another config: training.steps 100 -> 7; choose another --workdir"
    ):
        record.open_sweep(second, resume=True)
    second.config_file = "other.py"
    with pytest.raises(ConfigError, match=r"holds a sweep of .*config.py, not of other.py"):
        record.open_sweep(second, resume=True)


def test_trials_may_be_added_and_those_that_were_started_are_kept(tmp_path):
    base = make_base(tmp_path)
    first = make_sweep(tmp_path / "runs", base, [{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.3}])
    first.trials[0].status = first.trials[1].status = "finished"
    first.save()
    again = record.open_sweep(make_sweep(tmp_path / "runs", base, [{RATE: 0.2}, {RATE: 0.4}]), resume=True)
    found = [(trial.overrides[RATE], trial.status) for trial in again.trials]
    assert found == [(0.2, "finished"), (0.4, "waiting"), (0.1, "finished")]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 1, "trials": [{"a": 1}]}'])
def test_a_damaged_sweep_json_is_one_line(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep.json cannot be read"):
        record.read(tmp_path)


def test_a_folder_of_something_else_is_not_claimed(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with (
        pytest.raises(ConfigError, match=r"holds run.json and no sweep: choose another"),
        record.claimed(tmp_path),
    ):
        pass
    with (
        record.claimed(tmp_path / "new"),
        pytest.raises(ConfigError, match="another sweep is running there"),
        record.claimed(tmp_path / "new"),
    ):
        pass


def finished(sweep, values):
    """The trials as if they had ended with these values; None: diverged."""
    for trial, value in zip(sweep.trials, values, strict=True):
        trial.status, trial.value = ("diverged", None) if value is None else ("finished", value)
    return sweep


def test_the_best_config_has_the_best_mean_and_no_diverged_seed(tmp_path):
    base = make_base(tmp_path)
    overrides = [{RATE: rate, "seed": seed} for rate in (0.1, 0.2, 0.3) for seed in (4, 5)]
    sweep = finished(make_sweep(tmp_path / "runs", base, overrides), [3.0, 3.0, 1.0, 4.0, 0.1, None])
    assert [group.settings[RATE] for group in groups(sweep)] == [0.2, 0.1, 0.3]
    sweep.goal = sweep.goal._replace(highest=True)
    assert [group.settings[RATE] for group in groups(sweep)] == [0.1, 0.2, 0.3]


def test_the_best_config_is_confirmed_with_seeds_that_did_not_choose_it(tmp_path):
    base = make_base(tmp_path)
    overrides = [{RATE: rate, "seed": seed} for rate in (0.1, 0.2) for seed in (4, 5)]
    sweep = make_sweep(tmp_path / "runs", base, overrides)
    with pytest.raises(ConfigError, match="--confirm: 4 trials have not finished"):
        confirming_trials(sweep, base, 2)
    finished(sweep, [3.0, 3.0, 1.0, 4.0])
    fresh = confirming_trials(sweep, base, 2)
    assert [trial.overrides for trial in fresh] == [{RATE: 0.2, "seed": 6}, {RATE: 0.2, "seed": 7}]
    sweep.trials += fresh
    assert confirming_trials(sweep, base, 2) == []  # the same command again
    assert [trial.seed for trial in confirming_trials(sweep, base, 3)] == [8]
    finished(sweep, [3.0, 3.0, 1.0, 4.0, 99.0, 99.0])
    assert groups(sweep)[0].settings == {RATE: 0.2}  # the fresh seeds do not choose
    finished(sweep, [None] * 6)
    with pytest.raises(ConfigError, match="no finished trial has logged eval/loss"):
        confirming_trials(sweep, base, 2)
