"""The host loop, around a step that costs nothing: it adds 1 to a number."""

import itertools
import json
import os
import signal

import jax.numpy as jnp
import pytest

from jaxllm.errors import ConfigError, NumericsError, Stopped
from jaxllm.losses import Weighted
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.loop import Hook, Loop, LoopConfig
from jaxllm.training.metrics import MetricWriter, Throughput
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import Watchdog


def count_step(state, batch, *, bad_from=10**9):
    """The loss is the batch's number; from step bad_from on every step is skipped."""
    step = state.step + 1
    streak = jnp.maximum(step - bad_from + 1, 0)
    values = {"loss": batch, "skipped_steps": streak, "bad_streak": streak}
    metrics = {name: Weighted(jnp.float32(x), jnp.float32(1)) for name, x in values.items()}
    return state._replace(step=step, params=state.params + 1), metrics


def make_state(step=0):
    return TrainState(jnp.int32(step), jnp.float32(step), (), jnp.zeros(2), jnp.int32(0), jnp.int32(0))


class Numbers(BatchSource):
    """Batch i is the number 100 + i."""

    def batches(self, state, check):
        return (100.0 + step for step in itertools.count(int(state.step)))


class Run:
    """A loop in a folder, with what it saved."""

    def __init__(
        self,
        folder,
        watch,
        hooks=(),
        train_step=count_step,
        start=0,
        unfinished=None,
        profile=None,
        best=None,
        feed=None,
        **changes,
    ):
        settings = {
            "steps": 10,
            "num_microbatches": 1,
            "evaluate_at_start": False,
            "patience": 0,
            "target": None,
            "log_every": 2,
            "evaluate_every": 0,
            "sample_every": 0,
            "checkpoint_every": 4,
            "max_bad_steps": 3,
            "hang_timeout": 60.0,
        }
        config = LoopConfig(**settings | changes)
        self.folder, self.saved = folder, []
        self.writer = MetricWriter(folder, start, None, {})
        self.loop = Loop(
            config=config,
            train_step=train_step,
            feed=feed or Numbers(),
            schedule=lambda count: 0.5**count,
            hooks=hooks,
            save=lambda step, state, row, finished: self.saved.append(
                (step, float(state.params), None if finished else row)
            ),
            wait=lambda: self.saved.append("waited"),
            writer=self.writer,
            throughput=Throughput(tokens_per_step=100, flops_per_step=1e6),
            watch=watch,
            best=best,
            resume_command="the same again",
            profile=profile,
            profile_folder=str(folder / "profile"),
        )
        self.start, self.unfinished = start, unfinished

    def __call__(self):
        try:
            return self.loop.run(make_state(self.start), self.unfinished)
        finally:
            self.writer.close()

    @property
    def rows(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def deterministic_rows(self):
        return [{k: x for k, x in row.items() if not k.startswith("perf/")} for row in self.rows]


@pytest.fixture
def watch(tmp_path):
    with Watchdog(tmp_path, hang_timeout=60.0) as watch:
        yield watch


def test_logged_steps_show_their_own_loss_rate_and_tokens_once(tmp_path, watch):
    run = Run(tmp_path, watch)
    assert int(run().step) == 10
    assert run.deterministic_rows == [
        {
            "step": step,
            "train/loss": 100.0 + step - 1,
            "train/skipped_steps": 0.0,
            "train/learning_rate": 0.5 ** (step - 1),
            "train/tokens": 100.0 * step,
        }
        for step in (2, 4, 6, 8, 10)
    ]
    assert all(row["perf/tokens_per_second"] > 0 for row in run.rows)
    assert "perf/mfu" not in run.rows[0]  # nothing is claimed of hardware that is not known


def test_checkpoints_come_at_their_interval_and_at_the_end(tmp_path, watch):
    run = Run(tmp_path, watch)
    run()
    assert run.saved == [(4, 4.0, None), (8, 8.0, None), (10, 10.0, None)]


def test_hooks_join_the_row_of_their_step_and_run_at_the_end(tmp_path, watch):
    run = Run(tmp_path, watch, hooks=(Hook(3, lambda step, state: {"eval/params": float(state.params)}),))
    run()
    assert {row["step"]: row["eval/params"] for row in run.rows if "eval/params" in row} == {
        3: 3.0,
        6: 6.0,
        9: 9.0,
        10: 10.0,
    }
    assert [row["step"] for row in run.rows] == [2, 3, 4, 6, 8, 9, 10]


def test_a_signal_saves_after_the_step_and_names_the_command_that_resumes(tmp_path, watch):
    def step(state, batch):
        if batch == 104.0:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_step(state, batch)

    run = Run(tmp_path, watch, train_step=step)
    with pytest.raises(Stopped, match=r"saved at step 5.*the same again") as stopped:
        run()
    assert stopped.value.exit_code == 75
    assert run.saved == [(4, 4.0, None), (5, 5.0, None), "waited"]


def test_a_signal_inside_an_evaluation_saves_the_row_and_the_resumed_run_finishes_it(tmp_path, watch):
    def evaluate(step, state):
        watch.check()
        return {"eval/params": float(state.params)}

    def interrupted(step, state):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(step, state)

    (tmp_path / "whole").mkdir()
    whole = Run(tmp_path / "whole", watch, hooks=(Hook(3, evaluate),))
    whole()
    first = Run(tmp_path, watch, hooks=(Hook(3, interrupted),))
    with pytest.raises(Stopped):
        first()
    (step, _, unfinished), _ = first.saved
    assert step == 3
    assert [row["step"] for row in first.rows] == [2]
    watch.requested = False
    second = Run(tmp_path, watch, hooks=(Hook(3, evaluate),), start=3, unfinished=unfinished)
    second()
    assert second.deterministic_rows == whole.deterministic_rows


def test_a_resumed_run_repeats_no_row(tmp_path, watch):
    whole = Run(tmp_path, watch)
    whole()
    rows = whole.deterministic_rows
    resumed = Run(tmp_path, watch, start=4)  # a kill at step 10 with the last checkpoint at 4
    resumed()
    assert resumed.deterministic_rows == rows


# The best step, and the weights that a run begins with


def scores(*values, every=1):
    """A hook that finds these values of eval/loss one after another."""
    values = iter(values)
    return Hook(every, lambda step, state: {"eval/loss": next(values)})


def lowest(patience=0):
    return EarlyStopping("eval/loss", highest=False, patience=patience)


def test_the_best_step_is_saved_even_where_no_checkpoint_is_due(tmp_path, watch):
    best = lowest()
    run = Run(tmp_path, watch, hooks=(scores(5, 3, 4, 2, 9, every=2),), best=best, checkpoint_every=0)
    run()
    assert [step for step, *_ in run.saved] == [2, 4, 8, 10]  # the last is always
    assert (best.step, best.value) == (8, 2)


def test_a_step_that_is_best_and_due_is_saved_once(tmp_path, watch):
    run = Run(tmp_path, watch, hooks=(scores(*range(10, 0, -1), every=4),), best=lowest())
    run()
    assert [step for step, *_ in run.saved] == [4, 8, 10]


def test_a_run_out_of_patience_ends_early_with_its_last_step_saved(tmp_path, watch):
    run = Run(tmp_path, watch, hooks=(scores(3, 2, 4, float("nan")),), best=lowest(2), checkpoint_every=0)
    assert int(run().step) == 4
    assert run.saved == [(1, 1.0, None), (2, 2.0, None), (4, 4.0, None)]
    assert run.rows[-1]["step"] == 4


def test_a_run_that_has_reached_its_target_ends_early(tmp_path, watch):
    best = EarlyStopping("eval/loss", highest=False, patience=0, target=2.5)
    run = Run(tmp_path, watch, hooks=(scores(3, 2, 1),), best=best, checkpoint_every=0)
    assert int(run().step) == 2
    assert run.saved[-1] == (2, 2.0, None)


def test_a_run_that_had_lost_patience_takes_no_step_when_resumed(tmp_path, watch):
    best = lowest(2)
    best.value, best.step, best.waited = 2.0, 2, 2
    run = Run(tmp_path, watch, best=best, start=4)
    assert int(run().step) == 4
    assert run.saved == []


def test_the_weights_at_the_start_are_evaluated_as_step_0(tmp_path, watch):
    run = Run(tmp_path, watch, hooks=(Hook(5, lambda step, state: {"eval/loss": 7.0 - step}),), unfinished={})
    run()
    assert run.rows[0] == {"step": 0, "eval/loss": 7.0}  # no update was made, so there is no rate
    assert [row["step"] for row in run.rows] == [0, 2, 4, 5, 6, 8, 10]
    assert [step for step, *_ in run.saved] == [4, 8, 10]


def test_weights_that_are_never_bettered_end_the_run_and_are_not_saved_anew(tmp_path, watch):
    best = lowest(patience=2)
    run = Run(tmp_path, watch, hooks=(scores(1, 2, 3),), best=best, unfinished={}, checkpoint_every=0)
    assert int(run().step) == 2
    assert best.step == 0
    assert run.saved == [(2, 2.0, None)]


def test_a_signal_while_the_start_is_evaluated_leaves_that_to_the_resumed_run(tmp_path, watch):
    def interrupted(step, state):
        os.kill(os.getpid(), signal.SIGTERM)
        watch.check()

    first = Run(tmp_path, watch, hooks=(Hook(5, interrupted),), unfinished={})
    with pytest.raises(Stopped, match="saved at step 0"):
        first()
    assert first.saved == [(0, 0.0, {}), "waited"]
    assert first.rows == []
    watch.requested = False
    second = Run(tmp_path, watch, hooks=(scores(3, 2, 1, every=5),), unfinished=first.saved[0][2])
    second()
    assert [row["step"] for row in second.rows] == [0, 2, 4, 5, 6, 8, 10]
    assert second.rows[0]["eval/loss"] == 3


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, watch):
    run = Run(tmp_path, watch, train_step=lambda state, batch: count_step(state, batch, bad_from=6))
    with pytest.raises(NumericsError, match=r"3 steps in a row up to step 8.*learning_rate") as error:
        run()
    assert error.value.exit_code == 70


def test_skipped_steps_do_not_move_the_learning_rate(tmp_path, watch):
    run = Run(
        tmp_path,
        watch,
        train_step=lambda state, batch: count_step(state, batch, bad_from=9),
        max_bad_steps=5,
    )
    run()
    assert [row["train/learning_rate"] for row in run.rows][-2:] == [0.5**7, 0.5**7]  # steps 8 and 10


@pytest.mark.parametrize(
    ("profile", "start", "traced"),
    [
        ((3, 5), 0, ["start 3", "stop 6"]),
        ((9, 12), 0, ["start 9", "stop 11"]),  # the run ends at step 10
        ((3, 6), 4, ["start 5", "stop 7"]),  # resumed in the middle
        ((1, 3), 4, []),
    ],
)
def test_a_trace_that_was_begun_is_ended(tmp_path, watch, monkeypatch, profile, start, traced):
    calls, run = [], Run(tmp_path, watch, start=start, profile=profile)
    original, steps = run.loop._profile, []
    monkeypatch.setattr(run.loop, "_profile", lambda step: (steps.append(step), original(step)))
    monkeypatch.setattr("jax.profiler.start_trace", lambda _: calls.append(f"start {steps[-1]}"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(f"stop {steps[-1]}"))
    run()
    assert calls == traced


def test_a_best_metric_that_nothing_measures_is_an_error_as_soon_as_all_is_measured(tmp_path, watch):
    best = EarlyStopping("eval/los", highest=False, patience=0)
    hook = Hook(5, lambda step, state: {"eval/loss": 1.0})
    with pytest.raises(ConfigError, match="best_metric=eval/los is not measured, did you mean 'eval/loss'"):
        Run(tmp_path, watch, hooks=(hook,), best=best, unfinished={}, evaluate_every=5)()
