"""Rewards in processes: whatever one call does, the others are scored, and no process is left running."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxllm.errors import ConfigError, DataError
from jaxllm.rewards.pool import RewardPool, Scores, gather

# A completion names what the reward does; for any other the reward is its length.
HOSTILE = """
import os, re, sys, time
import numpy as np

RETURNED = {
    "None": None, "nan": float("nan"), "inf": float("inf"), "1e39": 1e39, "str": "1.0", "dict": {},
    "list": [1.0, 2.0], "empty": (), "array": np.ones(1), "True": True, "float32": np.float32(0.5),
    "int64": np.int64(2), "bool": np.bool_(True), "huge": 10**400,
}

def reward(example, completion):
    if completion == "hang": time.sleep(60)
    if completion == "hang and hold the lock": re.match("(a+)+$", "a" * 60 + "b")
    if completion == "raise": raise ValueError("no\\nsuch luck")
    if completion == "exit": sys.exit(3)
    if completion == "die": os._exit(3)
    if completion == "recurse": return reward(example, completion)
    if completion == "print": print("x" * 10**6); os.write(1, b"x" * 10**6)
    if completion == "read": sys.stdin.read()
    if completion == "jax?": return float("jax" in sys.modules)
    if completion == "start a process and die":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "61")
        os._exit(3)
    if completion == "start a process and hang":
        child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "61")
        open(example["file"], "w").write(f"{os.getpid()} {child} ")
        time.sleep(60)
    return RETURNED.get(completion, len(completion))

def ten(example, completion):
    return 10.0 if example["ten"] else None
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "hostile.py"
    path.write_text(HOSTILE)
    return f"{path}:reward"


def pool_of(reward, *, time_limit=20.0, workers=1):
    return RewardPool(
        {"mine": reward}, weights={"mine": 1.0}, workers=workers, time_limit=time_limit, error_reward=-1.0
    )


@pytest.fixture(scope="module")
def pool(hostile):
    with pool_of(hostile) as pool:
        yield pool


def score(pool, *completions):
    return pool.submit([{}] * len(completions), completions).result()


def is_running(pid):
    """Whether a thread of the process still runs: one that has ended but is not yet waited for does not."""
    try:
        states = [
            stat.read_text().rpartition(") ")[2][0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")
        ]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(state not in "ZX" for state in states)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# Scores


def test_the_total_is_the_weighted_sum_of_the_rewards_that_apply(hostile):
    rewards = {"mine": hostile, "ten": hostile.replace(":reward", ":ten")}
    weights = {"ten": 2.0, "mine": 0.5}
    with RewardPool(rewards, weights=weights, workers=2, time_limit=20.0, error_reward=-1.0) as pool:
        examples = [{"ten": True}, {"ten": False}, {"ten": False}, {"ten": True}]
        scores = pool.submit(examples, ["abc", "abc", "None", "raise"]).result()
    np.testing.assert_array_equal(scores.by_name["mine"], np.float32([3, 3, np.nan, -1]))
    np.testing.assert_array_equal(scores.by_name["ten"], np.float32([10, np.nan, np.nan, 10]))
    np.testing.assert_array_equal(scores.total, np.float32([21.5, 1.5, 0, 19.5]))
    assert scores.valid.tolist() == [True, True, False, True]  # no reward applies to the third
    assert scores.total.dtype == scores.by_name["ten"].dtype == np.float32
    assert scores.counters == {"reward/timeouts": 0, "reward/errors": 1}  # to abstain is no error
    assert len(scores.messages) == 1


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_without_error_reward_a_failed_call_makes_its_sample_invalid(hostile, weight):
    rewards = {"mine": hostile, "ten": hostile.replace(":reward", ":ten")}
    weights = {
        "mine": weight,
        "ten": 2.0,
    }  # one of weight 0 is only logged: whether it fails makes no difference
    with RewardPool(rewards, weights=weights, workers=1, time_limit=20.0, error_reward=None) as pool:
        scores = pool.submit([{"ten": True}, {"ten": True}, {"ten": False}], ["raise", "abc", "abc"]).result()
    np.testing.assert_array_equal(scores.by_name["mine"], np.float32([np.nan, 3, 3]))
    assert scores.valid.tolist() == [weight == 0, True, weight != 0]
    assert scores.counters == {"reward/timeouts": 0, "reward/errors": 1}


def test_numbers_of_any_kind_are_rewards(pool):
    scores = score(pool, "True", "bool", "float32", "int64")
    assert scores.total.tolist() == [1.0, 1.0, 0.5, 2.0]
    assert scores.messages == []


def test_no_samples_give_no_scores(pool):
    scores = score(pool)
    assert scores.total.shape == scores.by_name["mine"].shape == (0,)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_in_the_order_of_the_samples(hostile, workers):
    completions = ["x" * (7 * i % 23) for i in range(100)]
    with pool_of(hostile, workers=workers) as pool:
        handles = [pool.submit([{}] * 100, completions[i:] + completions[:i]) for i in (0, 50)]
        second, first = handles[1].result(), handles[0].result()
    assert first.total.tolist() == [len(each) for each in completions]
    assert second.total.tolist() == [len(each) for each in completions[50:] + completions[:50]]


def scores_of(*total, errors=0, messages=()):
    """Scores of one reward that is half the total."""
    total = np.float32(total)
    counters, valid = {"reward/errors": errors}, total > 1
    return Scores(total, {"half": total / 2}, valid, ~valid, counters, list(messages))


def test_rows_of_several_scores_are_gathered_in_the_given_order():
    parts = [scores_of(1, 2, errors=1, messages="ab"), scores_of(), scores_of(3, errors=2, messages="bc")]
    gathered = gather(parts, [2, 0, 0])
    np.testing.assert_array_equal(gathered.total, np.float32([3, 1, 1]))
    np.testing.assert_array_equal(gathered.by_name["half"], np.float32([1.5, 0.5, 0.5]))
    assert gathered.valid.tolist() == gathered.applies.tolist() == [True, False, False]
    assert gathered.counters == {"reward/errors": 3}  # of all calls, including rows that are left out
    assert gathered.messages == ["a", "b", "c"]


def test_of_many_messages_the_first_few_are_kept():
    assert gather([scores_of(messages="abc"), scores_of(messages="defg")], []).messages == list("abcde")


# Faults

AROUND = ["x" * score for score in range(10)]  # sent to the worker three at a time


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("raise", r"reward 'mine': ValueError: no such luck \(.*hostile.py:14\)"),
        ("exit", "SystemExit: 3"),
        ("die", "its process ended"),
        ("start a process and die", "its process ended"),
        ("recurse", "RecursionError"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("1e39", r"returned 1e\+39"),  # finite in float64, but not in float32
        ("huge", "OverflowError"),
        ("str", "returned a str, not a number"),
        ("dict", "returned a dict, not a number"),
    ],
)
def test_a_fault_is_counted_and_the_sample_gets_the_error_reward(pool, completion, message):
    scores = score(pool, *AROUND[:4], completion, *AROUND[5:])
    assert scores.total.tolist() == scores.by_name["mine"].tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9]
    assert scores.counters == {"reward/timeouts": 0, "reward/errors": 1}
    assert re.search(message, scores.messages[0])


@pytest.mark.parametrize(
    ("completion", "returned"), [("list", "list of 2"), ("empty", "tuple of 0"), ("array", "ndarray of 1")]
)
def test_the_wrong_number_of_values_is_an_error_that_names_the_function(pool, completion, returned):
    message = rf"hostile.py:reward': returned a {returned} values; it must return one number"
    with pytest.raises(ConfigError, match=message):
        score(pool, "ab", completion)


@pytest.mark.parametrize("completion", ["hang", "hang and hold the lock"])
def test_a_call_over_its_time_limit_is_killed_and_the_others_are_scored(hostile, completion):
    with pool_of(hostile, time_limit=0.5) as pool:
        score(pool, "a")  # the process has started
        began = time.monotonic()
        scores = score(pool, *AROUND[:4], completion, *AROUND[5:])
        assert 0.5 < time.monotonic() - began < 3.0
        assert scores.total.tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9]
        assert scores.counters == {"reward/timeouts": 1, "reward/errors": 0}
        assert scores.messages == ["reward 'mine': took more than 0.5 s and was killed"]
        assert score(pool, "abc").total.tolist() == [3.0]


def test_the_time_limit_is_for_one_call(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef reward(*_): time.sleep(0.4); return 1\n")
    with pool_of(f"{tmp_path}/slow.py:reward", time_limit=0.7) as pool:
        assert score(pool, *"aaaaa").total.tolist() == [1.0] * 5  # sent to the worker two at a time


def test_what_a_reward_prints_or_reads_does_no_harm(hostile, capfd):
    terminal, (nothing_to_read, held_open) = os.dup(0), os.pipe()
    os.dup2(nothing_to_read, 0)
    with pool_of(hostile, time_limit=5.0) as pool:
        assert score(pool, "print", "read", "a").total.tolist() == [5.0, 4.0, 1.0]
    os.dup2(terminal, 0)
    for each in (terminal, nothing_to_read, held_open):
        os.close(each)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err) > 10**6


def test_equal_messages_are_reported_once(pool):
    assert len(score(pool, *["raise"] * 50).messages) == 1


def test_a_process_killed_from_outside_is_replaced_silently(hostile, tmp_path):
    (tmp_path / "pid.py").write_text("import os\ndef reward(*_): return os.getpid()\n")
    with pool_of(f"{tmp_path}/pid.py:reward") as pool:
        (pid,) = score(pool, "").total
        os.kill(int(pid), signal.SIGKILL)
        assert wait_until(lambda: not is_running(int(pid)), 5)
        scores = score(pool, "")
    assert scores.total != pid
    assert scores.messages == []


# Checks before a process is started


def test_a_reward_that_cannot_be_loaded_is_an_error_when_the_pool_is_made(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(example, completion):\n    return (\n")
    with pytest.raises(ConfigError, match=r"mine.py:2: SyntaxError"):
        pool_of(f"{tmp_path}/mine.py:reward")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": {}, "weights": {}}, "rewards must have at least one entry"),
        ({"weights": {"lenght": 1.0}}, "weights.lenght: there is no such reward, did you mean 'length'?"),
        ({"weights": {}}, "weights.length: the reward 'length' needs a finite weight"),
        ({"weights": {"length": float("nan")}}, "weights.length: the reward 'length' needs a finite weight"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"time_limit": 0.0}, "time_limit=0.0 must be a positive"),
        ({"time_limit": float("inf")}, "time_limit=inf must be a positive"),
        ({"error_reward": float("nan")}, "error_reward=nan must be finite"),
    ],
)
def test_invalid_arguments_are_named(changed, message):
    fields = {"rewards": {"length": "length"}, "weights": {"length": 1.0}}
    fields |= {"workers": 1, "time_limit": 1.0, "error_reward": 0.0} | changed
    with pytest.raises(ConfigError, match=re.escape(message)):
        RewardPool(fields.pop("rewards"), **fields)


def test_invalid_samples_are_errors(pool):
    with pytest.raises(ValueError, match="shorter"):
        pool.submit([{}, {}], ["a"])
    with pytest.raises(DataError, match="must be representable in JSON: Object of type set"):
        pool.submit([{"numbers": {1, 2}}], ["a"])


# Processes


def test_workers_do_not_import_jax(pool):
    assert score(pool, "jax?").total.tolist() == [0.0]


def test_a_worker_outlives_a_pause_between_batches(tmp_path):
    (tmp_path / "pid.py").write_text("import os\ndef reward(*_): return os.getpid()\n")
    with pool_of(f"{tmp_path}/pid.py:reward", time_limit=0.1) as pool:
        before = score(pool, "").total
        time.sleep(3.5)  # longer than a worker without a pool would live
        assert score(pool, "").total == before


def test_submit_returns_while_scores_are_computed(hostile):
    with pool_of(hostile, time_limit=0.7) as pool:
        began = time.monotonic()
        handle = pool.submit([{}], ["hang"])
        assert time.monotonic() - began < 0.5
        assert wait_until(lambda: all(future.done() for future in handle.futures), 10)


def test_check_may_raise_while_waiting_and_no_process_is_left(hostile, tmp_path):
    file = tmp_path / "pids"
    calls = []

    def check():
        calls.append(time.monotonic())
        if file.exists() and file.read_text().endswith(" "):
            raise KeyboardInterrupt

    with pool_of(hostile, time_limit=60.0) as pool:
        handle = pool.submit([{"file": str(file)}] * 9, ["start a process and hang"] * 9)
        with pytest.raises(KeyboardInterrupt):
            handle.result(check)
        pids = file.read_text().split()
        assert all(map(is_running, pids))
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    assert max(np.diff(calls), default=0.0) < 0.5
    assert wait_until(lambda: not any(map(is_running, pids)), 5)


SCRIPT = """
import sys
from jaxllm.rewards.pool import RewardPool, Scores, gather

if __name__ == "__main__":
    fields = dict(weights={"mine": 1.0}, workers=1, time_limit=float(sys.argv[3]), error_reward=0.0)
    with RewardPool({"mine": sys.argv[1]}, **fields) as pool:
        pool.submit([{"file": sys.argv[2]}], ["start a process and hang"]).result()
"""


@pytest.mark.parametrize(
    ("number", "time_limit", "seconds"), [(signal.SIGINT, 60, 5), (signal.SIGKILL, 0.5, 10)]
)
def test_no_worker_outlives_the_run(hostile, tmp_path, number, time_limit, seconds):
    """Ctrl-C ends the workers; if the run itself is killed, they end some seconds after the time limit."""
    (tmp_path / "run.py").write_text(SCRIPT)
    file = tmp_path / "pids"
    command = [sys.executable, str(tmp_path / "run.py"), hostile, str(file), str(time_limit)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert wait_until(lambda: file.exists() and file.read_text().endswith(" "), 20)
        worker, child = map(int, file.read_text().split())
        process.send_signal(number)
        process.wait(10)
    assert wait_until(lambda: not is_running(worker), seconds)
    if number == signal.SIGKILL:  # a child process of a reward is not killed then
        os.kill(child, signal.SIGKILL)


def test_workers_ignore_signals_to_the_run(hostile, tmp_path):
    file = tmp_path / "pids"
    with pool_of(hostile, time_limit=1.0) as pool:
        handle = pool.submit([{"file": str(file)}], ["start a process and hang"])
        assert wait_until(lambda: file.exists() and file.read_text().endswith(" "), 20)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(int(file.read_text().split()[0]), number)
        assert handle.result().counters == {"reward/timeouts": 1, "reward/errors": 0}


def test_math_verify_is_killed_where_it_would_not_return():
    with RewardPool(
        {"math": "math_verify"}, weights={"math": 1.0}, workers=1, time_limit=2.0, error_reward=0.0
    ) as pool:
        examples = [{"answer": r"\frac{3}{4}"}, {"answer": "#### 5"}, {"answer": "5"}, {"answer": "(1,2]"}]
        completions = [r"so $0.75$", r"\boxed{9^{9^{9^9}}}", r"\boxed{5}", r"$1<x\leq 2$ or \boxed{(1, 2]}"]
        scores = pool.submit(examples, completions).result()
    assert scores.total.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert scores.counters == {"reward/timeouts": 1, "reward/errors": 0}
