"""The pipeline runs all stages, resumes, passes settings on, and measures gates that can fail."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from configs import quickstart, sft_chat
from jaxllm.config import as_dict, override, parse
from jaxllm.config_versions import stamped
from jaxllm.errors import ConfigError, DataError
from jaxllm.files import to_json, write_file
from jaxllm.pipeline import completions, gates
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
        if name in ("ppo", "grpo"):
            section.rollout.num_prompts, section.rollout.group_size = 4, 2
            section.rollout.epochs = section.rollout.num_minibatches = 1
            section.rollout.sampling.max_new_tokens = section.sample.sampling.max_new_tokens = 8
        else:
            section.data.batch_size = 4
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
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
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


def test_gates_of_a_folder_without_a_pipeline_are_an_error_of_one_line(tmp_path):
    (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
    with pytest.raises(pipeline.ConfigError, match=r"lacks sft, .*: run experiments/pipeline.py first"):
        gates.measure_gates(make_config(), tmp_path)


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(pipeline.ConfigError, match=f"^--workdir={folder}: [A-Z]"),
            pipeline.claimed(folder),
        ):
            pass


SCRIPTS = pipeline.Scripts(*(ROOT / "experiments" / f"{name}.py" for name in pipeline.Scripts._fields))


def make_config(**changes):
    config = quickstart.get_config()
    for field, text in changes.items():
        override(config, PipelineConfig, field.replace("__", "."), text)
    return parse(PipelineConfig, config)


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


@pytest.mark.parametrize("field", ["prompts", "shown"])
def test_gates_without_prompts_are_an_error(field):
    with pytest.raises(pipeline.ConfigError, match=rf"gates\.{field} is empty"):
        make_config(**{f"gates__{field}": ""})


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


def run_stage(command, folder, report=lambda: None, spend=lambda *_: None, **before):
    return pipeline.run_stage(command, folder / "logs" / "x.txt", report, spend, **before)


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


# The record


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


# Gates

GATES = make_config().gates


def scored(rubric, kl=1.0):
    """Completions with these scores, as in WORKDIR/answers/."""
    return [{"rewards": {"rubric": value}, "kl": kl} for value in rubric]


@pytest.mark.parametrize(
    ("rise", "kl", "passed"),
    [(0.05, 1.0, True), (0.0, 1.0, False), (-0.05, 1.0, False), (0.05, 11.0, False), (0.004, 1.0, False)],
)
def test_ppo_and_dpo_must_raise_the_rubrics_score_within_the_kl_limit(rise, kl, passed):
    draw = np.random.default_rng(0)
    before = draw.uniform(0, 1, 400)
    after = before + rise + draw.normal(0, 0.1, 400)  # standard error of the rise: 0.005
    found = gates.preference_gate(GATES, "ppo", scored(before), scored(after, kl), "rubric")
    assert found.passed is passed
    assert found.standard_error == pytest.approx(0.005, rel=0.1)
    assert found.measured == pytest.approx((after - before).mean())


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([{"answer": "In Rome.", "key": "Rome", "rivals": []}] * 2, True),
        ([{"answer": "In Rome.", "key": "Rome", "rivals": []}, None], False),
        (["Rome"], False),
        ([{"answer": "In Rome."}], False),
    ],
)
def test_the_rubric_is_used_only_if_every_row_has_a_complete_reference(references, expected):
    rows = [{"prompt": "Where?"} | ({} if each is None else {"reference": each}) for each in references]
    assert completions.has_references(rows) is expected


def test_unchanged_completions_fail_the_gate():
    same = scored(np.full(10, 0.5))
    assert gates.preference_gate(GATES, "ppo", same, same, "rubric").passed is False


def test_without_a_rubric_the_gate_is_not_measured():
    rows = [{"rewards": {"model": float(i)}, "kl": 1.0} for i in range(9)]
    found = gates.preference_gate(GATES, "dpo", rows, rows, "model")
    assert found.passed is None
    assert "4.000" in found.says


@pytest.mark.parametrize(
    ("after", "error", "passed"), [(0.55, 0.02, True), (0.45, 0.02, False), (0.55, 0.05, False)]
)
def test_reasoning_must_rise_by_twenty_points_and_five_standard_errors(after, error, passed):
    rows = [
        {"eval/sampled_pass@1": 0.3, "eval/sampled_pass@1_se": error},
        {"eval/sampled_pass@1": 0.9, "eval/sampled_pass@1_se": error},
        {"eval/sampled_pass@1": after, "eval/sampled_pass@1_se": error},
    ]
    found = gates.reasoning_gate(GATES, rows)
    assert found.passed is passed
    assert found.standard_error == pytest.approx(error * 2**0.5)


@pytest.mark.parametrize(
    ("accuracy", "error", "passed"), [(0.75, 0.01, True), (0.65, 0.01, False), (0.75, 0.06, False)]
)
def test_the_reward_model_must_be_near_the_ceiling_and_far_from_chance(accuracy, error, passed):
    found = gates.reward_gate(GATES, {"eval/accuracy": accuracy, "eval/accuracy_se": error})
    assert found.passed is passed


def test_a_gate_that_was_not_measured_names_the_reason():
    assert gates.reward_gate(GATES, {}).passed is None
    assert "held-out pairs" in gates.reward_gate(GATES, {}).says
    assert "group_size" in gates.reasoning_gate(GATES, [{"eval/pass@1": 0.5}]).says
    unknown = {"eval/sampled_pass@1": None, "eval/sampled_pass@1_se": None}  # no reward applied
    assert gates.reasoning_gate(GATES, [unknown, unknown]).passed is None
