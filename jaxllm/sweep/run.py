"""A whole sweep: from the config file to trials that are listed, printed, submitted or run."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import as_dict, check_local
from jaxllm.errors import ConfigError, RunError
from jaxllm.runs.weights import check_init_from
from jaxllm.store import local_path
from jaxllm.sweep.goal import Goal, find_goal
from jaxllm.sweep.groups import confirming_trials
from jaxllm.sweep.local import run_trials
from jaxllm.sweep.machine import Share, find_machine, split
from jaxllm.sweep.record import (
    LOGS,
    Sweep,
    check_folder,
    claimed,
    evaluations,
    logged_metrics,
    open_sweep,
    read,
)
from jaxllm.sweep.search import Search
from jaxllm.sweep.trials import Base, Trial, make_trials, read_sweep

Submit = Callable[[Sequence[Sequence[str]], Path], str]  # commands, a folder for their output -> the job's id


class Options(NamedTuple):
    """The flags of experiments/sweep.py, which documents them."""

    workdir: str
    launcher: str
    parallel: int
    resume: bool
    retries: int
    metric: str | None
    goal: str | None
    trials: int | None  # of a search; None: those of sweep()
    prune: bool
    confirm: int
    dry_run: bool

    def check(self) -> None:
        """ConfigError for what is out of range or does not fit together."""
        for name, least in (("parallel", 1), ("retries", 0), ("trials", 1), ("confirm", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name}={value} must be at least {least}")
        if self.trials and self.launcher != "local":
            raise ConfigError(
                f"--trials needs --launcher=local, not {self.launcher}: a search waits for results"
            )
        if self.trials and self.confirm:
            raise ConfigError("--confirm re-runs what a search has found: leave out --trials")


def run_sweep(base: Base, config: Any, options: Options, *, command: str, submit: Submit) -> int:
    """List, print, submit or run the trials that are not done; the exit code.

    Args:
      config: that which the trials override.
      command: which sweep.json records.
      submit: sends commands to a scheduler.
    """
    options.check()
    check_local(options.workdir, "--workdir")
    folder = local_path(options.workdir)
    values, old = as_dict(config), read(folder)
    if old is not None and options.metric is None and options.goal is None:
        goal = old.goal
    else:
        goal = find_goal(values, options.metric, options.goal)
    check_kind(old, goal, options)
    is_listed = not (options.trials or options.confirm)
    trials, duplicates = make_trials(base, read_sweep(base.config_file) if is_listed else [])
    for line in duplicates:
        print(f"left out: {line}", file=sys.stderr)
    shares = []
    if options.launcher == "local":  # elsewhere, there may be other devices and files
        check_init_from(base.flags.get("init_from"))
        shares = split(find_machine(), options.parallel)
    new = Sweep(folder, base.config_file, command, goal, values, dict(base.flags), trials)
    if options.dry_run:
        if folder.exists():
            check_folder(folder)
        for trial in open_sweep(new, resume=options.resume).trials:
            print(f"{trial.status:9}  {trial.name}")
        print(f"{len(new.trials)} trials, compared by {goal}")
        return 0
    with claimed(folder):
        sweep = open_sweep(new, resume=options.resume)
        if options.confirm:
            sweep.trials += confirming_trials(sweep, base, options.confirm)
        return launch(sweep, base, options, shares, submit)


def check_kind(old: Sweep | None, goal: Goal, options: Options) -> None:
    """ConfigError where WORKDIR holds a search and no fixed list of trials, or the reverse, or a search for
    another metric; for a metric that no finished trial has; or where there is nothing to confirm."""
    place = f"--workdir={options.workdir} holds"
    if old is None:
        if options.confirm:
            raise ConfigError(f"--confirm: {place} no sweep yet")
        return
    is_search = any(trial.number is not None for trial in old.trials)
    if old.trials and not options.confirm and is_search != bool(options.trials):
        kind, fix = ("a search", "add --trials=N") if is_search else ("a sweep()", "leave out --trials")
        raise ConfigError(f"{place} {kind}: {fix}, or choose another --workdir")
    if is_search and goal != old.goal and not options.confirm:
        raise ConfigError(
            f"{place} a search for {old.goal.metric}, not {goal.metric}: choose another --workdir"
        )
    finished = [trial for trial in old.trials if trial.status == "finished"]
    if goal != old.goal and finished:
        if not any(evaluations(old.folder / trial.name, goal) for trial in finished):
            names = ", ".join(logged_metrics(old.folder / finished[0].name, goal))
            raise ConfigError(
                f"--metric={goal.metric}: no finished trial has logged it, only {names or 'none'}"
            )
        print(f"note: compared by {goal}, before by {old.goal}", file=sys.stderr)


def launch(sweep: Sweep, base: Base, options: Options, shares: Sequence[Share], submit: Submit) -> int:
    """Start what is not done, in the way that --launcher says."""
    left = [trial for trial in sweep.trials if not trial.is_done]
    if not left and options.launcher != "local":
        sweep.save()
        print(f"all {len(sweep.trials)} trials are done", file=sys.stderr)
        return 0
    if options.launcher == "local":
        return run_here(sweep, base, left, options, shares)
    if options.launcher == "print":
        sweep.save()  # the trials may run elsewhere, and be reported on
        for trial in left:
            print(shlex.join(["python", *base.command(trial, options.workdir)[1:]]))
        return 0
    queued = queued_jobs() if any(trial.status == "submitted" for trial in left) else set()
    new = [trial for trial in left if trial.status != "submitted" or trial.message not in queued]
    if new:
        job = submit([base.command(trial, options.workdir) for trial in new], sweep.folder / LOGS)
        for i, trial in enumerate(new):
            trial.status, trial.message = "submitted", f"{job}_{i}"
        sweep.save()
        print(f"submitted {len(new)} trials as job {job}")
    if len(new) < len(left):
        print(f"{len(left) - len(new)} trials are queued or running already")
    return 0


def queued_jobs() -> set[str]:
    """The user's jobs that SLURM has not ended, as ARRAY_INDEX."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"--launcher=slurm: squeue does not say which trials are queued: {error}") from None


def run_here(
    sweep: Sweep, base: Base, left: Sequence[Trial], options: Options, shares: Sequence[Share]
) -> int:
    """Run the trials, or a search, on this machine."""
    total = options.trials or len(sweep.trials)
    if done := len(sweep.trials) - len(left):
        print(f"{done} of {total} trials are done", flush=True)
    if not shares[0].cores:
        print("note: this system does not pin processes to cores", flush=True)
    search = Search(sweep, base, count=options.trials, prune=options.prune) if options.trials else None
    sweep.save()
    waiting = "a search of" if search is not None else "trials:"
    print(
        f"{waiting} {options.trials or len(left)}, {len(shares)} at a time, logs in {sweep.folder / LOGS}",
        flush=True,
    )

    def report(trial: Trial) -> None:
        ended = sum(each.is_done or each.status == "failed" for each in sweep.trials)
        print(f"[{ended}/{total}] {outcome(sweep, trial)}", flush=True)
        if search is not None:
            search.end(trial)

    run_trials(
        sweep,
        iter(left) if search is None else search.trials(),
        lambda trial: base.command(trial, options.workdir),
        shares,
        retries=options.retries,
        report=report,
        should_prune=search.should_prune if search is not None else lambda trial: False,
    )
    failed = sum(trial.status == "failed" for trial in sweep.trials)
    if failed:
        again = "a search does not repeat them" if search is not None else "the same command runs them again"
        raise RunError(f"{failed} of {len(sweep.trials)} trials failed; {again}")
    print(f"report: python experiments/report.py {options.workdir}")
    return 0


def outcome(sweep: Sweep, trial: Trial) -> str:
    """The line that is printed when a trial ends."""
    value = f"  {sweep.goal.metric} {trial.value:.4g} at step {trial.step}" if trial.value is not None else ""
    if trial.value is None and trial.status == "finished":
        names = ", ".join(logged_metrics(sweep.folder / trial.name, sweep.goal))
        value = f"  no {sweep.goal.metric}; it has {names}: run the sweep again with --metric=ONE OF THEM"
    why = f"  exit code {trial.exit_code}: {trial.message}" if trial.message else ""
    return f"{trial.name}  {trial.status}{value}{why}  {trial.seconds:.0f} s"
