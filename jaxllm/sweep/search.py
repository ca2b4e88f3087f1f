"""Search by Optuna: a config file's `search(trial)` suggests the overrides of one trial after another.

Optuna keeps what it knows in search.journal, so that a search that was killed resumes; sweep.json has the
trials, as in any sweep.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError
from jaxllm.sweep.goal import Goal
from jaxllm.sweep.record import JOURNAL, Sweep, evaluations, logged_metrics
from jaxllm.sweep.trials import Base, Trial, call_search, check_both, make_trial

if TYPE_CHECKING:
    import optuna


class Search:
    """Asks Optuna for trials and tells it what became of them."""

    def __init__(self, sweep: Sweep, base: Base, *, count: int, prune: bool):
        self.sweep, self.base, self.count = sweep, base, count
        self.study = open_study(sweep.folder / JOURNAL, sweep.goal, prune)
        self.seen: dict[int, float] = {}  # trial number -> when its metrics were last read
        known = {trial.number: trial for trial in sweep.trials}
        for number in self._unfinished():
            if number not in known:  # killed before it was written down
                self.tell(number, "FAIL")
            elif known[number].is_done or known[number].status == "failed":
                self.end(known[number])

    def _unfinished(self) -> set[int]:
        return {trial.number for trial in self.study.trials if trial.state.name == "RUNNING"}

    def trials(self) -> Iterator[Trial]:
        """Those that an earlier command left unfinished, then new ones, up to `count` in all."""
        unfinished = self._unfinished()
        yield from [trial for trial in self.sweep.trials if trial.number in unfinished]
        while sum(trial.number is not None for trial in self.sweep.trials) < self.count:
            yield self.ask()

    def ask(self) -> Trial:
        """A new trial. One whose config has been run already counts for Optuna at once, and is not run."""
        for _ in range(20):
            asked = self.study.ask()
            overrides = call_search(self.base.config_file, asked)
            check_both(self.base, overrides, "search()")
            trial = make_trial(self.base, overrides, f"search(): trial {asked.number}")
            trial.number = asked.number
            same = next((each for each in self.sweep.trials if each.hash == trial.hash), None)
            if same is None:
                self.sweep.trials.append(trial)
                self.sweep.save()
                return trial
            print(f"trial {asked.number} is not run: it has the config of {same.name}")
            value = None if same.status != "finished" else same.value
            self.tell(asked.number, "FAIL" if value is None else "COMPLETE", value)
        raise ConfigError("search() suggests only configs that were run already: lower --trials")

    def should_prune(self, trial: Trial) -> bool:
        """Whether Optuna gives a running trial up, for what it has logged so far."""
        file = self.sweep.folder / trial.name / self.sweep.goal.run / "metrics.jsonl"
        changed = file.stat().st_mtime if file.exists() else 0.0
        if trial.number is None or self.seen.get(trial.number) == changed:
            return False
        self.seen[trial.number] = changed
        return self._report(trial, trial.number).should_prune()

    def _report(self, trial: Trial, number: int) -> "optuna.Trial":
        """Report the evaluations that Optuna does not know; its trial.

        They are compared at the same percentage of the steps: equal steps of trials that differ in their
        number of steps or batch size are not alike.
        """
        import optuna

        frozen = self.study.trials[number]
        asked = optuna.Trial(self.study, frozen._trial_id)
        config, run = self.base.resolve(trial.overrides), self.sweep.goal.run
        steps = (config[run] if run else config)["training"]["steps"]
        known = set(frozen.intermediate_values)
        for step, value, _ in evaluations(self.sweep.folder / trial.name, self.sweep.goal):
            percent = 100 * step // steps
            if percent > 0 and percent not in known:  # the initial weights say nothing of a trial
                asked.report(value, percent)
                known.add(percent)
        return asked

    def end(self, trial: Trial) -> None:
        """Tell Optuna. A diverged trial counts as pruned: TPE learns from those, and not from failed ones."""
        if trial.number is None or trial.status in ("stopped", "running", "waiting"):
            return
        if trial.status == "finished" and trial.value is None:
            there = ", ".join(logged_metrics(self.sweep.folder / trial.name, self.sweep.goal))
            raise ConfigError(
                f"--metric={self.sweep.goal.metric}: {trial.name} has not logged it, only {there or 'none'}"
            )
        self._report(trial, trial.number)
        states = {"finished": "COMPLETE", "pruned": "PRUNED", "diverged": "PRUNED"}
        state = states.get(trial.status, "FAIL")
        self.tell(trial.number, state, trial.value if state == "COMPLETE" else None)

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        """End a trial of the study."""
        from optuna.trial import TrialState

        self.study.tell(number, value, state=TrialState[state])


def open_study(file: Path, goal: Goal, prune: bool) -> "optuna.Study":
    """The study in a journal file, new or as it was left. ConfigError without the `sweep` extra."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ConfigError("a search needs Optuna: pip install 'jaxllm[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "maximize" if goal.highest else "minimize"
    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        # A seed that differs when resumed: the same one would suggest the first trials again. The constant
        # liar keeps trials that run at the same time apart.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), constant_liar=True)
    # Stops a trial whose best value so far is worse than the median of the others at the same percentage.
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if prune else optuna.pruners.NopPruner()
    return study
