"""A run resumes with other settings of memory, speed and place, and says what they do."""

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import parse_config

from jaxllm.config import as_dict
from jaxllm.errors import ConfigError
from jaxllm.runs.resume import MAY_DIFFER, check_number_of_sources, parent_note, resume_notes
from jaxllm.training.run_folder import open_run, record_start

FIELDS = {
    "training.steps": 100,
    "data.train": "a.jsonl",
    "optimizer.schedule": "linear",
    "optimizer.learning_rate": 1.0,
    "optimizer.final_learning_rate": 0.0,
    "optimizer.warmup_steps": 0,
}


def make_config(stage="pretrain_text", **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return parse_config(f"{stage}.py:tiny", FIELDS | changes)


def notes(config, step=50):
    return list(resume_notes(as_dict(make_config()), config, Path("runs/a"), step, step))


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("training__num_microbatches", 2, "training.num_microbatches 1 -> 2: the bits may differ"),
        ("model__remat", "full", 'model.remat "none" -> "full": the bits may differ'),
        ("model__attention", "cudnn", 'model.attention "xla" -> "cudnn": the bits may differ'),
        ("model__scan_layers", "true", "model.scan_layers false -> true: the bits may differ"),
        ("mesh__fsdp", 2, "mesh.fsdp 1 -> 2: the bits may differ"),
        ("data__train", "b.jsonl", '["a.jsonl"] -> ["b.jsonl"]: moved, with the same content by fingerprint'),
        ("tokenizer__path", "t.json", 'null -> "t.json": not used, the run keeps its tokenizer'),
        ("training__log_every", 7, None),
    ],
)
def test_memory_speed_and_place_may_differ_and_it_is_said(tmp_path, field, value, line):
    run = open_run(str(tmp_path / "run"), as_dict(make_config()), resume="auto", may_differ=MAY_DIFFER)
    record_start(run, as_dict(make_config()), command=[], fingerprints={})
    if field == "model__attention":  # not with float32, which this size has
        model = dataclasses.replace(make_config().model, attention="cudnn")
        config = dataclasses.replace(make_config(), model=model)
    else:
        config = make_config(**{field: value})
    open_run(str(run.path), as_dict(config), resume="auto", may_differ=MAY_DIFFER)
    found = notes(config)
    assert len(found) == (line is not None)
    assert line is None or line in found[0]


def test_another_number_of_sources_is_an_error():
    config = make_config(data__train="a.jsonl,b.jsonl")
    with pytest.raises(ConfigError, match=r"data.train .*: a run that resumes must have as many sources"):
        check_number_of_sources(as_dict(make_config()), config)


def test_a_schedule_that_moves_is_said_with_both_rates():
    (line,) = notes(make_config(training__steps=1000))
    assert line == (
        "training.steps 100 -> 1000 moves the schedule: after step 50 the learning rate is 0.95 instead of "
        "0.5. For a schedule of its own start another run from these weights, with --init_from=runs/a"
    )
    assert notes(make_config(training__steps=1000), step=0) == []  # both begin at the peak


@pytest.mark.parametrize(
    ("init_from", "parent", "said"),
    [
        (None, "/r/sft/checkpoints/8", False),
        ("/r/sft", "/r/sft/checkpoints/8", False),
        ("/r/x/../sft/", "/r/sft/checkpoints/8", False),
        ("/r/sft/best", "/r/sft/checkpoints/8", False),
        ("/r/sft/checkpoints/8", "/r/sft/checkpoints/8", False),
        ("/r/sft/checkpoints/4", "/r/sft/checkpoints/8", True),
        ("/r/other", "/r/sft/checkpoints/8", True),
        ("/r/sft", None, True),
    ],
)
def test_another_init_from_of_a_run_that_resumes_is_said(init_from, parent, said):
    lines = list(parent_note(init_from, parent and Path(parent)))
    origin = parent or "random weights"
    line = f"--init_from={init_from} is not used: the run resumes, and was initialized from {origin}"
    assert lines == ([line] if said else [])
