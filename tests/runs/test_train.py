"""Whole runs in this process: what they print and write, when they compile, stop early and fail."""

import contextlib
import datetime
import io
import json
import os
import random
import re
import signal
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from rl_runs import read_all
from tiny_runs import parse_config

from jaxllm.errors import CheckpointError, ConfigError, DataError, Stopped
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint, read_metadata
from jaxllm.runs.context import InitialWeights
from jaxllm.runs.program import dry_run
from jaxllm.runs.train import run_tokenizer, train
from jaxllm.runs.weights import initial_weights, model_note, with_model_of
from jaxllm.stages import build_program, find_stage, pretrain
from jaxllm.training.checkpoint import read_arrays
from jaxllm.training.metrics import read_metrics
from jaxllm.training.run_folder import RunFolder, lock_run
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint

NOT_EVALUATED = {
    "training__evaluate_every": "0",
    "training__sample_every": "0",
    "checkpoint__best_metric": "none",
}
COMPILED_AFTER: dict[str, list[int]] = {}  # by `compiles_of`
FILES = {
    "pretrain": ("pretrain_text.py", "good.jsonl"),
    "sft": ("sft_chat.py", "chats.jsonl"),
    "reward_model": ("reward_model_pairs.py", "pairs.jsonl"),
    "dpo": ("dpo_pairs.py", "pairs.jsonl"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with rows of repetitive text, chats and pairs, and with a file that has a bad row."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    sentences = [f"The {a} saw the {b}." for a in ("cat", "dog", "bird") for b in ("ball", "tree", "moon")]
    rows = [
        json.dumps({"text": " ".join(draw.choices(sentences, k=draw.randrange(2, 9)))}) for _ in range(400)
    ]
    (folder / "good.jsonl").write_text("\n".join(rows))
    (folder / "bad.jsonl").write_text("\n".join([*rows, '{"txt": "lost"}']))
    seen = [("cat", "ball"), ("cat", "tree"), ("dog", "ball"), ("dog", "moon"), ("bird", "tree")] * 12
    chats = [
        {"prompt": f"What did the {a} see? {i}", "completion": f"The {b}."} for i, (a, b) in enumerate(seen)
    ]
    question, answer = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "A moon."}
    chats += [
        {"messages": [{"role": "user", "content": f"{i}?"}, answer, question, answer]} for i in range(20)
    ]
    pairs = [
        {"prompt": f"What did the {a} see? {i}", "chosen": f"The {b}.", "rejected": f"No {b}."}
        for i, (a, b) in enumerate(seen)
    ]
    for name, records in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def make_config(text, stage="pretrain", **changes):
    file, rows = FILES[stage]
    fields = {
        "data__train": str(text / rows),
        "data__sequence_length": "32" if stage == "pretrain" else "64",
        "data__batch_size": "8",
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
    }
    if stage in ("pretrain", "sft"):
        fields["sample__sampling__max_new_tokens"] = "4"
    fields = {name.replace("__", "."): value for name, value in (fields | changes).items()}
    return parse_config(f"{file}:tiny", fields)


def run(config, workdir, **changes):
    """On one device: programs for more take longer to compile."""
    arguments = {"init_from": None, "command": ["python", "train.py"], "devices": jax.devices()[:1]}
    train(find_stage(config.stage), config, workdir=str(workdir), **arguments | changes)


@contextlib.contextmanager
def compiles_of(stage, workdir):
    """COMPILED_AFTER[stage]: for each program compiled meanwhile, the step of the last row of metrics."""
    after = COMPILED_AFTER[stage] = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            rows = read_metrics(workdir / "metrics.jsonl")
            after.append(rows[-1]["step"] if rows else -1)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    with compiles_of("pretrain", workdir):
        run(make_config(text), workdir)
    return workdir


def test_the_loss_falls(finished):
    first, *_, last = read_metrics(finished / "metrics.jsonl")
    assert first["step"] == 0  # random weights
    assert last["eval/bits_per_byte"] < first["eval/bits_per_byte"]
    assert last["train/loss"] < np.log(500) - 0.5


def test_a_checkpoint_has_the_config_and_the_tokenizer(finished, text):
    folder = find_checkpoint(finished)
    assert folder.name == "8"
    assert json.loads((folder / "config.json").read_text())["data"]["train"] == [str(text / "good.jsonl")]
    assert (folder / "tokenizer.model").read_bytes() == (finished / "tokenizer.model").read_bytes()
    metadata, record = (
        json.loads(path.read_text()) for path in (folder / "metadata.json", finished / "run.json")
    )
    assert metadata["run"] == record["id"]
    assert metadata["tokenizer"] == record["fingerprints"]["tokenizer"]


def test_a_run_is_initialized_from_another_and_records_it_as_its_parent(finished, text, tmp_path):
    config = make_config(text, training__steps="3", optimizer__learning_rate="0.0", **NOT_EVALUATED)
    run(config, tmp_path / "child", init_from=str(finished))
    program = build_program(config)
    given, child = (
        read_arrays(find_checkpoint(path), program.abstract_state.params, prefix="params")
        for path in (finished, tmp_path / "child")
    )
    jax.tree.map(np.testing.assert_array_equal, given, child)
    record = json.loads((tmp_path / "child" / "run.json").read_text())
    assert record["parent"]["path"] == str(find_checkpoint(finished))


def test_a_folder_that_another_process_uses_is_refused(text, tmp_path):
    message = "run is in use by process"
    with lock_run(str(tmp_path / "run")), pytest.raises(ConfigError, match=message):
        run(make_config(text), tmp_path / "run")


def test_a_tokenizer_path_beside_a_parent_is_said_not_to_be_used(finished, text, tmp_path, capsys):
    config = make_config(text, tokenizer__path="mine.model")
    initial = InitialWeights(find_checkpoint(finished), "", dict)
    run_tokenizer(find_stage("pretrain"), config, RunFolder(tmp_path, "a", False, None), initial)
    assert "note: tokenizer.path=mine.model is not used" in capsys.readouterr().out


@pytest.mark.parametrize("has_changed", [False, True])
def test_a_parent_that_moved_is_read_from_where_init_from_says(finished, tmp_path, has_changed):
    """By a run that resumes and needs it as its reference."""
    moved = find_checkpoint(finished)
    parent = {"path": str(tmp_path / "gone" / "8"), "hash": "x" if has_changed else checkpoint_hash(moved)}
    (tmp_path / "run.json").write_text(json.dumps({"parent": parent}))
    stage: Any = SimpleNamespace(initial_params=lambda program, folder: folder)
    folder = RunFolder(tmp_path, "a", resuming=True, step=None)
    initial = initial_weights(stage, cast(Any, None), folder, str(finished))
    if has_changed:
        with pytest.raises(CheckpointError, match="is not the checkpoint that this run was initialized from"):
            initial.params()
    else:
        assert cast(Any, initial.params()) == moved


def test_a_bad_row_stops_the_run_or_is_recorded(text, tmp_path):
    bad = {"data__train": str(text / "bad.jsonl"), "training__steps": "3"} | NOT_EVALUATED
    with pytest.raises(DataError, match=r"bad.jsonl:401: missing key .*did you mean 'txt'"):
        run(make_config(text, **bad), tmp_path / "stopped")
    run(make_config(text, data__on_bad_row="skip", **bad), tmp_path / "skipped")
    (row,) = (tmp_path / "skipped" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(row)["where"].endswith("bad.jsonl:401")


def test_a_tokenizer_larger_than_the_models_vocabulary_is_an_error(finished, text, tmp_path):
    config = make_config(text, model__vocab_size="300", tokenizer__path=str(finished / "tokenizer.model"))
    with pytest.raises((ConfigError, DataError), match="vocab_size"):
        run(config, tmp_path / "small")


def test_a_run_on_a_mesh_prints_its_start_up_report(text, tmp_path, capsys):
    mesh = {"mesh__data": "2", "mesh__fsdp": "2", "mesh__tensor": "2"}
    config = make_config(text, training__steps="3", **NOT_EVALUATED, **mesh)
    run(config, tmp_path / "mesh", devices=None)
    printed = capsys.readouterr().out
    for line in (
        r"devices: 8 x cpu \(cpu\), mesh data=2 x fsdp=2 x sequence=1 x tensor=2",
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


def test_a_dry_run_prints_memory_and_compute_of_a_step(text):
    program = build_program(make_config(text))
    report = dry_run(program)
    state = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state.params)) * 3
    )
    (held,) = re.findall(r"= ([\d.]+) GB state and batch", report)
    assert float(held) == pytest.approx(state / 1e9, abs=0.001)  # weights and Adam's two moments
    assert "FLOPs per token" in report
    assert "training.num_microbatches" in report


# Later stages


@pytest.fixture(scope="module")
def chat_run(finished, text, tmp_path_factory):
    """The run folder of SFT, and its output."""
    workdir, output = tmp_path_factory.mktemp("chat") / "sft", io.StringIO()
    with contextlib.redirect_stdout(output), compiles_of("sft", workdir):
        run(make_config(text, "sft", sample__num_held_out="4"), workdir, init_from=str(finished))
    return workdir, output.getvalue()


def params_of(workdir, program):
    return read_arrays(find_checkpoint(workdir), program.abstract_state.params, prefix="params")


def test_fine_tuning_reports_its_data_and_lowers_the_loss(chat_run):
    workdir, printed = chat_run
    for line in (
        r"chats.jsonl: 80 rows read, 80 kept; formats: 60 \[prompt, completion\], 20 \[messages\]; [\d,]+ t",
        r"train: [\d,]+ tokens, 2\d\.\d% of them in the loss, in \d+ rows of 64",
        r"validation: [\d,]+ tokens",
        r"chat template: built-in; stop tokens: <\|end\|>, </s>",
        r"example .*: ⟦<s><\|user\|>What did the cat see\? 0<\|end\|><\|assistant\|>⟧The ball\.<\|end\|>\n",
        r"fresh run with the weights of .*/first/checkpoints/8\n",
        r"step 8/8 .*eval loss .*held-out stopped",
        r"done: 8 steps \(best eval/loss [\d.]+ at step 8\)",
    ):
        assert re.search(line, printed), line
    first, *_, last = read_metrics(workdir / "metrics.jsonl")
    assert first["step"] == 0
    assert last["eval/loss"] < first["eval/loss"] - 0.3
    assert 0 <= last["eval/stopped_fraction"] <= 1
    sample = (workdir / "samples" / "8.txt").read_text()
    assert "What is an LLM?" in sample
    assert sample.count("held out; the data's own completion: ") == 4


def test_a_run_that_does_not_improve_stops_and_resumes_only_with_more_patience(
    chat_run, text, tmp_path, capsys
):
    no_change = {"optimizer__learning_rate": "0.0", "training__steps": "100", "training__sample_every": "0"}
    workdir = tmp_path / "r"
    for patience, steps in ((2, 8), (2, 8), (3, 12)):
        config = make_config(text, "sft", training__patience=str(patience), **no_change)
        run(config, workdir, init_from=str(chat_run[0]))
        assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == steps
    printed = capsys.readouterr().out
    assert "done: 8 steps, stopped early (best eval/loss" in printed
    assert "nothing to do: 8 steps are done; to train further, raise training.patience" in printed
    with pytest.raises(CheckpointError, match="no step of its run has a better eval/loss than the initial"):
        find_checkpoint(workdir / "best")


def test_a_run_that_reaches_its_target_stops_and_resumes_only_without_it(chat_run, text, tmp_path, capsys):
    workdir = tmp_path / "run"
    for target, steps in (("90.0", 0), ("90.0", 0), ("none", 4)):
        config = make_config(
            text, "sft", training__target=target, training__steps="4", training__sample_every="0"
        )
        run(config, workdir, init_from=str(chat_run[0]))
        assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == steps
    printed = capsys.readouterr().out
    assert "done: 0 steps (best eval/loss" in printed
    assert "nothing to do: 0 steps are done; to train further, set training.target=none" in printed


def test_a_run_stopped_in_its_last_evaluation_ends_as_an_uninterrupted_one(
    chat_run, finished, text, tmp_path, monkeypatch, capsys
):
    evaluations, evaluate = [], pretrain.evaluate

    def interrupted(params, batches, score, check):
        evaluations.append(params)
        if len(evaluations) == 3:  # of steps 0, 4 and 8
            os.kill(os.getpid(), signal.SIGTERM)
            check()
        return evaluate(params, batches, score, check)

    monkeypatch.setattr(pretrain, "evaluate", interrupted)
    config, workdir = make_config(text, "sft", sample__num_held_out="4"), tmp_path / "run"
    with pytest.raises(Stopped, match="saved at step 8"):
        run(config, workdir, init_from=str(finished))
    assert read_metadata(find_checkpoint(workdir))["metrics"] is None
    capsys.readouterr()
    run(config, workdir, init_from=str(finished))
    printed = capsys.readouterr().out
    assert "note:" not in printed
    for each in (outcome(workdir), outcome(workdir / "best")):
        assert each == outcome(chat_run[0])
    run(config, workdir, init_from=str(tmp_path))
    printed = capsys.readouterr().out
    assert "nothing to do: 8 steps are done" in printed
    assert f"note: --init_from={tmp_path} is not used: the run resumes" in printed
    assert len(evaluations) == 4


def outcome(path):
    """Arrays and metadata of a checkpoint, and the rows of its run, without times and names."""
    folder = find_checkpoint(path)

    def timeless(row):
        return {name: x for name, x in row.items() if not name.startswith("perf/")}

    metadata = read_metadata(folder)
    rows = [timeless(row) for row in read_metrics(folder.parents[1] / "metrics.jsonl")]
    known = metadata | {"run": None, "metrics": timeless(metadata["metrics"])}
    return folder.name, read_all(folder), known, rows


def test_a_start_that_fails_leaves_no_file_that_the_next_one_takes(finished, text, tmp_path):
    template, rows = tmp_path / "mine.jinja", tmp_path / "bad.jsonl"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows.write_text('{"prompt": "a"}\n')
    config = make_config(text, "sft", data__template=str(template), data__train=str(rows))
    with pytest.raises(DataError):
        run(config, tmp_path / "run", init_from=str(finished))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["bad_rows.jsonl", "run.json"]


def test_a_custom_chat_template_is_saved_with_the_weights(finished, text, tmp_path, monkeypatch, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ bos_token }}{{ strftime_now('%H:%M:%S') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    few = {"training__steps": "3"} | NOT_EVALUATED
    run(
        make_config(text, "sft", data__template=str(template), **few),
        tmp_path / "sft",
        init_from=str(finished),
    )
    source = template.read_bytes()
    template.unlink()
    run(make_config(text, "reward_model", **few), tmp_path / "reward", init_from=str(tmp_path / "sft"))
    clock = json.loads((tmp_path / "sft" / "run.json").read_text())["clock"]
    assert f"the chat template is told that it is {clock}" in capsys.readouterr().out
    for name in ("sft", "reward"):
        folder = find_checkpoint(tmp_path / name)
        assert (folder / "template.jinja").read_bytes() == source
        assert read_metadata(folder)["clock"] == clock

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2100, 1, 1)

    monkeypatch.setattr("jaxllm.data.jinja_template.datetime", Later)  # the run's time does not pass
    assert checkpoint_template(load_checkpoint(tmp_path / "sft")).clock == clock
    template.write_bytes(source + b"{# edited #}")
    more = few | {"training__steps": "4"}
    run(make_config(text, "sft", data__template=str(template), **more), tmp_path / "sft")
    printed = capsys.readouterr().out
    assert "resumed at step 3" in printed
    assert f"data.template={template} is not used: the run keeps its chat template" in printed


@pytest.fixture(scope="module")
def reward_run(chat_run, text, tmp_path_factory):
    workdir, output = tmp_path_factory.mktemp("reward") / "reward", io.StringIO()
    config = make_config(text, "reward_model", optimizer__learning_rate="0.01", training__steps="12")
    with contextlib.redirect_stdout(output), compiles_of("reward_model", workdir):
        run(config, workdir, init_from=str(chat_run[0]))
    return workdir, output.getvalue()


def test_a_reward_model_trains_from_a_chat_model(reward_run):
    workdir, printed = reward_run
    for line in (
        r"pairs.jsonl: 60 rows read, 60 kept; formats: 60 \[prompt, chosen, rejected\]",
        r"train: \d+ pairs, mean length \d+ tokens .*; the chosen completion is longer in [\d.]+% of them",
        r"example, chosen .*: ⟦.*<\|assistant\|>⟧The ball\.<\|end\|>\n",
        r"example, rejected .*: ⟦.*<\|assistant\|>⟧No ball\.<\|end\|>\n",
    ):
        assert re.search(line, printed), line
    first, *_, last = read_metrics(workdir / "metrics.jsonl")
    assert first["eval/loss"] == pytest.approx(np.log(2))  # all rewards are 0
    assert last["eval/accuracy"] == 1.0
    known = json.loads((find_checkpoint(workdir) / "metadata.json").read_text())["metrics"]
    assert known["eval/reward_mean"] == last["eval/reward_mean"]
    assert known["eval/reward_std"] == last["eval/reward_std"] > 0


def test_a_reward_model_trains_from_a_reward_model_its_head_alone_if_wanted(
    reward_run, text, tmp_path, capsys
):
    config = make_config(text, "reward_model", training__steps="3", optimizer__trainable="^scalar_head")
    run(config, tmp_path / "head", init_from=str(reward_run[0]))
    program = build_program(config)
    before, after = params_of(reward_run[0], program), params_of(tmp_path / "head", program)
    assert not np.array_equal(before.pop("scalar_head")["kernel"], after.pop("scalar_head")["kernel"])
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert "; 32 trained)" in capsys.readouterr().out
    first = read_metrics(tmp_path / "head" / "metrics.jsonl")[0]
    assert first["eval/accuracy"] == 1.0  # step 0 has the head of the parent


@pytest.fixture(scope="module")
def dpo_runs(chat_run, text, tmp_path_factory):
    """reference -> the metrics of a run."""
    rows, folder = {}, tmp_path_factory.mktemp("dpo")
    for reference in ("on_the_fly", "cached"):
        config = make_config(text, "dpo", data__reference=reference, training__log_every="1")
        with compiles_of("dpo", folder / reference):
            run(config, folder / reference, init_from=str(chat_run[0]))
        rows[reference] = read_metrics(folder / reference / "metrics.jsonl")
    return rows


def test_both_kinds_of_reference_start_at_log_2_and_train_the_same(dpo_runs):
    for first, *_, last in dpo_runs.values():
        assert first["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert first["eval/rewards/margins"] == first["eval/rewards/chosen"] == 0
        assert last["eval/rewards/margins"] > 0
    for name in ("train/loss", "rewards/margins"):
        on_the_fly, cached = ([row[name] for row in rows if name in row] for rows in dpo_runs.values())
        assert len(cached) == 8
        np.testing.assert_allclose(cached, on_the_fly, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "run_of_it"),
    [("pretrain", "finished"), ("sft", "chat_run"), ("reward_model", "reward_run"), ("dpo", "dpo_runs")],
)
def test_a_run_compiles_only_at_its_start(request, stage, run_of_it):
    request.getfixturevalue(run_of_it)
    after = COMPILED_AFTER[stage]
    assert after.count(-1) >= 2  # the train step and an evaluation
    assert max(after) <= 4  # by then it has trained and evaluated, and it saves


def test_a_run_has_the_model_of_its_parent_but_for_how_it_is_computed(finished, text):
    config = make_config(text, "sft", model__num_layers="3", model__remat="full")
    used = with_model_of(config, str(finished))
    assert (used.model.num_layers, used.model.remat) == (1, "full")
    assert model_note(config, used) == "note: the model is that of --init_from: model.num_layers 3 -> 1"
    assert model_note(used, with_model_of(used, str(finished))) is None
    assert with_model_of(config, str(text / "nowhere")) == config  # which `initial_weights` reports


@pytest.mark.parametrize(
    ("stage", "parent", "changes", "message"),
    [
        ("sft", "reward_model", {}, "is a reward model and cannot generate; pass a policy checkpoint"),
        ("sft", "nowhere", {}, "^--init_from: .*nowhere does not exist"),
        ("dpo", None, {}, "--init_from=RUN is missing: it initializes DPO's policy"),
    ],
)
def test_an_unsuitable_parent_checkpoint_is_an_error(
    stage, parent, changes, message, finished, reward_run, text, tmp_path
):
    parents = {"pretrain": str(finished), "reward_model": str(reward_run[0]), None: None}
    parents["nowhere"] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=message):
        run(make_config(text, stage, **changes), tmp_path / "run", init_from=parents[parent])
