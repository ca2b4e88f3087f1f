"""The reference scores every pair once, whatever stops it in between."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxllm.data.examples import Example
from jaxllm.data.preferences import PairRows
from jaxllm.errors import Stopped
from jaxllm.evaluation.reference import reference_log_probs

pytestmark = pytest.mark.usefixtures("cache")


def pairs(lengths) -> PairRows:
    ids = [(np.ones(length, np.int32), np.ones(length + 1, np.int32)) for length in lengths]
    rows = [Example(each, (), "", "", (1.0, 0.0, 1.0)) for each in ids]
    return PairRows(rows, np.zeros((len(rows), 2), np.float32), 32, 0)


SOURCES = (pairs(range(1, 8)), pairs(range(11, 15)))  # 7 and 4 pairs: batches of 2, the last of them padded
EXPECTED = [[n, n + 1] for n in (*range(1, 8), *range(11, 15))]


@pytest.fixture
def score_all(tmp_path):
    def run(score, key="a"):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        options = {"batch_size": 2, "sharding": sharding, "run_folder": tmp_path}
        return reference_log_probs(key, SOURCES, lambda: score, **options).tolist()

    return run


def lengths(batch):
    return batch.lengths.astype(np.float32)


def never(_):
    raise AssertionError("it was scored again")


def test_every_pair_is_scored_once_and_kept_between_runs(score_all, cache):
    assert score_all(lengths) == EXPECTED
    assert score_all(never) == EXPECTED
    assert [path.name for path in cache.iterdir()] == ["reference-a.npy"]
    with pytest.raises(AssertionError):
        score_all(never, key="b")


@pytest.mark.parametrize("after", [1, 3, 4, 5, 6])
def test_a_signal_stops_it_after_the_batch_and_the_next_run_continues(score_all, after, capsys):
    scored = []

    def stopped(batch):
        scored.append(batch)
        if len(scored) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return lengths(batch)

    with pytest.raises(Stopped) as error:
        score_all(stopped)
    assert Stopped.exit_code == 75
    done = min(2 * after, 7) + 2 * max(0, after - 4)
    assert str(error.value).startswith(
        f"by a signal, with the reference's log-probs of {done} of 11 pairs saved; resume"
    )
    scored.clear()
    assert score_all(lambda batch: scored.append(batch) or lengths(batch)) == EXPECTED
    assert len(scored) == 6 - after
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_another_failure_leaves_is_continued_too(score_all):
    scored = []

    def fails(batch):
        scored.append(batch)
        if len(scored) == 3:
            raise RuntimeError("out of memory")
        return lengths(batch)

    with pytest.raises(RuntimeError):
        score_all(fails)
    scored.clear()
    assert score_all(lambda batch: scored.append(batch) or lengths(batch)) == EXPECTED
    assert len(scored) == 4


def test_a_damaged_file_is_scored_again(score_all, cache):
    score_all(lengths)
    file = cache / "reference-a.npy"
    file.write_bytes(file.read_bytes()[:-4])
    assert score_all(lengths) == EXPECTED
