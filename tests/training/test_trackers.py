"""Weights & Biases and trackio: a resumed run continues there, each step once, and none stops a run."""

import sys
from types import SimpleNamespace

import pytest

from jaxllm.training.metrics import MetricWriter, read_metrics
from jaxllm.training.trackers import start_trackers

LIBRARIES = ("wandb", "trackio")


@pytest.fixture
def library(monkeypatch):
    """Both libraries, as one that keeps what it is told, until it is made to forget."""
    told = SimpleNamespace(starts=[], rows=[], finished=0)

    class Run:
        @property
        def starting_step(self):
            return max((step for step, _ in told.rows), default=-1) + 1

        _next_step = starting_step

        def log(self, values, step):
            told.rows.append((step, values))

        def finish(self):
            told.finished += 1

    def init(**settings):
        told.starts.append(settings)
        return Run()

    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    return told


def write(folder, library, steps, resumed_at):
    trackers = start_trackers(folder, "20260101-000000-abcdef", {library: "project"}, {"seed": 1})
    writer = MetricWriter(folder, resumed_at, trackers)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_resumed_run_continues_with_each_step_once(tmp_path, library, name):
    write(tmp_path, name, [1, 2, 3], resumed_at=0)
    write(tmp_path, name, [3, 4], resumed_at=2)  # killed after step 3, resumed from a checkpoint of step 2
    first, second = library.starts
    assert first == second
    assert first["resume"] == "allow"
    assert first["name"] == f"{tmp_path.name}-20260101-000000-abcdef"
    assert first.get("id") == ("20260101-000000-abcdef" if name == "wandb" else None)
    assert (first["project"], first["config"]) == ("project", {"seed": 1})
    assert library.rows == [(step, {"train/loss": 1.0 / step}) for step in (1, 2, 3, 4)]
    assert library.finished == 2


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_tracker_lost_or_never_had_is_logged_when_the_run_resumes(tmp_path, library, name):
    write(tmp_path, name, [1, 2, 3], resumed_at=0)
    del library.rows[1:]  # killed before it had written the rest
    write(tmp_path, name, [4], resumed_at=3)
    assert [step for step, _ in library.rows] == [1, 2, 3, 4]


def test_a_library_whose_project_is_not_named_is_not_imported(tmp_path, monkeypatch):
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    assert start_trackers(tmp_path, "id", dict.fromkeys(LIBRARIES), {}) == []


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("fault", ["missing", "init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning(tmp_path, monkeypatch, caplog, name, fault):
    def act(what):
        if what == fault:
            raise OSError("no network")

    run = SimpleNamespace(
        log=lambda *_, **__: act("log"), finish=lambda: act("finish"), starting_step=0, _next_step=0
    )
    module = SimpleNamespace(init=lambda **_: act("init") or run)
    monkeypatch.setitem(sys.modules, name, None if fault == "missing" else module)
    write(tmp_path, name, [1, 2], resumed_at=0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith(f"{name} failed; continuing without it: ")
    assert f"pip install 'jaxllm[{name}]'" in warning if fault == "missing" else "no network" in warning
