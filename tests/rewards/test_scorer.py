"""Functions that fail or cannot read the rows are found before a run starts, or end it."""

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest

from jaxllm.errors import ConfigError, DataError
from jaxllm.rewards import pool
from jaxllm.rewards.load import load_reward
from jaxllm.rewards.scorer import TRIAL, RewardConfig, RewardScorer
from jaxllm.rewards.worker import call

FUNCTIONS = """
from jaxllm.rewards.math_answer import math_answer

def length(example, completion):
    return float(len(completion))

def column(example, completion):
    return float(example["answer"])

def trial_only(example, completion):
    return 1.0 if "boxed" in completion else 1 / 0

def nothing(example, completion):
    return None
"""


class InProcess:
    """A worker without a process."""

    def __init__(self, rewards, time_limit):
        self.rewards = [load_reward(name) for name in rewards]

    def score(self, request, calls):
        samples = json.loads(request)
        return [call(reward, example, text) for example, text in samples for reward in self.rewards]

    def close(self):
        pass

    reap = close


@pytest.fixture
def scorer_of(tmp_path, monkeypatch):
    """A scorer of functions of a user's file."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.setattr(pool, "_Worker", InProcess)

    def make(*names):
        config = RewardConfig(
            functions=tuple(f"{tmp_path}/mine.py:{name}" for name in names),
            weights=(1.0,) * len(names),
            model=None,
            model_weight=1.0,
            normalize=False,
            workers=1,
            time_limit=5.0,
            error_reward=0.0,
            overlong_buffer=0,
            missing_eos_penalty=0.0,
        )
        return RewardScorer(config, None)

    return make


def score(scorer, *texts):
    scoring = scorer.begin([{}] * len(texts))
    scoring.add(range(len(texts)), texts)
    return scorer.finish(scoring.result(lambda: None), np.zeros((len(texts), 1)), np.ones(len(texts)))


# Before a run


def test_functions_that_fail_on_the_first_rows_are_an_error_that_names_the_columns(scorer_of):
    rows = [{"prompt": "a", "solution": "1"}] * 9
    with pytest.raises(ConfigError) as raised:
        scorer_of("column", "math_answer").try_out(rows)
    message = str(raised.value)
    assert "every call failed, on the first 4 rows: reward 'column': KeyError: 'answer' (" in message
    assert "the row has prompt, solution; reward 'math_answer': KeyError" in message
    assert "rename the column that it reads" in message
    assert "\n" not in message


def test_one_function_that_fails_is_said_once(scorer_of, capsys):
    with scorer_of("column", "length") as scorer:
        scorer.try_out([{"prompt": "a"}])
        score(scorer, "a")
    lines = [line for line in capsys.readouterr().out.splitlines() if "KeyError" in line]
    assert len(lines) == 2  # the row of the second call has other columns
    assert lines[0].startswith("reward 'column': KeyError: 'answer'")


@pytest.mark.parametrize("rows", [[{}, {"answer": "1"}], [{"answer": "1"}, {}]])
def test_a_function_that_fails_on_some_rows_may_run(scorer_of, rows):
    scorer_of("column").try_out(rows)


def test_a_row_that_json_cannot_hold_is_an_error(scorer_of):
    for functions in ((), ("length",)):  # evaluation writes rows without rewards too
        with pytest.raises(DataError, match="column 'answer' cannot be written as JSON: Object of type set"):
            scorer_of(*functions).try_out([{"prompt": "a", "answer": {1}}])


def test_rewards_of_this_package_can_read_the_trial():
    rows = {"answer": "1", "nums": [1], "target": 1}
    for name in ("math_answer", "countdown", "format"):
        assert load_reward(name)(rows, TRIAL) == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, tzinfo=UTC), "2026-01-02T03:04:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4), "03:04:00"),
        (timedelta(hours=1), "1:00:00"),
        (Decimal("18.50"), "18.50"),
        (b"caf\xc3\xa9", "café"),
        (b"\xff", "/w=="),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (np.float32(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        ([{"a": Decimal("1")}], [{"a": "1"}]),
    ],
)
def test_what_json_has_no_type_for_reaches_a_reward_as_text(value, text):
    assert json.loads(json.dumps({"x": value}, default=pool.json_value)) == {"x": text}
    (request,) = pool_requests([{"x": value}])
    assert request[0][0] == {"x": text}


def pool_requests(rows):
    """What a pool sends to its workers for these rows."""
    sent = []

    class Recorder(InProcess):
        def score(self, request, calls):
            sent.append(json.loads(request))
            return super().score(request, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_Worker", Recorder)
        options = {"workers": 1, "time_limit": 1.0, "error_reward": 0.0}
        with pool.RewardPool({"length": "length"}, weights={"length": 1.0}, **options) as rewards:
            rewards.submit(rows, [""] * len(rows)).result()
    return sent


# In a run


def test_functions_that_all_fail_on_all_completions_end_the_run(scorer_of):
    with scorer_of("trial_only", "column") as scorer:
        scorer.try_out([{"answer": "1"}])
        with pytest.raises(
            ConfigError, match=r"every call failed, on all 3 completions: .*ZeroDivisionError"
        ):
            score(scorer, "a", "b", "c")


def test_a_function_that_fails_on_all_completions_is_said_in_words(scorer_of, capsys):
    with scorer_of("trial_only", "length") as scorer:
        for _ in range(2):
            score(scorer, "a", "b")
    assert capsys.readouterr().out.count("reward 'trial_only' failed on all 2 completions") == 1


def test_functions_that_fail_after_they_have_not_do_not_end_the_run(scorer_of):
    with scorer_of("trial_only") as scorer:
        score(scorer, TRIAL, "a")
        assert score(scorer, "a").failures == {"trial_only": 1}


def test_a_function_that_abstains_does_not_fail(scorer_of):
    with scorer_of("nothing") as scorer:
        assert score(scorer, "a", "b").failures == {"nothing": 0}
