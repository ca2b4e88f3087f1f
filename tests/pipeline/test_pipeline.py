"""The pipeline runs all stages, resumes, passes settings on, and measures gates that can fail."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pipelines import make_config, run_stage

from configs import quickstart, sft_chat
from jaxllm.config import parse
from jaxllm.errors import ConfigError, DataError
from jaxllm.pipeline import run as pipeline
from jaxllm.pipeline.config import PARENTS, PipelineConfig
from jaxllm.pipeline.record import Record

ROOT = Path(__file__).parents[2]

TINY = """
from configs.base import pipeline

def get_config(stage=""):
    config = pipeline.base("tiny")
    config.model.num_layers, config.model.width = 1, 32
    config.data.solutions = config.data.problems = ("synthetic:additions",)
    config.gates.max_rows, config.gates.max_new_tokens = 20, 8
    for name in ("pretrain", "sft", "reward_model", "dpo", "sft_reasoning", "ppo", "grpo"):
        section = config[name]
        section.data.synthetic_rows, section.data.sequence_length = 300, 128
        section.evaluation.max_rows = 16
        section.training.steps = section.training.evaluate_every = section.training.checkpoint_every = 4
        section.training.sample_every = 0
        section.optimizer.name = "adamw"
        if name in ("ppo", "grpo"):
            section.rollout.num_prompts, section.rollout.group_size = 4, 2
            section.rollout.epochs = section.rollout.num_minibatches = 1
            section.rollout.sampling.max_new_tokens = section.sample.sampling.max_new_tokens = 8
        else:
            section.data.batch_size = 4
    for section in (config.ppo, config.sft_reasoning):  # no gate reads their evaluations
        section.training.evaluate_every, section.checkpoint.best_metric = 0, None
    config.grpo.sample.group_size = 2
    return pipeline.part(config, stage)
"""


def run(config, workdir, *flags, stop_in=None, by=signal.SIGTERM):
    """Run the pipeline's script, and send it a signal once the stage `stop_in` has started."""
    command = [
        sys.executable,
        "experiments/pipeline.py",
        f"--config={config}",
        f"--workdir={workdir}",
        *flags,
    ]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while stop_in and process.poll() is None:
        if (workdir / stop_in / "metrics.jsonl").exists():
            process.send_signal(by)
            break
        time.sleep(0.05)
    output, errors = process.communicate(timeout=500)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config file, its workdir, and the results of three runs: stopped, killed, finished."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tiny.py").write_text(TINY)
    config, workdir = folder / "tiny.py", folder / "run"
    stopped = run(config, workdir, stop_in="sft")
    killed = run(config, workdir, stop_in="dpo", by=signal.SIGKILL)
    return config, workdir, stopped, killed, run(config, workdir)


def stages_of(output):
    """The stages that were started."""
    return [line.split()[1] for line in output.splitlines() if line.startswith("[")]


def test_a_stopped_pipeline_resumes_in_the_stage_where_it_stopped(tiny):
    _, workdir, (code, output, errors), (_, after_stop, _), _ = tiny
    assert code == 75, errors
    assert "resume with the same command" in errors
    assert stages_of(output) == ["pretrain"]
    assert stages_of(after_stop)[0] == "sft"
    assert "resumed at step" in (workdir / "logs" / "sft.txt").read_text()


def test_a_killed_pipeline_resumes_in_the_stage_where_it_was_killed(tiny):
    _, _, _, (code, output, _), (_, after_kill, errors) = tiny
    assert code == -signal.SIGKILL
    assert stages_of(output) == ["sft", "reward_model", "ppo"]
    assert stages_of(after_kill) == ["dpo", "sft_reasoning", "grpo", "gates"], errors


def test_a_failed_gate_fails_the_command_and_prints_what_was_measured(tiny):
    _, workdir, _, _, (code, output, errors) = tiny
    assert code == 1, errors
    found = json.loads((workdir / "gates.json").read_text())
    assert [gate["name"] for gate in found["gates"]] == [
        "text",
        "answers",
        "reward_model",
        "ppo",
        "dpo",
        "reasoning",
    ]
    assert not found["passed"]
    text = found["gates"][0]
    assert f"FAILED        text         {text['measured']:.3f}" in output
    assert text["measured"] > text["needed"] > 0


def test_every_stage_is_initialized_from_its_parents_last_checkpoint(tiny):
    _, workdir, *_ = tiny
    for stage, parent in PARENTS.items():
        record = json.loads((workdir / stage / "run.json").read_text())
        if parent is None:
            assert record["parent"] is None
        else:
            assert Path(record["parent"]["path"]) == workdir / parent / "checkpoints" / "4"


def test_the_recorded_commands_are_those_that_ran(tiny):
    config, workdir, *_ = tiny
    record = json.loads((workdir / "pipeline.json").read_text())
    commands = {stage["name"]: shlex.split(stage["command"]) for stage in record["stages"]}
    assert list(commands) == [*PARENTS, "gates"]
    assert commands["sft"][1:] == [
        "experiments/train.py",
        f"--config={config}:sft",
        f"--workdir={workdir}/sft",
        f"--init_from={workdir}/pretrain",
        f"--config.data.held_out={workdir}/held_out.jsonl",
    ]
    assert "held_out" not in " ".join(commands["pretrain"] + commands["gates"])
    assert f"--config.reward.model={workdir}/reward_model" in commands["ppo"]
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e8 for stage in record["stages"])


def test_all_models_complete_the_same_prompts_for_the_report(tiny):
    _, workdir, *_ = tiny
    shown = json.loads((workdir / "shown.json").read_text())
    assert [each["name"] for each in shown["answers"]] == ["random", "pretrain", "sft", "ppo", "dpo", "grpo"]
    assert all(len(each["texts"]) == len(shown["prompts"]) for each in shown["answers"])
    assert "What is an LLM?" in (workdir / "report.html").read_text()


def test_a_finished_pipeline_only_prints_its_gates_again(tiny):
    config, workdir, *_ = tiny
    before = (workdir / "pipeline.json").read_bytes()
    another_spelling = f"{config.parent}/../{config.parent.name}/{config.name}"
    code, output, errors = run(another_spelling, f"{workdir.parent}/./{workdir.name}/")
    assert code == 1, errors
    assert "FAILED" in output
    assert not [line for line in output.splitlines() if line.startswith("[")]
    assert (workdir / "pipeline.json").read_bytes() == before


def test_another_config_is_an_error_before_a_stage_runs(tiny):
    config, workdir, *_ = tiny
    code, _, errors = run(config, workdir, "--config.ppo.optimizer.learning_rate=0.5")
    assert code == 78
    assert re.search(r"ppo was trained with another config: ppo.optimizer.learning_rate \S+ -> 0.5;", errors)
    assert "choose another --workdir" in errors


def test_two_pipelines_do_not_share_a_folder(tmp_path):
    with (
        pipeline.claimed(tmp_path),
        pytest.raises(pipeline.ConfigError, match="another pipeline"),
        pipeline.claimed(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(pipeline.ConfigError, match=f"^--workdir={folder}: [A-Z]"),
            pipeline.claimed(folder),
        ):
            pass


SCRIPTS = pipeline.Scripts(*(ROOT / "experiments" / f"{name}.py" for name in pipeline.Scripts._fields))


def test_overrides_are_passed_on_to_the_stages():
    config = make_config(
        data__text="mine.txt",
        seed="3",
        pretrain__optimizer__clip_norm="none",
        grpo__reward__functions="countdown",
        dpo__data__held_out="benchmark.jsonl",
    )
    commands = pipeline.stage_commands(
        config,
        f"{ROOT}/configs/quickstart.py",
        "runs/x",
        SCRIPTS,
    )
    flags = {name: set(command[4:]) for name, command in commands.items()}
    assert flags["pretrain"] == {
        "--config.seed=3",
        "--config.data.train=('mine.txt',)",
        "--config.optimizer.clip_norm=none",
    }
    assert "--config.reward.functions=('countdown',)" in flags["grpo"]
    assert "--config.data.train=('mine.txt',)" not in flags["sft"]
    file = str(Path("runs/x/held_out.jsonl").absolute())
    assert f"--config.data.held_out={file}" in flags["sft"]
    assert f"--config.data.held_out=('benchmark.jsonl', '{file}')" in flags["dpo"]
    assert "--config.data.text=('mine.txt',)" in flags["gates"]
    folder = Path("runs/x").absolute()
    assert flags["synthesize"] == {
        "--config.seed=3",
        f"--config.answers.model={folder}/sft",
        f"--config.judge.model={folder}/reward_model",
        f"--config.filters.evaluation_sets={file}",
    }
    none = make_config(synthesize__rows="0")
    assert "synthesize" not in pipeline.stage_commands(
        none, f"{ROOT}/configs/quickstart.py", "runs/x", SCRIPTS
    )


def test_a_pipeline_on_an_object_store_hands_urls_to_its_stages_and_its_copy_to_the_gates(cache):
    url, copy = "memory://bucket/pipe", cache / "workdirs" / "0" / "memory" / "bucket" / "pipe"
    commands = pipeline.stage_commands(make_config(), f"{ROOT}/configs/quickstart.py", url, SCRIPTS)
    assert {f"--workdir={url}/sft", f"--init_from={url}/pretrain"} < set(commands["sft"])
    assert f"--config.data.held_out={copy}/held_out.jsonl" in commands["sft"]
    assert f"--config.reward.model={url}/reward_model" in commands["ppo"]
    assert f"--workdir={copy}" in commands["gates"]
    assert {f"--workdir={copy}/synthesize", f"--config.answers.model={url}/sft"} < set(commands["synthesize"])
    with pytest.raises(ConfigError, match="needs a folder that all of them share"):
        pipeline.run_pipeline(
            make_config(), config_file="x", workdir=url, scripts=SCRIPTS, process_flags={"process_id": "1"}
        )


def test_a_stage_can_have_data_of_its_own_but_no_seed_of_its_own():
    for order in (("data__pairs", "ppo__data__train"), ("ppo__data__train", "data__pairs")):
        config = make_config(**{field: f"{field}.jsonl" for field in order})
        assert config.ppo.data.train == ("ppo__data__train.jsonl",)
        assert config.dpo.data.train == config.reward_model.data.train == ("data__pairs.jsonl",)
    with pytest.raises(pipeline.ConfigError, match=r"dpo\.seed differs from the pipeline\'s seed"):
        make_config(dpo__seed="3")


def test_missing_data_is_an_error_before_a_stage_runs():
    pipeline.check_sources(make_config(data__pairs="hf:user/dataset"))
    for field, name, problem in (
        ("sft.data.held_out", "nowhere.jsonl", "does not exist"),
        ("data.chats", "nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("gates.prompts", "synthetic:chat", "did you mean 'chats'"),
        ("data.text", str(ROOT / "Makefile"), "only .txt"),
    ):
        changes = {field.replace(".", "__"): name}
        with pytest.raises(DataError, match=f"^{field}: .*{problem}"):
            pipeline.check_sources(make_config(**changes))


def test_a_stage_with_another_model_is_an_error():
    config = quickstart.get_config()
    config.sft = sft_chat.get_config("tiny")
    with pytest.raises(pipeline.ConfigError, match=r"sft\.model .* set model for all stages"):
        parse(PipelineConfig, config)


def test_a_failed_stage_ends_the_pipeline_with_its_exit_code(tmp_path):
    command = [sys.executable, "-c", "import sys; print('error: no such file'); sys.exit(78)"]
    with pytest.raises(pipeline.StageFailed, match="error: no such file") as caught:
        run_stage(command, tmp_path)
    assert caught.value.exit_code == 78


def test_a_stage_interrupted_before_its_first_save_can_resume(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    interrupt = iter([True])

    def report():
        if next(interrupt, False):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(pipeline.Stopped, match="resume with the same command"):
        run_stage(command, tmp_path, report)


def test_warnings_of_a_stage_are_repeated_once_and_not_for_synthetic_data(tmp_path):
    lines = ("warning: 40% of mine.jsonl is longer", "step 1", "warning: 23% of synthetic:chats is longer")
    (tmp_path / "sft.txt").write_text("\n".join((*lines, lines[0])))
    assert pipeline.warnings(tmp_path / "sft.txt") == [lines[0]]


def test_the_memory_of_a_stage_is_measured(tmp_path):
    command = [sys.executable, "-c", "import time; x = bytearray(700 * 10**6); time.sleep(1)"]
    _, memory = run_stage(command, tmp_path)
    assert 0.7e9 < memory < 0.8e9


def test_the_estimate_of_the_time_left_follows_the_pace_so_far(tmp_path):
    config = make_config()
    expected = config.expected_seconds
    total = sum(vars(expected).values())
    record = Record(tmp_path, config, "x.py")
    assert pipeline.time_left(config, record) == f"  about {round(total / 60)} min left"
    record.add("pretrain", ["python", "x"], 2 * expected.pretrain, 1)
    rest = 2 * (total - expected.pretrain)
    assert pipeline.time_left(config, record) == f"  about {round(rest / 60)} min left"
    unknown = replace(config, expected_seconds=replace(expected, ppo=0.0))
    assert pipeline.time_left(unknown, record) == ""
