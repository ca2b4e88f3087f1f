"""The metric that trials are compared by."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.config import did_you_mean
from jaxllm.errors import ConfigError
from jaxllm.stages import find_stage


class Goal(NamedTuple):
    """A metric as it is logged; RUN:METRIC of a pipeline's run."""

    metric: str
    highest: bool  # whether higher is better

    def __str__(self) -> str:
        return f"{self.metric}, {'highest' if self.highest else 'lowest'} first"

    @property
    def run(self) -> str:
        """The folder of the run within a trial's; empty for the trial's own."""
        return self.metric.rpartition(":")[0]

    @property
    def logged(self) -> str:
        return self.metric.rpartition(":")[2]


def find_goal(config: Mapping[str, Any], metric: str | None, goal: str | None) -> Goal:
    """The metric, by default the headline of the stage, and which of its values are better.

    Args:
      config: of a stage, or of a pipeline, whose last run is the default.
      goal: "lowest" or "highest"; None: as the stage's report has it.

    Raises ConfigError for a run that the pipeline does not have, where nothing says which is better, and for
    a goal that contradicts what is known of the metric.
    """
    run, _, name = (metric or "").rpartition(":")
    if "stage" in config and run:
        raise ConfigError(f"--metric={metric}: only a pipeline has runs; leave out {run!r}:")
    if "stage" not in config:
        runs = [each for each, section in config.items() if isinstance(section, dict) and "stage" in section]
        run = run or runs[-1]
        if run not in runs:
            raise ConfigError(f"--metric={metric}: the pipeline has no run {run!r}{did_you_mean(run, runs)}")
        config = config[run]
    stage = find_stage(config["stage"])
    name = name or stage.headline.metric
    best = {curve.metric: panel.best for panel in stage.panels for curve in panel.curves}
    best[stage.headline.metric] = "highest" if stage.headline.highest else "lowest"
    if goal is None and best.get(name) is None:
        raise ConfigError(f"--metric={name}: which values are better? add --goal=lowest or --goal=highest")
    if goal is not None and (better := best.get(name)) is not None and goal != better:
        raise ConfigError(f"--goal={goal}: of {name} the {better} values are better; leave out --goal")
    return Goal(f"{run}:{name}" if run else name, (goal or best[name]) == "highest")
