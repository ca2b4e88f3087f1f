"""Search by Optuna: what it is told, and that a search that was killed loses nothing."""

import json

import pytest
from sweeps import LOSS, RATE, make_base, make_sweep

from jaxllm.errors import ConfigError
from jaxllm.sweep import local, record
from jaxllm.sweep.machine import Share
from jaxllm.sweep.search import Search

SEARCH = "def search(trial): return {'optimizer.learning_rate': trial.suggest_float('rate', 0.1, 0.9)}\n"
CATEGORIES = (
    "def search(trial): return {'optimizer.learning_rate': trial.suggest_categorical('r', [0.1, 0.2])}\n"
)

pytest.importorskip("optuna", reason="needs the extra 'sweep'")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(local, "POLL", 0.02)


def search(folder, base, count, *, prune=False, until=None):
    """Search; `until` ends this process, as it were, once so many trials have ended."""
    new = make_sweep(folder, base, [])
    sweep = record.open_sweep(new, resume=True)
    found = Search(sweep, base, count=count, prune=prune)

    def report(trial):
        if until is not None and sum(each.status != "running" for each in sweep.trials) == until:
            raise KeyboardInterrupt
        found.end(trial)

    local.run_trials(
        sweep,
        found.trials(),
        lambda trial: base.command(trial, str(folder)),
        [Share((), {})],
        retries=0,
        report=report,
        should_prune=found.should_prune,
    )
    return found


def states(found):
    return [(trial.state.name, trial.value) for trial in found.study.trials]


def test_optuna_is_told_the_value_of_each_trial(tmp_path):
    base = make_base(tmp_path, SEARCH)
    found = search(tmp_path / "runs", base, 3)
    values = [trial.value for trial in found.sweep.trials]
    assert values == [trial.overrides[RATE] for trial in found.sweep.trials]  # what the script logs
    assert states(found) == [("COMPLETE", value) for value in values]
    assert found.study.direction.name == "MINIMIZE"
    assert found.study.best_value == min(values)


def test_a_search_that_was_killed_keeps_its_finished_trials(tmp_path):
    base = make_base(tmp_path, SEARCH)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "runs", base, 5, until=3)  # the third has ended, and Optuna does not know yet
    before = record.read(tmp_path / "runs").trials
    found = search(tmp_path / "runs", base, 5)
    assert [each.name for each in found.sweep.trials[:3]] == [each.name for each in before]
    assert len(found.sweep.trials) == len({each.hash for each in found.sweep.trials}) == 5
    assert states(found) == [("COMPLETE", trial.value) for trial in found.sweep.trials]
    starts = [(found.sweep.folder / each.name / "starts.jsonl").read_text() for each in found.sweep.trials]
    assert [len(each.splitlines()) for each in starts] == [1] * 5
    assert len(search(tmp_path / "runs", base, 5).study.trials) == 5  # the same command again does nothing


def test_a_trial_that_was_running_resumes(tmp_path):
    base = make_base(tmp_path, SEARCH)
    first = Search(make_sweep(tmp_path / "runs", base, []), base, count=2, prune=False)
    trial = first.ask()
    trial.status = "running"
    first.sweep.save()
    first.study.ask()  # killed before the trial was written down
    found = search(tmp_path / "runs", base, 2)
    assert found.sweep.trials[0].name == trial.name
    assert [state for state, _ in states(found)] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_search_prunes_by_the_metric_while_a_trial_runs(tmp_path):
    base = make_base(tmp_path, SEARCH)
    found = search(tmp_path / "runs", base, 6)
    sweep, worst = found.sweep, max(trial.value for trial in found.sweep.trials)
    assert all(trial.intermediate_values.keys() == {10, 20} for trial in found.study.trials)
    found = Search(sweep, base, count=8, prune=True)
    for loss, is_pruned in ((worst + 1, True), (-1.0, False)):
        trial = found.ask()
        folder = sweep.folder / trial.name
        folder.mkdir()
        assert not found.should_prune(trial)  # nothing is measured yet
        (folder / "metrics.jsonl").write_text(f'{{"step": 0, "eval/loss": {worst + 9}}}\n')
        assert not found.should_prune(trial)  # nor learned
        (folder / "metrics.jsonl").write_text(f'{{"step": 10, "eval/loss": {loss}, "eval/loss_se": 0.1}}\n')
        assert found.should_prune(trial) == is_pruned
        assert found.study.trials[trial.number].intermediate_values == {10: loss}
        trial.status = "pruned"
        found.end(trial)
        assert found.study.trials[trial.number].state.name == "PRUNED"


def test_evaluations_are_compared_at_the_same_percentage_of_the_steps(tmp_path):
    search_steps = "def search(trial): return {'training.steps': trial.suggest_int('n', 40, 40)}\n"
    base = make_base(tmp_path, search_steps)
    found = Search(make_sweep(tmp_path / "runs", base, []), base, count=1, prune=True)
    trial = found.ask()
    folder = found.sweep.folder / trial.name
    folder.mkdir()
    rows = [{"step": step, "eval/loss": float(step)} for step in (0, 10, 20, 40)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found.should_prune(trial)
    assert found.study.trials[0].intermediate_values == {25: 10.0, 50: 20.0, 100: 40.0}


def test_a_diverged_trial_teaches_and_a_failed_one_does_not(tmp_path):
    base = make_base(tmp_path, CATEGORIES, r0_1=[70], r0_2=[1])
    found = search(tmp_path / "runs", base, 2)
    told = {trial.params["r"]: trial.state.name for trial in found.study.trials}
    assert told == {0.1: "PRUNED", 0.2: "FAIL"}


def test_a_config_that_was_run_is_not_run_again(tmp_path, capsys):
    base = make_base(tmp_path, CATEGORIES)
    found = search(tmp_path / "runs", base, 2)
    assert len(found.sweep.trials) == 2
    with pytest.raises(ConfigError, match=r"only configs that were run already: lower --trials"):
        search(tmp_path / "runs", base, 3)
    assert "is not run: it has the config of learning_rate_0." in capsys.readouterr().out


def test_what_search_returns_is_checked(tmp_path):
    def first_trial(body):
        base = make_base(tmp_path, body)
        return Search(make_sweep(tmp_path / "runs", base, []), base, count=1, prune=False).ask()

    with pytest.raises(ConfigError, match=r"config.py: defines no search\(\)"):
        first_trial("")
    with pytest.raises(ConfigError, match=r"search\(\) returned a NoneType; return a dict of overrides"):
        first_trial("def search(trial): pass\n")
    with pytest.raises(
        ConfigError, match=r"search\(\): trial 2 \(rate=1\): config.optimizer.rate: unknown key"
    ):
        first_trial("def search(trial): return {'optimizer.rate': 1}\n")


def test_a_metric_that_trials_do_not_log_is_named_with_those_that_they_do(tmp_path):
    base = make_base(tmp_path, SEARCH)
    sweep = make_sweep(tmp_path / "runs", base, [])
    sweep.goal = LOSS._replace(metric="eval/reward")
    sweep.save()
    trial = Search(sweep, base, count=1, prune=False).ask()
    (sweep.folder / trial.name).mkdir()
    (sweep.folder / trial.name / "metrics.jsonl").write_text(
        '{"step": 1, "eval/loss": 2, "eval/loss_se": 1}\n'
    )
    trial.status = "finished"
    message = r"--metric=eval/reward: .* has not logged it, only eval/loss$"
    with pytest.raises(ConfigError, match=message):
        Search(sweep, base, count=1, prune=False)
