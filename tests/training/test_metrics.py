"""Names, files and throughput of a run's metrics."""

import contextlib
import json
import os
import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from configs.base.models import model
from jaxllm.config import parse
from jaxllm.losses import Weighted
from jaxllm.models import ModelConfig, build_model
from jaxllm.models.config import flops_per_token
from jaxllm.training.metrics import (
    MetricWriter,
    Throughput,
    parameter_count,
    peak_flops,
    read_metrics,
    to_scalars,
)


def tensorboard_scalars(folder):
    """(tag, step, value) of every event file, read record by record."""
    found = []
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return sorted(found)


def test_scalars_are_sums_over_weights_under_their_area():
    metrics = {
        "loss": Weighted(jnp.float32(6), jnp.float32(4)),
        "empty": Weighted(jnp.float32(0), jnp.float32(0)),
    }
    assert to_scalars(metrics, "train") == {"train/loss": 1.5, "train/empty": 0.0}


def test_rows_after_the_resumed_step_are_dropped_from_file_and_tensorboard(tmp_path):
    first = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # killed while it wrote a line
    (events,) = (tmp_path / "tb").glob("events.*")
    events.rename(
        events.with_name("events.out.tfevents.1.host")
    )  # the name contains the second of its creation
    second = MetricWriter(tmp_path, 2)
    second.write(3, {"train/loss": 0.25})
    second.close()
    rows = [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert tensorboard_scalars(tmp_path / "tb") == [("train/loss", *row) for row in rows]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "train/lo', b"\0" * 40, b"5", b'{"lost": 1}', b"\xff{", b"[]"]
)
def test_a_torn_line_costs_that_line_only(tmp_path, capsys, torn):
    rows = [b'{"step": 1}', torn, b'{"step": 3}', b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    MetricWriter(tmp_path, 3).close()
    assert capsys.readouterr().err.count("metrics.jsonl: 1 unreadable line(s) left out") == 2
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_of_a_step_with_two_rows_the_later_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 1, "x": 2}\n')
    MetricWriter(tmp_path, 1).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 2}]


def test_a_full_disk_is_named_and_stops_the_run_only_for_metrics_jsonl(tmp_path, caplog, capfd):
    writer = MetricWriter(tmp_path, 0)
    with open("/dev/full", "w") as full:  # every write fails with ENOSPC
        events = writer.tensorboard._py_recordio_writer._writer
        os.dup2(full.fileno(), events.fileno())
        writer.flush_every = 0
        writer.write(1, {"train/loss": 1.0})
        assert "writing to TensorBoard failed" in caplog.text
        os.dup2(full.fileno(), writer.file.fileno())
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
            writer.write(2, {"train/loss": 1.0})
    writer.close()
    with contextlib.suppress(OSError):
        events.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("last_step", "steps"), [(-1, []), (0, [0]), (1, [0, 1])])
def test_a_new_run_keeps_no_row_and_one_resumed_at_step_0_keeps_its_row(tmp_path, last_step, steps):
    writer = MetricWriter(tmp_path, -1)
    for step in (0, 1, 2):
        writer.write(step, {"eval/loss": 1.0})
    writer.close()
    MetricWriter(tmp_path, last_step).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == steps


def test_a_value_that_is_not_finite_is_null_in_the_file(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"train/loss": float("nan"), "train/grad_norm": 2.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "train/loss": None,
        "train/grad_norm": 2.0,
    }


def test_flops_are_six_a_weight_and_attention_by_hand():
    config = parse(
        ModelConfig, model("tiny")
    )  # 2 layers, width 64, heads 4 and 2 of 16, mlp 176, vocabulary 512
    block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176
    scores_and_sums = 2 * 2 * 64 * (100 / 2)  # q k and weights v: 2 FLOPs each, for half of 100 positions
    assert flops_per_token(config, 100) == 6 * (2 * block + 64 * 512) + 3 * 2 * scores_and_sums
    scorer = flops_per_token(config, 100, unembedded=0.0)
    assert scorer == flops_per_token(config, 100) - 6 * 64 * 512
    reward_model = flops_per_token(
        config, 100, unembedded=0.0, last_block=0.0
    )  # its last block: keys, values
    assert reward_model == 6 * (block + 2 * 64 * 32) + 3 * scores_and_sums
    # with adapters, no gradient of the frozen weights
    adapted = replace(config, lora=replace(config.lora, rank=4, targets="query|down"))
    adapters = 2 * 4 * ((64 + 64) + (176 + 64))
    expected = 4 * (2 * block + 64 * 512) + 6 * adapters + 3 * 2 * scores_and_sums
    assert flops_per_token(adapted, 100) == expected


def test_parameters_are_counted_by_shape():
    built = build_model(parse(ModelConfig, model("tiny")))
    block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176 + 2 * 64 + 2 * 16
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    assert parameter_count(shapes) == 2 * block + 512 * 64 + 64


@pytest.mark.parametrize(
    ("kind", "peak"),  # as JAX names devices
    [
        ("cpu", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 of another kind", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_a_device_in_the_table_has_the_peak_of_its_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_throughput_excludes_the_time_before_a_restart(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput(tokens_per_step=50, flops_per_token=1.0)
    throughput.restart()  # an evaluation took 100 s
    throughput.steps += 4
    throughput.tokens += 4 * 50
    row = throughput.read()
    assert row["perf/step_time"] == 0.5
    assert row["perf/tokens_per_second"] == 100.0
    assert throughput.read() == {}
