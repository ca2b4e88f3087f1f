"""A synthesis writes rows that stages train on, resumes to the byte, and refuses what does not fit."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxllm.config import load_config, override, parse
from jaxllm.data.chat import conversation
from jaxllm.data.preferences import pair
from jaxllm.data.records import Record
from jaxllm.errors import ConfigError, DataError, Stopped
from jaxllm.synthesize import run
from jaxllm.synthesize.config import SynthesizeConfig
from jaxllm.synthesize.instructions import first_task, self_instruct_prompt
from jaxllm.synthesize.raw_rows import RawRows
from jaxllm.synthesize.run import synthesize
from jaxllm.training.watchdog import StopRequested

FILE = Path(__file__).parents[2] / "configs" / "synthesize.py"
OUTPUTS = ("rows.jsonl", "sft.jsonl", "preferences.jsonl", "report.json", "README.md", "config.json")


def make_config(**changes):
    config = load_config(str(FILE))
    fields = {
        "rows": 13,
        "block_rows": 4,
        "decode_batch_size": 8,
        "instructions__source": "file",
        "instructions__length": "1,50",
        "answers__per_instruction": 2,
        "answers__sampling__max_new_tokens": 12,
        "filters__near_duplicates": "none",
    }
    for field, value in (fields | changes).items():
        override(config, SynthesizeConfig, field.replace("__", "."), str(value))
    return parse(SynthesizeConfig, config)


@pytest.fixture(scope="module")
def models(rows, chat_model, reward_model):
    """Fields of a config with models that answer and judge, and with instructions that they know."""
    return {
        "instructions__seeds": rows / "chats.jsonl",
        "answers__model": chat_model,
        "judge__model": reward_model,
    }


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """A config and the folder of its set, which nothing has interrupted."""
    folder, config = tmp_path_factory.mktemp("synthesis") / "set", make_config(**models)
    synthesize(config, str(folder), command=["python", "synthesize.py"])
    return config, folder


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def test_the_rows_are_those_that_stages_read(written):
    config, folder = written
    raw, sft, pairs = (read(folder, f"{name}.jsonl") for name in ("rows", "sft", "preferences"))
    assert [row["row"] for row in raw] == list(range(13))
    assert len(sft) > 8
    assert pairs
    for row in sft:
        origin = row["provenance"]
        source = raw[origin["row"]]
        _, (question, reply) = conversation(Record(row))
        assert question["content"] == source["instruction"]
        assert reply["content"] == source["answers"][origin["chosen"]]["text"]
        assert origin["scores"][origin["chosen"]] == max(origin["scores"])
        assert origin["seed"] == config.seed
        assert len(origin["answer"]["hash"]) == len(origin["judge"]["hash"]) > 30
        assert origin["answer"]["sampling"]["temperature"] == 0.8
    for row in pairs:
        scores = row["provenance"]["scores"]
        assert scores[row["provenance"]["chosen"]] > scores[row["provenance"]["rejected"]]
        assert pair(Record(row)).chosen["content"] == row["chosen"]


def test_the_card_and_the_report_count_every_row(written):
    _, folder = written
    report, card = json.loads((folder / "report.json").read_text()), (folder / "README.md").read_text()
    assert report["rows"] == 13 == report["kept"] + sum(report["rows_dropped"].values())
    assert report["pairs"] == report["kept"] - sum(report["without_a_pair"].values())
    assert f"{report['kept']} of 13 rows" in card
    assert card.count("```text") == min(20, report["kept"])


class Killed(BaseException):
    """What ends a process at once."""


@pytest.mark.parametrize("torn", [b"", b'{"row": 6, "instr'])
def test_a_killed_and_resumed_set_equals_an_uninterrupted_one_to_the_byte(
    written, tmp_path, monkeypatch, capsys, torn
):
    config, folder = written
    append = RawRows.append

    def killed_within_a_block(self, new):
        append(self, new[:2] if self.rows else new)
        if len(self.rows) == 6:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RawRows, "append", killed_within_a_block)
        with pytest.raises(Killed):
            synthesize(config, str(tmp_path), command=[])
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(torn)
    assert len(read(tmp_path, "rows.jsonl") if not torn else [0] * 6) == 6
    firsts, block = [], run.Synthesis.block

    def recorded(self, first, before, check):
        firsts.append(first)
        return block(self, first, before, check)

    monkeypatch.setattr(run.Synthesis, "block", recorded)
    synthesize(config, str(tmp_path), command=[])
    assert firsts == [4, 8, 12]  # a block is computed whole, as without the kill
    assert contents(tmp_path) == contents(folder)
    out = capsys.readouterr().out
    assert "resumed at row 6" in out
    assert ("a torn last line dropped, 17 bytes; row 6 is written again" in out) == bool(torn)


def test_a_signal_stops_between_rows_and_says_how_to_resume(written, tmp_path, monkeypatch):
    config, _ = written
    monkeypatch.setattr(run.Watchdog, "check", lambda self: (_ for _ in ()).throw(StopRequested))
    with pytest.raises(Stopped, match=r"0 of 13 rows are written; resume with python a\.py") as stopped:
        synthesize(config, str(tmp_path), command=["python", "a.py"])
    assert stopped.value.exit_code == 75


def test_other_filters_are_applied_to_the_rows_that_are_there(written, tmp_path):
    config, folder = written
    for name in ("rows.jsonl", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    strict = dataclasses.replace(config.filters, min_score=1e9)
    synthesize(dataclasses.replace(config, filters=strict), str(tmp_path), command=[])
    assert read(tmp_path, "sft.jsonl") == []
    assert (tmp_path / "rows.jsonl").read_bytes() == (folder / "rows.jsonl").read_bytes()


def test_another_config_or_another_model_is_an_error(written, tmp_path):
    config, folder = written
    answers = dataclasses.replace(config.answers, per_instruction=3)
    with pytest.raises(ConfigError, match=r"another config: answers.per_instruction 2 -> 3; choose another"):
        synthesize(dataclasses.replace(config, answers=answers), str(folder), command=[])
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    saved = json.loads((folder / "config.json").read_text())
    saved["models"]["answers"]["hash"] = "0"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r'another config: models.answers.hash "0" -> "[0-9a-f]+"'):
        synthesize(config, str(tmp_path), command=[])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"row": 0}', '{"row": 2}'], r"rows.jsonl:2: is row 2, not 1"),
        (['{"row": 0}', '{"row": 0}'], r"rows.jsonl:2: is row 0, not 1"),
        (['{"row": 0', '{"row": 1}'], r"rows.jsonl:1: not a row"),
    ],
)
def test_a_lost_a_doubled_or_a_damaged_row_is_an_error(tmp_path, lines, message):
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        RawRows(tmp_path / "rows.jsonl")


def test_magpie_writes_instructions_by_the_template(models, tmp_path):
    fields = {"instructions__source": "magpie", "instructions__seeds": "none", "rows": 4}
    fields |= {"instructions__sampling__max_new_tokens": 8, "instructions__length": "0,99"}
    synthesize(make_config(**models | fields), str(tmp_path), command=[])
    raw, report = read(tmp_path, "rows.jsonl"), json.loads((tmp_path / "report.json").read_text())
    assert len({row["instruction"] for row in raw}) > 1
    assert all((row["problem"] == "instruction cut off") == (not row["answers"]) for row in raw)
    assert report["models"]["instructions"] == report["models"]["answers"]


# What is wrong is said before anything is compiled


NO_JUDGE = {"judge__kind": "none", "judge__model": "none"}
MAGPIE = {"instructions__source": "magpie", "instructions__seeds": "none"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers__model": "none"}, "answers.model is missing: name a run folder"),
        ({"judge__model": "none"}, "judge.model is missing: name a reward model's run folder"),
        ({"rows": "0"}, "rows=0 writes nothing"),
        ({"instructions__source": "magpy"}, "instructions.source='magpy': choose one of .*mean 'magpie'"),
        ({"instructions__seeds": "none"}, "source=file needs instructions.seeds: name a file"),
        ({"instructions__length": "5"}, r"instructions.length=\(5,\) must be a lowest and a highest"),
        (
            {**MAGPIE, "answers__model": "http://x/v1"},
            "magpie needs a checkpoint",
        ),
        ({"judge__model": "http://x/v1"}, "judge.kind=reward_model needs a run folder"),
        ({"filters__near_duplicates": "1.5"}, "filters.near_duplicates=1.5 must be between 0 and 1"),
        ({**NO_JUDGE, "filters__min_score": "1"}, "filters.min_score needs scores"),
        ({**NO_JUDGE, "filters__min_margin": "1"}, "filters.min_margin needs scores"),
        ({"judge__kind": "none"}, "judge.model has no effect with judge.kind=none"),
        (
            {"instructions__source": "magpie"},
            "instructions.seeds has no effect with instructions.source=magpie",
        ),
        ({"dtype": "float16"}, "dtype='float16': choose float32, bfloat16"),
        ({"rows": "101"}, "instructions.seeds has 100 instructions, too few for rows=101"),
        ({"answers__model": "nowhere"}, "answers.model=nowhere: .* does not exist"),
        ({"answers__model": "REWARD"}, "answers.model=.* is a reward model and cannot generate"),
        ({"judge__model": "CHAT"}, "judge.model=.* is not a reward model"),
        ({"filters__evaluation_sets": "none.jsonl"}, "filters.evaluation_sets: 'none.jsonl' does not exist"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_fix(models, tmp_path, changes, message):
    named = {"REWARD": models["judge__model"], "CHAT": models["answers__model"]}
    changes = {field: named.get(value, value) for field, value in changes.items()}
    with pytest.raises((ConfigError, DataError), match=message):
        synthesize(make_config(**models | changes), str(tmp_path / "set"), command=[])
    assert not (tmp_path / "set" / "rows.jsonl").exists()


# Prompts of grown instructions


def test_the_prompt_of_a_row_shows_seeds_and_a_few_generated_tasks():
    seeds, earlier = [f"seed {i}" for i in range(20)], [f"made {i}" for i in range(9)]
    prompt = self_instruct_prompt(seeds, earlier, 8, seed=0, row=3)
    assert (prompt.count("Task: seed"), prompt.count("Task: made")) == (6, 2)
    assert prompt == self_instruct_prompt(seeds, earlier, 8, seed=0, row=3)
    assert prompt != self_instruct_prompt(seeds, earlier, 8, seed=0, row=4)
    assert self_instruct_prompt(seeds, [], 8, seed=0, row=0).count("Task: seed") == 8


@pytest.mark.parametrize(
    ("reply", "task"),
    [
        ("Task: Name a town.\nTask: Name a lake.", "Name a town."),
        ("\n 9. Name a town.", "Name a town."),
        ("Task 9: Name a town.", "Name a town."),
        ("Name 3 towns: small ones.", "Name 3 towns: small ones."),
        ("", ""),
    ],
)
def test_a_reply_is_one_task_without_its_label(reply, task):
    assert first_task(reply) == task
