"""A whole run in this process: what it says, what it leaves, and what it never does twice."""

import json
import random
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.run import Program, dry_run, find_stage, train
from jaxllm.config import load_config, override, parse
from jaxllm.errors import ConfigError, DataError
from jaxllm.training.checkpoint import find_checkpoint, read_arrays
from jaxllm.training.metrics import read_metrics

CONFIG = str(Path(__file__).parents[1] / "configs" / "pretrain_text.py:tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a small text that repeats itself, some of it in rows that cannot be used."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    sentences = [f"The {a} saw the {b}." for a in ("cat", "dog", "bird") for b in ("ball", "tree", "moon")]
    rows = [
        json.dumps({"text": " ".join(draw.choices(sentences, k=draw.randrange(2, 9)))}) for _ in range(400)
    ]
    (folder / "good.jsonl").write_text("\n".join(rows))
    (folder / "bad.jsonl").write_text("\n".join([*rows, '{"txt": "lost"}']))
    return folder


def make_config(text, **changes):
    config = load_config(CONFIG)
    fields = {
        "data__train": str(text / "good.jsonl"),
        "data__cache_dir": str(text / "cache"),
        "data__sequence_length": "32",
        "model__num_layers": "1",
        "model__width": "32",
        "training__steps": "8",
        "training__log_every": "2",
        "training__evaluate_every": "4",
        "training__sample_every": "4",
        "training__checkpoint_every": "4",
        "optimizer__warmup_steps": "2",
        "optimizer__name": "adamw",
        "optimizer__schedule": "constant",
        "sample__sampling__max_new_tokens": "4",
    }
    for field, value in (fields | changes).items():
        override(config, find_stage(config.stage).Config, field.replace("__", "."), value)
    return parse(find_stage(config.stage).Config, config)


def run(config, workdir, **changes):
    arguments = {"resume": "auto", "init_from": None, "profile": None, "command": ["python", "train.py"]}
    train(config, workdir=str(workdir), **arguments | changes)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    run(make_config(text), workdir)
    return workdir


def test_it_learns(finished):
    first, *_, last = read_metrics(finished / "metrics.jsonl")
    assert first["step"] == 0  # random weights
    assert last["eval/bits_per_byte"] < first["eval/bits_per_byte"]
    assert last["train/loss"] < np.log(500) - 0.5


def test_more_steps_mean_no_more_compilations(finished, text, tmp_path):
    compilations = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for steps in ("8", "16"):  # not the first run of the process, which compiles its odds and ends
            compilations.append(0)
            run(make_config(text, training__steps=steps), tmp_path / steps)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert read_metrics(tmp_path / "16" / "metrics.jsonl")[-1]["step"] == 16
    assert compilations[0] == compilations[1] > 0


def test_the_checkpoint_knows_all_that_is_needed_to_use_it(finished, text):
    folder = find_checkpoint(finished)
    assert folder.name == "8"
    assert json.loads((folder / "config.json").read_text())["data"]["train"] == [str(text / "good.jsonl")]
    assert (folder / "tokenizer.model").read_bytes() == (finished / "tokenizer.model").read_bytes()
    metadata, record = (
        json.loads(path.read_text()) for path in (folder / "metadata.json", finished / "run.json")
    )
    assert metadata["run"] == record["id"]
    assert metadata["tokenizer"] == record["fingerprints"]["tokenizer"]


def test_weights_of_another_run_begin_a_new_one_and_are_named_as_its_parent(finished, text, tmp_path):
    config = make_config(text, training__steps="3", optimizer__learning_rate="0.0")
    run(config, tmp_path / "child", init_from=str(finished))
    program = Program(config)
    given, child = (
        read_arrays(find_checkpoint(path), program.abstract_state.params, prefix="params")
        for path in (finished, tmp_path / "child")
    )
    jax.tree.map(np.testing.assert_array_equal, given, child)
    record = json.loads((tmp_path / "child" / "run.json").read_text())
    assert record["parent"]["path"] == str(find_checkpoint(finished))


def test_a_bad_row_stops_the_run_or_is_written_down(text, tmp_path):
    bad = {"data__train": str(text / "bad.jsonl"), "training__steps": "3"}
    with pytest.raises(DataError, match=r"bad.jsonl:401: missing key .*did you mean 'txt'"):
        run(make_config(text, **bad), tmp_path / "stopped")
    run(make_config(text, data__on_bad_row="skip", **bad), tmp_path / "skipped")
    (row,) = (tmp_path / "skipped" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(row)["where"].endswith("bad.jsonl:401")


def test_a_tokenizer_larger_than_the_model_s_vocabulary_is_refused(finished, text, tmp_path):
    config = make_config(text, model__vocab_size="300", tokenizer__path=str(finished / "tokenizer.model"))
    with pytest.raises((ConfigError, DataError), match="vocab_size"):
        run(config, tmp_path / "small")


def test_a_run_on_a_mesh_prints_what_it_does_first(text, tmp_path, capsys):
    config = make_config(text, training__steps="3", mesh__data="2", mesh__fsdp="2", mesh__tensor="2")
    run(config, tmp_path / "mesh")
    printed = capsys.readouterr().out
    for line in (
        r"devices: 8 x cpu \(cpu\), mesh data=2 x fsdp=2 x tensor=2",
        r"model: [\d,]+ parameters",
        r"batch: 8 rows, 256 tokens of 32 a sequence; 2 rows a device at a time",
        r"400 rows read, 400 kept",
        r"example .*⟦",
        r"run folder: .*/mesh",
        r"fresh run",
        r"compiling the train step",
        r"step 2/3  loss",
        r"saved step 3",
        r"done: 3 steps",
    ):
        assert re.search(line, printed), line


def test_a_dry_run_says_what_a_step_takes(text):
    program = Program(make_config(text))
    report = dry_run(program)
    state = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state.params)) * 3
    )
    (held,) = re.findall(r"= ([\d.]+) GB state and batch", report)
    assert float(held) == pytest.approx(state / 1e9, abs=0.001)  # weights and Adam's two moments
    assert "FLOPs a token" in report
    assert "training.num_microbatches" in report
