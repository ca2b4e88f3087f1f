"""The host loop, around a trivial train step that adds 1 to a number."""

import itertools
import json
import os
import signal
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError, NumericsError, Stopped
from jaxllm.losses import Weighted
from jaxllm.training.batch_source import BatchSource
from jaxllm.training.early_stopping import EarlyStopping
from jaxllm.training.loop import Hook, Loop, LoopConfig
from jaxllm.training.metrics import MetricWriter, Throughput
from jaxllm.training.state import TrainState
from jaxllm.training.watchdog import Watchdog


class Number(NamedTuple):
    tokens: np.float32


def count_step(state, batch, *, bad_from=10**9):
    """The loss is the number that is the batch; from step bad_from on every step is skipped."""
    step = state.step + 1
    streak = jnp.maximum(step - bad_from + 1, 0)
    values = {"loss": batch.tokens, "skipped_steps": streak, "bad_streak": streak}
    metrics = {name: Weighted(jnp.float32(x), jnp.float32(1)) for name, x in values.items()}
    return state._replace(step=step, params=state.params + 1), metrics


def make_state(step=0):
    return TrainState(jnp.int32(step), jnp.float32(step), (), jnp.zeros(2), jnp.int32(0), jnp.int32(0))


class Numbers(BatchSource):
    """Batch i is the number 100 + i."""

    def batches(self, state, check):
        return (Number(np.float32(100 + step)) for step in itertools.count(int(state.step)))


class Run:
    """A loop in a folder, which records what is saved."""

    def __init__(
        self,
        folder,
        watchdog,
        hooks=(),
        train_step=count_step,
        start=0,
        unfinished=None,
        profile=None,
        early_stopping=None,
        source=None,
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
        self.writer = MetricWriter(folder, start)
        self.loop = Loop(
            config=config,
            train_step=train_step,
            source=source or Numbers(),
            schedule=lambda count: 0.5**count,
            hooks=hooks,
            save=lambda step, state, row, finished: self.saved.append(
                (step, float(state.params), None if finished else row)
            ),
            wait=lambda: self.saved.append("waited"),
            writer=self.writer,
            throughput=Throughput(tokens_per_step=100, flops_per_token=1e4),
            watchdog=watchdog,
            early_stopping=early_stopping,
            resume_command="the same command",
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
def watchdog(tmp_path):
    with Watchdog(tmp_path, hang_timeout=60.0) as watchdog:
        yield watchdog


def test_each_logged_step_has_its_own_loss_rate_and_tokens_once(tmp_path, watchdog):
    run = Run(tmp_path, watchdog)
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
    assert "perf/mfu" not in run.rows[0]  # the peak of this device is not known


def test_checkpoints_are_saved_at_their_interval_and_at_the_end(tmp_path, watchdog):
    run = Run(tmp_path, watchdog)
    run()
    assert run.saved == [(4, 4.0, None), (8, 8.0, None), (10, 10.0, None)]


def test_hooks_add_to_the_row_of_their_step_and_run_at_the_end(tmp_path, watchdog):
    run = Run(tmp_path, watchdog, hooks=(Hook(3, lambda step, state: {"eval/params": float(state.params)}),))
    run()
    assert {row["step"]: row["eval/params"] for row in run.rows if "eval/params" in row} == {
        3: 3.0,
        6: 6.0,
        9: 9.0,
        10: 10.0,
    }
    assert [row["step"] for row in run.rows] == [2, 3, 4, 6, 8, 9, 10]


def test_a_signal_saves_after_the_step_and_prints_the_command_that_resumes(tmp_path, watchdog):
    def step(state, batch):
        if batch.tokens == 104.0:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_step(state, batch)

    run = Run(tmp_path, watchdog, train_step=step)
    with pytest.raises(Stopped, match=r"saved at step 5.*the same command") as stopped:
        run()
    assert stopped.value.exit_code == 75
    assert run.saved == [(4, 4.0, None), (5, 5.0, None), "waited"]


def test_a_signal_during_an_evaluation_saves_the_row_and_the_resumed_run_completes_it(tmp_path, watchdog):
    def evaluate(step, state):
        watchdog.check()
        return {"eval/params": float(state.params)}

    def interrupted(step, state):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(step, state)

    (tmp_path / "whole").mkdir()
    whole = Run(tmp_path / "whole", watchdog, hooks=(Hook(3, evaluate),))
    whole()
    first = Run(tmp_path, watchdog, hooks=(Hook(3, interrupted),))
    with pytest.raises(Stopped):
        first()
    (step, _, unfinished), _ = first.saved
    assert step == 3
    assert [row["step"] for row in first.rows] == [2]
    watchdog.requested = False
    second = Run(tmp_path, watchdog, hooks=(Hook(3, evaluate),), start=3, unfinished=unfinished)
    second()
    assert second.deterministic_rows == whole.deterministic_rows


def test_a_resumed_run_does_not_repeat_rows(tmp_path, watchdog):
    whole = Run(tmp_path, watchdog)
    whole()
    rows = whole.deterministic_rows
    resumed = Run(tmp_path, watchdog, start=4)  # killed at step 10, with its last checkpoint at step 4
    resumed()
    assert resumed.deterministic_rows == rows


# The best step, early stopping, and the initial weights


def scores(*values, every=1):
    """A hook that measures these values of eval/loss one after another."""
    values = iter(values)
    return Hook(every, lambda step, state: {"eval/loss": next(values)})


def lowest(patience=0):
    return EarlyStopping("eval/loss", highest=False, patience=patience)


def test_the_best_step_is_saved_even_if_no_checkpoint_is_due(tmp_path, watchdog):
    early_stopping = lowest()
    run = Run(
        tmp_path,
        watchdog,
        hooks=(scores(5, 3, 4, 2, 9, every=2),),
        early_stopping=early_stopping,
        checkpoint_every=0,
    )
    run()
    assert [step for step, *_ in run.saved] == [2, 4, 8, 10]  # the last one always
    assert (early_stopping.step, early_stopping.value) == (8, 2)


def test_a_step_that_is_best_and_due_is_saved_once(tmp_path, watchdog):
    run = Run(tmp_path, watchdog, hooks=(scores(*range(10, 0, -1), every=4),), early_stopping=lowest())
    run()
    assert [step for step, *_ in run.saved] == [4, 8, 10]


def test_a_run_without_patience_left_ends_early_with_its_last_step_saved(tmp_path, watchdog):
    run = Run(
        tmp_path,
        watchdog,
        hooks=(scores(3, 2, 4, float("nan")),),
        early_stopping=lowest(2),
        checkpoint_every=0,
    )
    assert int(run().step) == 4
    assert run.saved == [(1, 1.0, None), (2, 2.0, None), (4, 4.0, None)]
    assert run.rows[-1]["step"] == 4


def test_a_run_that_has_reached_its_target_ends_early(tmp_path, watchdog):
    early_stopping = EarlyStopping("eval/loss", highest=False, patience=0, target=2.5)
    run = Run(tmp_path, watchdog, hooks=(scores(3, 2, 1),), early_stopping=early_stopping, checkpoint_every=0)
    assert int(run().step) == 2
    assert run.saved[-1] == (2, 2.0, None)


def test_a_run_without_patience_left_makes_no_step_when_resumed(tmp_path, watchdog):
    early_stopping = lowest(2)
    early_stopping.value, early_stopping.step, early_stopping.waited = 2.0, 2, 2
    run = Run(tmp_path, watchdog, early_stopping=early_stopping, start=4)
    assert int(run().step) == 4
    assert run.saved == []


def test_the_initial_weights_are_evaluated_as_step_0(tmp_path, watchdog):
    run = Run(
        tmp_path, watchdog, hooks=(Hook(5, lambda step, state: {"eval/loss": 7.0 - step}),), unfinished={}
    )
    run()
    assert run.rows[0] == {
        "step": 0,
        "eval/loss": 7.0,
    }  # no update was made, so that there is no learning rate
    assert [row["step"] for row in run.rows] == [0, 2, 4, 5, 6, 8, 10]
    assert [step for step, *_ in run.saved] == [4, 8, 10]


def test_initial_weights_that_stay_the_best_end_the_run_and_are_not_saved(tmp_path, watchdog):
    early_stopping = lowest(patience=2)
    run = Run(
        tmp_path,
        watchdog,
        hooks=(scores(1, 2, 3),),
        early_stopping=early_stopping,
        unfinished={},
        checkpoint_every=0,
    )
    assert int(run().step) == 2
    assert early_stopping.step == 0
    assert run.saved == [(2, 2.0, None)]


def test_a_signal_while_step_0_is_evaluated_leaves_that_to_the_resumed_run(tmp_path, watchdog):
    def interrupted(step, state):
        os.kill(os.getpid(), signal.SIGTERM)
        watchdog.check()

    first = Run(tmp_path, watchdog, hooks=(Hook(5, interrupted),), unfinished={})
    with pytest.raises(Stopped, match="saved at step 0"):
        first()
    assert first.saved == [(0, 0.0, {}), "waited"]
    assert first.rows == []
    watchdog.requested = False
    second = Run(tmp_path, watchdog, hooks=(scores(3, 2, 1, every=5),), unfinished=first.saved[0][2])
    second()
    assert [row["step"] for row in second.rows] == [0, 2, 4, 5, 6, 8, 10]
    assert second.rows[0]["eval/loss"] == 3


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, watchdog):
    run = Run(tmp_path, watchdog, train_step=lambda state, batch: count_step(state, batch, bad_from=6))
    with pytest.raises(
        NumericsError, match=r"3 steps in a row, up to step 8 .*unchanged since step 5.*learning_rate"
    ) as error:
        run()
    assert error.value.exit_code == 70


def test_a_source_may_sum_metrics_over_steps(tmp_path, watchdog):
    class Sums(Numbers):
        total = 0

        def merge(self, step, metrics):
            self.total = metrics["loss"] + self.total
            return metrics | {"loss": self.total}

    run = Run(tmp_path, watchdog, source=Sums())
    run()
    assert [row["train/loss"] for row in run.rows] == [100.5, 101.5, 102.5, 103.5, 104.5]  # of all so far


def test_skipped_steps_do_not_move_the_learning_rate(tmp_path, watchdog):
    run = Run(
        tmp_path,
        watchdog,
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
def test_a_profile_that_was_started_is_stopped(tmp_path, watchdog, monkeypatch, profile, start, traced):
    calls, run = [], Run(tmp_path, watchdog, start=start, profile=profile)
    original, steps = run.loop._profile, []
    monkeypatch.setattr(run.loop, "_profile", lambda step: (steps.append(step), original(step)))
    monkeypatch.setattr("jax.profiler.start_trace", lambda _: calls.append(f"start {steps[-1]}"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(f"stop {steps[-1]}"))
    run()
    assert calls == traced


def test_a_best_metric_that_no_hook_measures_is_an_error(tmp_path, watchdog):
    early_stopping = EarlyStopping("eval/los", highest=False, patience=0)
    hook = Hook(5, lambda step, state: {"eval/loss": 1.0})
    with pytest.raises(ConfigError, match="best_metric=eval/los is not measured, did you mean 'eval/loss'"):
        Run(
            tmp_path, watchdog, hooks=(hook,), early_stopping=early_stopping, unfinished={}, evaluate_every=5
        )()
