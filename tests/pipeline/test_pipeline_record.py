"""A pipeline's record: what is done, what is run again, and how much time and memory it took."""

import shutil
import sys
from functools import partial

import pytest
from pipelines import make_config, run_stage

from jaxllm.config import as_dict
from jaxllm.config_versions import stamped
from jaxllm.files import to_json, write_file
from jaxllm.pipeline import run as pipeline
from jaxllm.pipeline.config import PARENTS
from jaxllm.pipeline.record import Record


def finish(folder, config, *names):
    """A record in which these stages are done."""
    record = Record(folder, config, "x.py")
    for name in names:
        if name == "gates":
            write_file(folder / "gates.json", b"{}")
        else:
            (folder / name).mkdir(exist_ok=True)
            write_file(folder / name / "config.json", to_json(stamped(as_dict(getattr(config, name)))))
        record.add(name, ["python", name], 10.0, 1)
    return record


def test_an_edited_config_is_not_taken_as_done(tmp_path):
    finish(tmp_path, make_config(), "pretrain", "sft")
    for field, text, named in (
        ("sft__training__steps", "7", r".*sft\.training\.steps \d+ -> 7"),
        ("data__chats", "mine.jsonl", r"sft\.data\.train .* -> \[\"mine.jsonl\"\]"),
    ):
        with pytest.raises(pipeline.ConfigError, match=f"sft was trained with another config: {named}"):
            Record(tmp_path, make_config(**{field: text}), "x.py")


def test_a_field_that_changes_no_model_is_said_and_no_error(tmp_path, capsys):
    finish(tmp_path, make_config(), "pretrain")
    record = Record(tmp_path, make_config(pretrain__training__log_every="7"), "x.py")
    assert record.is_done("pretrain")
    assert "pretrain is done and not run again for pretrain.training.log_every" in capsys.readouterr().out


def test_another_spelling_of_the_config_file_is_no_difference(tmp_path):
    finish(tmp_path, make_config(), "pretrain")
    assert Record(tmp_path, make_config(), "./configs/../x.py").is_done("pretrain")


def test_gates_are_measured_again_with_other_gates_after_a_new_stage_or_without_their_file(tmp_path):
    config = make_config()
    everything = (*PARENTS, "gates")
    assert finish(tmp_path, config, *everything).is_done("gates")
    assert not Record(tmp_path, make_config(gates__max_rows="50"), "x.py").is_done("gates")
    finish(tmp_path, config, "grpo")
    assert not Record(tmp_path, config, "x.py").is_done("gates")
    finish(tmp_path, config, "gates")
    (tmp_path / "gates.json").unlink()
    assert not Record(tmp_path, config, "x.py").is_done("gates")


def test_a_set_is_synthesized_again_with_another_config_or_after_a_new_stage(tmp_path):
    config = make_config()
    assert finish(tmp_path, config, *PARENTS, "synthesize", "gates").is_done("synthesize")
    assert not Record(tmp_path, make_config(synthesize__rows="50"), "x.py").is_done("synthesize")
    assert finish(tmp_path, config, "synthesize").is_done("gates")
    assert not finish(tmp_path, config, "sft").is_done("synthesize")


def test_a_stage_whose_folder_was_deleted_takes_those_trained_from_it_along(tmp_path):
    finish(tmp_path, make_config(), "pretrain", "sft", "reward_model", "ppo")
    shutil.rmtree(tmp_path / "reward_model")
    with pytest.raises(pipeline.ConfigError, match=r"ppo is done but reward_model, .* is not: delete"):
        Record(tmp_path, make_config(), "x.py")
    shutil.rmtree(tmp_path / "ppo")
    record = Record(tmp_path, make_config(), "x.py")
    assert [name for name in PARENTS if record.is_done(name)] == ["pretrain", "sft"]


def test_time_and_memory_of_interrupted_invocations_count(tmp_path):
    config = make_config()
    record = finish(tmp_path, config, "pretrain")
    command = [sys.executable, "-c", "import sys; sys.exit(75)"]
    with pytest.raises(pipeline.Stopped):
        run_stage(command, tmp_path, spend=partial(record.spend, "sft"), seconds=5.0, memory=10**12)
    again = Record(tmp_path, config, "x.py")
    seconds, memory = again.spent("sft")
    assert seconds > 5.0
    assert memory == 10**12
    assert again.value["seconds"] == pytest.approx(10.0 + seconds)
    again.add("sft", command, seconds + 1.0, memory)
    assert again.value["seconds"] == pytest.approx(11.0 + seconds)


def test_a_damaged_record_is_an_error_of_one_line(tmp_path):
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(pipeline.ConfigError, match=r"pipeline\.json cannot be read"):
        Record(tmp_path, make_config(), "x.py")
