"""A batch is a pure function of (seed, step), whatever the number of processes that share it."""

import builtins
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest

from jaxllm.batches import TokenBatch
from jaxllm.data.loader import device_batches, evaluation_batches, shares, training_batches
from jaxllm.data.windows import Windows, pack
from jaxllm.errors import ConfigError, DataError

T = 4


def windows_of(count: int, first: int = 0) -> Windows:
    """`count` full windows; the first token of each is its number, from `first` on."""
    tokens = np.repeat(np.arange(first, first + count + 1), T)[: count * T + 1]
    return pack(tokens, np.array([0]), np.array([len(tokens)]), sequence_length=T, pad_id=0)


def rows_of(batch: TokenBatch) -> list[int]:
    return batch.tokens[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_iterating_from_a_step_gives_the_same_batches_as_indexing(batch_size):
    batches = training_batches([windows_of(10)], batch_size=batch_size, seed=3)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for start in (0, 5):
        iterated = list(islice(device_batches(batches, sharding, start_step=start), 6))
        for step, batch in enumerate(iterated, start):
            jax.tree.map(np.testing.assert_array_equal, batch, batches[step])


def test_only_the_seed_determines_the_order():
    def first_rows(seed):
        batches = training_batches([windows_of(100)], batch_size=10, seed=seed)
        return [rows_of(batches[step]) for step in range(5)]

    assert first_rows(0) == first_rows(0) != first_rows(1)


def test_an_epoch_has_each_window_once_and_the_next_in_another_order():
    batches = training_batches([windows_of(8), windows_of(4, first=8)], batch_size=4, seed=0)
    epochs = [
        [i for step in range(start, start + 3) for i in rows_of(batches[step])] for start in (0, 3, 3000)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(12))


@pytest.mark.parametrize("weights", [(), (1.0, 2.0)])
def test_a_process_reads_its_own_rows_of_the_same_batch(weights):
    def batches(own=None):
        sources = [windows_of(20), windows_of(20, first=100)]
        return training_batches(sources, weights=weights, batch_size=8, seed=1, own=own)

    for step in (0, 1, 17):
        whole = rows_of(batches()[step])
        for own in (range(4), [2, 3, 6, 7], range(8)):
            assert rows_of(batches(own)[step]) == [whole[row] for row in own]
            assert next(iter(batches(own)[step:].to_iter_dataset())).tokens.shape == (len(own), T)


def test_weights_are_shares_of_the_rows_whatever_the_sizes():
    batches = training_batches(
        [windows_of(10), windows_of(200, first=1000)], weights=(3.0, 1.0), batch_size=8, seed=0
    )
    rows = [i for step in range(10) for i in rows_of(batches[step])]
    small = Counter(i for i in rows if i < 1000)
    assert small == dict.fromkeys(range(10), 6)  # 60 of 80 rows, each window equally often
    large = [i for i in rows if i >= 1000]
    assert len(set(large)) == 20
    assert large != sorted(large)


def test_evaluation_has_every_window_once_and_fills_up_with_blank_rows():
    batches = evaluation_batches([windows_of(4), windows_of(3, first=4)], batch_size=3)
    assert len(batches) == 3
    assert [rows_of(batch) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert [batch.mask.any(axis=1).tolist() for batch in batches][-1] == [True, False, False]
    assert all(batch.mask.all() for batch in list(batches)[:2])


def test_processes_have_equal_numbers_of_evaluation_batches():
    parts = [evaluation_batches([windows_of(5)], batch_size=4, own=own) for own in ([0, 1], [2, 3])]
    assert [[rows_of(batch) for batch in part] for part in parts] == [[[0, 1], [4, 0]], [[2, 3], [0, 0]]]


def test_device_batches_are_global_arrays_and_end_with_the_data():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batches = evaluation_batches([windows_of(20)], batch_size=8)
    placed = list(device_batches(batches, sharding))
    assert len(placed) == 3
    assert all(values.sharding == sharding and values.shape == (8, T) for b in placed for values in b)
    assert list(device_batches(batches, sharding, start_step=3)) == []


def test_one_batch_is_placed_before_it_is_requested(monkeypatch):
    placed = []
    make = jax.make_array_from_process_local_data
    monkeypatch.setattr(
        jax, "make_array_from_process_local_data", lambda s, x: (placed.append(1), make(s, x))[1]
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = device_batches(training_batches([windows_of(8)], batch_size=4, seed=0), sharding)
    fields = len(TokenBatch._fields)
    next(batches)
    assert len(placed) == 2 * fields
    next(batches)
    assert len(placed) == 3 * fields


def test_fewer_windows_than_a_batch_is_an_error_with_both_numbers():
    with pytest.raises(
        DataError, match=r"has 5 rows of data.sequence_length=4, fewer than data.batch_size=8; lower"
    ):
        training_batches([windows_of(3), windows_of(2)], batch_size=8, seed=0)
    training_batches([windows_of(8)], batch_size=8, seed=0)


def test_without_grain_the_error_has_the_pip_command(monkeypatch):
    real_import = builtins.__import__

    def no_grain(name, *args, **kwargs):
        if name.split(".")[0] == "grain":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_grain)
    with pytest.raises(ConfigError, match="pip install grain"):
        training_batches([windows_of(9)], batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([600, 600], 496, [248, 248]),
        ([600], 496, [496]),
        ([900, 300], 100, [75, 25]),
        ([1000, 2], 100, [99, 1]),  # a small source is not left out
        ([30, 20], None, [30, 20]),
        ([30, 20], 64, [30, 20]),
    ],
)
def test_every_source_has_its_share_of_the_rows_to_evaluate_on(lengths, limit, expected):
    assert shares(lengths, limit) == expected


def test_an_evaluation_of_some_rows_has_the_first_rows_of_every_source():
    sources = [windows_of(6), windows_of(6, first=100)]
    batches = evaluation_batches(sources, batch_size=4, max_rows=8)
    assert [row for batch in batches for row in rows_of(batch)] == [0, 1, 2, 3, 100, 101, 102, 103]
