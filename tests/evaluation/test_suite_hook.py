"""Suites while a run trains: in metrics.jsonl with standard errors, compiled once, equal to evaluate.py's."""

import json
from types import SimpleNamespace

import jax
import pytest
from rl_runs import make_config, rows_of, run, write_rows
from tiny_runs import parse_config

from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.suite_hook import check_suites
from jaxllm.evaluation.suite_model import SuiteModel
from jaxllm.evaluation.suites import read_results
from jaxllm.stages import find_stage

CHOICES = [
    {"prompt": f"{word}?", "choices": [word, "no", "yes and no"], "answer": i % 3}
    for i, word in enumerate(("aa", "ee i", "oo u"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of an SFT run, and a suite of each kind."""
    folder = tmp_path_factory.mktemp("hook")
    suites = {
        "mc": CHOICES,
        "qa": [{"prompt": "aa", "answer": "no"}],
        "text": [{"text": "aa no"}, {"text": "ee " * 40}],
    }
    for name, rows in suites.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    """A run that measured the suites at steps 0, 2 and 4, and how many programs each measurement compiled."""
    events, compiled, measure = [], [], SuiteModel.measure

    def listen(event, duration, **_):
        events.append(event)

    def counted(self, suite):
        before = len(events)
        results = measure(self, suite)
        compiled.append(sum("backend_compile" in event for event in events[before:]))
        return results

    names = ",".join(str(folder / f"{name}.jsonl") for name in ("mc", "qa", "text"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SuiteModel, "measure", counted)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            write_rows(folder)
            config = make_config(
                "sft",
                data__train=folder / "sft.jsonl",
                training__steps=4,
                evaluation__suites=names,
                evaluation__suites_every=2,
                evaluation__max_new_tokens=4,
            )
            return run(config, folder / "run"), compiled
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)


def test_suites_are_measured_every_so_many_steps_and_compile_once(measured):
    rows, compiled = rows_of(measured[0]), measured[1]
    metrics = ("mc/accuracy", "mc/accuracy_normalized", "qa/exact_match", "text/bits_per_byte")
    names = {f"eval/suite/{name}{end}" for name in metrics for end in ("", "_se")}
    assert {step: {n for n in row if n.startswith("eval/suite/")} for step, row in rows.items()} == {
        step: names if step in (0, 2, 4) else set() for step in rows
    }
    assert sum(compiled[:3]) > 0
    assert compiled[3:] == [0] * 6


def test_the_results_are_those_of_evaluate_on_the_checkpoint(measured, folder, tmp_path, run_here):
    flags = [f"--checkpoint={measured[0]}", f"--suite={folder}/mc.jsonl,{folder}/qa.jsonl"]
    code, _, errors = run_here("evaluate.py", *flags, "--max_new_tokens=4", f"--output={tmp_path}")
    assert code == 0, errors
    for name in ("mc", "qa"):
        ours = list(read_results(measured[0] / "suites" / name / "4.jsonl"))
        assert ours == list(read_results(tmp_path / f"{name}.jsonl"))


@pytest.mark.parametrize(
    "stage", ["pretrain_text", "sft_chat", "dpo_pairs", "ppo_preferences", "grpo_problems"]
)
def test_a_bad_suite_is_an_error_before_anything_is_read(stage, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a?", "choices": ["a", "b"], "answer": 9}\n')
    config = parse_config(
        f"{stage}.py:tiny", {"evaluation.suites": tmp_path / "bad.jsonl"} | REWARD.get(stage, {})
    )
    inputs = SimpleNamespace(
        program=SimpleNamespace(config=config), initial=SimpleNamespace(parent="x"), bad_rows_folder=None
    )
    with pytest.raises(DataError, match=r"^evaluation.suites: .*bad.jsonl:1: .*'answer' is 9"):
        find_stage(config.stage).load(inputs)


REWARD = {"ppo_preferences": {"reward.functions": "length", "reward.weights": "1"}}


def test_what_suites_do_not_support_is_refused(folder):
    def parsed(stage, **fields):
        return parse_config(f"{stage}.py:tiny", {f"evaluation.{name}": x for name, x in fields.items()})

    with pytest.raises(ConfigError, match="a reward model cannot generate"):
        parsed("reward_model_pairs", suites=folder / "mc.jsonl")
    with pytest.raises(ConfigError, match="max_new_tokens=0 must be at least 1"):
        parsed("sft_chat", max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"evaluation.suites_every=3 must be a multiple of rollout.epochs"):
        make_config("grpo", data__train="x", reward__functions="length", evaluation__suites_every=3)
    for fields, message in (
        ({"evaluation.suites_every": 0}, r"suites_every=0 would never measure evaluation.suites"),
        (
            {"checkpoint.best_metric": "eval/suite/mc/accuracy"},
            "the highest .*/accuracy is best: set checkpoint.best_is",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_suites(
                parse_config("sft_chat.py:tiny", {"evaluation.suites": folder / "mc.jsonl", **fields})
            )
    config = parsed("sft_chat", suites=folder / "qa.jsonl", max_new_tokens=9999)
    inputs = SimpleNamespace(program=SimpleNamespace(config=config), bad_rows_folder=None)
    with pytest.raises(ConfigError, match=r"evaluation.max_new_tokens=9999 leaves no room"):
        find_stage("sft").load(inputs)
