"""A run that is stopped or killed at any boundary, and resumed, ends as an uninterrupted one."""

import json
from contextlib import closing

import numpy as np
import pytest
from test_loop import Run

from jaxllm.errors import Stopped
from jaxllm.losses import Weighted
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.loop import Hook
from jaxllm.training.metrics import MetricWriter, last_complete_row
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import Watchdog

SCORES = {0: 9.0, 3: 5.0, 6: 7.0, 7: 4.0}  # eval/loss: the last step is the best


class Killed(BaseException):
    """In place of SIGKILL."""


class Boundaries:
    """Counts the boundaries of a run, and at those numbers calls these functions."""

    def __init__(self, interruptions):
        self.passed, self.interruptions = 0, dict(interruptions)

    def __call__(self):
        self.passed += 1
        self.interruptions.get(self.passed - 1, lambda: None)()


class Disk:
    """What a run folder holds besides metrics.jsonl: metadata by step, as `jaxllm.runs.train` saves it."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, row, finished, early_stopping):
        row = {name: x for name, x in row.items() if not name.startswith("perf/")}
        known = {"metrics": row if finished else None, "unfinished_row": None if finished else row}
        best = {"value": early_stopping.value, "step": early_stopping.step, "waited": early_stopping.waited}
        self.saved[step] = json.loads(json.dumps(known | {"best": best, "params": float(state.params)}))


def run_once(folder, disk, boundary, watchdog, **changes):
    """One process: from where the disk stands to the last step, or to an interruption."""
    newest = max(disk.saved, default=None)
    found = {"unfinished_row": {}} if newest is None else disk.saved[newest]
    unfinished, step = found["unfinished_row"], newest or 0
    early_stopping = EarlyStopping("eval/loss", highest=False, patience=0, **found.get("best", {}))

    def train_step(state, batch):
        boundary()
        metrics = {"loss": batch.tokens, "skipped_steps": 0, "bad_streak": 0}
        state = state._replace(step=state.step + 1, params=state.params + 1)
        return state, {name: Weighted(np.float32(x), np.float32(1)) for name, x in metrics.items()}

    def evaluate(step, state):
        boundary()
        watchdog.check()
        boundary()
        return {"eval/loss": SCORES[step], "eval/params": float(state.params)}

    def sample(step, state):
        boundary()
        return {"eval/sampled": float(step)}

    run = Run(
        folder,
        watchdog,
        hooks=(Hook(3, evaluate), Hook(3, sample)),
        train_step=train_step,
        start=last_complete_row(step, bool(disk.saved), unfinished),
        unfinished=unfinished,
        early_stopping=early_stopping,
        **{"steps": 7, "log_every": 2, "checkpoint_every": 2} | changes,
    )
    run.loop.row = found.get("metrics") or {}
    write = run.writer.write

    def save(step, state, row, finished):
        boundary()
        disk.save(step, state, row, finished, early_stopping)
        boundary()

    def write_row(step, row):
        boundary()
        write(step, row)
        boundary()

    run.loop.save, run.writer.write = save, write_row
    state = TrainState(np.int32(step), np.float32(step), (), np.zeros(2), np.int32(0), np.int32(0))
    with closing(run.writer):
        if step < 7 or unfinished is not None:
            run.loop.run(state, unfinished)
    return run.deterministic_rows


def outcome(folder, *interruptions):
    """The rows, and the metadata of the last step, of a run that is interrupted (at a boundary, in a way) and
    resumed; and the number of boundaries that it passed."""
    folder.mkdir(parents=True)
    disk, watchdog = Disk(), Watchdog(folder, hang_timeout=0)
    ways = {stop: lambda: setattr(watchdog, "requested", True), kill: kill}
    boundary = Boundaries((number, ways[way]) for number, way in interruptions)
    for _ in range(len(interruptions) + 1):
        watchdog.requested = False
        try:
            rows = run_once(folder, disk, boundary, watchdog)
        except (Stopped, Killed):
            continue
        return rows, disk.saved[7], boundary.passed
    raise AssertionError("the run did not end")


def stop():
    """As a signal does."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    ("ways", "distances"),  # of two interruptions; the first two boundaries are those of the save
    [((stop,), (0,)), ((kill,), (0,)), ((stop, stop), (3, 4)), ((stop, kill), range(3, 9))],
)
def test_an_interruption_at_any_boundary_changes_nothing(tmp_path, ways, distances, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # these two take most of the time
    monkeypatch.setattr(MetricWriter, "_to_tensorboard", lambda self, row: None)
    rows, last, boundaries = outcome(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6, 7]
    assert last["metrics"]["eval/loss"] == 4.0
    assert last["best"]["step"] == 7
    for number in range(boundaries):
        for distance in distances:
            interruptions = zip((number, number + distance), ways, strict=False)
            found = outcome(tmp_path / f"{number}-{distance}", *interruptions)
            assert found[:2] == (rows, last), (number, distance)
