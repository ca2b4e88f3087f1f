"""The trials of a sweep by their settings, best first; and fresh seeds for the best.

The config that measured best was chosen for its measurement: its mean is biased in its favor (the winner's
curse), and only seeds that did not choose it estimate it without bias.
"""

import json
import statistics
from typing import NamedTuple

from jaxllm.errors import ConfigError
from jaxllm.sweep.overrides import Overrides
from jaxllm.sweep.record import Sweep
from jaxllm.sweep.trials import Base, Trial, make_trial


class Group(NamedTuple):
    """The trials that differ only in the seed."""

    settings: Overrides
    trials: list[Trial]

    @property
    def measured(self) -> list[Trial]:
        """Those that have finished and have the metric."""
        return [trial for trial in self.trials if trial.status == "finished" and trial.value is not None]

    @property
    def values(self) -> list[float]:
        return [trial.value for trial in self.measured if trial.value is not None]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def groups(sweep: Sweep, *, confirms: bool = False) -> list[Group]:
    """The trials by their settings, best mean first, then those without a measurement. A config of which a
    trial did not finish, say because it diverged, comes after those that all finished."""
    found: dict[str, Group] = {}
    for trial in sweep.trials:
        if trial.confirms == confirms:
            key = json.dumps(trial.settings, sort_keys=True)
            found.setdefault(key, Group(trial.settings, [])).trials.append(trial)
    sign = -1 if sweep.goal.highest else 1

    def rank(group: Group) -> tuple[bool, bool, float]:
        missing = len(group.measured) < len(group.trials)
        return (not group.measured, missing, sign * group.mean if group.measured else 0.0)

    return sorted(found.values(), key=rank)


def confirming_trials(sweep: Sweep, base: Base, count: int) -> list[Trial]:
    """Trials of the best config with `count` seeds that no other trial has; fewer where there are some
    already. ConfigError unless all trials have ended, at least one with a measurement."""
    unfinished = [
        each for each in sweep.trials if not (each.is_done or each.status == "failed" or each.confirms)
    ]
    if unfinished:
        raise ConfigError(
            f"--confirm: {len(unfinished)} trials have not finished; run the sweep to its end first"
        )
    best = groups(sweep)[0] if sweep.trials else None
    if best is None or not best.measured:
        raise ConfigError(f"--confirm: no finished trial has logged {sweep.goal.metric}")
    first = max(trial.seed for trial in sweep.trials if not trial.confirms) + 1
    known = {trial.hash for trial in sweep.trials}
    trials = [
        make_trial(base, {**best.settings, "seed": seed}, "--confirm") for seed in range(first, first + count)
    ]
    fresh = [trial for trial in trials if trial.hash not in known]
    for trial in fresh:
        trial.confirms = True
    return fresh
