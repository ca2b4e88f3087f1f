"""Every config in configs/ builds; an inconsistent one is an error that names the fix."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import pytest
from tiny_runs import parse_config

from configs.base.models import SHAPES
from jaxllm.config import as_dict, as_flag, load_config, override, parse
from jaxllm.errors import ConfigError
from jaxllm.pipeline.config import PARENTS, PipelineConfig
from jaxllm.runs.resume import MAY_DIFFER
from jaxllm.stages import build_program
from jaxllm.training.metrics import parameter_count

CONFIGS = Path(__file__).parents[1] / "configs"

# Parameters without the embedding and the head, as published or as in the name (within 20%).
SIZES = {
    "1m": 1e6,
    "10m": 10e6,
    "60m": 60e6,
    "124m": 85e6,  # 124M with GPT-2's embedding
    "qwen3_0.6b": 0.44e9,
    "llama3.2_1b": 0.97e9,
    "llama3.1_8b": 6.98e9,
}


def load(name, **changes):
    return parse_config(name, {field.replace("__", "."): text for field, text in changes.items()})


@pytest.mark.parametrize("size", SHAPES)
def test_every_model_size_builds(size):
    program = build_program(load(f"pretrain_text.py:{size}"))
    params = program.abstract_state.params
    outside = parameter_count(params["blocks"]) + parameter_count(params["final_norm"])
    if size in SIZES:
        assert outside == pytest.approx(SIZES[size], rel=0.2)


LATER_STAGES = {
    "sft_chat.py": "sft",
    "reward_model_pairs.py": "reward_model",
    "dpo_pairs.py": "dpo",
    "grpo_problems.py": "grpo",
    "ppo_preferences.py": "ppo",
}


@pytest.mark.parametrize("name", LATER_STAGES)
def test_a_later_stage_builds_with_the_parameters_of_the_pretrained_model(name):
    pretrained, program = build_program(load("pretrain_text.py:tiny")), build_program(load(f"{name}:tiny"))
    assert program.config.stage == LATER_STAGES[name]
    assert program.config.model == pretrained.config.model
    assert program.config.optimizer.learning_rate < pretrained.config.optimizer.learning_rate
    names = pretrained.abstract_state.params.keys()
    own = {"reward_model_pairs.py": names | {"scalar_head"}, "ppo_preferences.py": {"policy", "critic"}}
    assert program.abstract_state.params.keys() == own.get(name, names)


def test_every_config_file_is_tested():
    tested = {"pretrain_text.py", *PIPELINES, *LATER_STAGES, *SWEEPS, "synthesize.py"}
    assert {path.name for path in CONFIGS.glob("*.py")} == tested


SWEEPS = ("isoflops.py", "learning_rates.py", "sweep_pretrain.py")


@pytest.mark.parametrize("name", SWEEPS)
def test_every_trial_of_a_sweep_builds(name):
    trials = list(importlib.import_module(f"configs.{name.removesuffix('.py')}").sweep())
    assert len({str(trial) for trial in trials}) == len(trials) > 1
    for trial in trials:
        parse_config(name, {field: str(value) for field, value in trial.items()})


PIPELINES = {
    "smoke.py": 1,
    "quickstart.py": 1,
    "pipeline_124m.py": 1,
    "pipeline_1b.py": 8,
}  # config file -> number of devices to build for


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_pipeline_builds_and_is_selected_by_name(name):
    whole = parse(PipelineConfig, load_config(str(CONFIGS / name)))
    for stage in PARENTS:
        assert load(f"{name}:{stage}") == getattr(whole, stage)
        config = load(f"{name}:{stage}", model__attention="xla")
        build_program(config, jax.devices()[: PIPELINES[name]])
        assert config.stage == ("sft" if stage == "sft_reasoning" else stage)


@pytest.mark.parametrize("name", PIPELINES)
def test_one_field_sets_model_seed_and_data_of_all_stages(name):
    config = load_config(str(CONFIGS / name))
    for field, text in (("model.attention", "xla"), ("seed", "7"), ("data.pairs", "mine.jsonl")):
        override(config, PipelineConfig, field, text)
    whole = parse(PipelineConfig, config)
    assert {getattr(whole, stage).model.attention for stage in PARENTS} == {"xla"}
    assert {getattr(whole, stage).seed for stage in PARENTS} == {7}
    for stage in ("reward_model", "ppo", "dpo"):
        assert getattr(whole, stage).data.train == ("mine.jsonl",)


def test_the_tokenizer_follows_the_models_vocabulary():
    assert load("pretrain_text.py", model__vocab_size="2000").tokenizer.vocab_size == 2000


def test_an_unknown_size_is_an_error_that_lists_the_sizes():
    with pytest.raises(ConfigError, match=r"no model size '1k': choose one of tiny, 1m"):
        load("pretrain_text.py:1k")


def test_an_unknown_stage_of_a_pipeline_is_an_error_that_lists_the_stages():
    with pytest.raises(ConfigError, match=r"no stage 'pretrian': choose one of dpo, .*, sft_reasoning"):
        load("quickstart.py:pretrian")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch_size": "12"}, "data.batch_size=12 .* 8 devices .* use 8 or 16"),
        ({"training__num_microbatches": "3"}, "data.batch_size=16 .*training.num_microbatches=3: use 24"),
        ({"training__num_microbatches": "0"}, "training.num_microbatches=0 must be at least 1"),
        ({"training__steps": "0"}, "training.steps=0 must be at least 1"),
        (
            {"mesh__data": "3"},
            "mesh: data=3 x fsdp=1 x sequence=1 x tensor=1 is 3 devices, but there are 8; set one",
        ),
        ({"mesh__fsdp": "-1"}, "at most one of them -1"),
        ({"data__sequence_length": "1024"}, "data.sequence_length=1024 is over model.max_length=512"),
        ({"model__num_kv_heads": "3"}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"optimizer__name": "sgd"}, "optimizer.name='sgd': choose one of adamw, muon"),
        (
            {"optimizer__warmup_steps": "1000"},
            "optimizer.warmup_steps=1000 must be .* less than training.steps=300",
        ),
        ({"stage": "pretrian"}, "stage='pretrian': choose one of"),
        ({"checkpoint__keep": "0"}, "checkpoint.keep=0 must be at least 1"),
        ({"evaluation__max_rows": "0"}, "evaluation.max_rows=0 must be at least 1, or none"),
    ],
)
def test_an_inconsistent_config_is_an_error_with_the_fix_before_compiling(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_program(load("pretrain_text.py", **changes))


@pytest.mark.parametrize(("attention", "platform"), [("cudnn", "gpu"), ("splash", "tpu")])
def test_flash_attention_on_another_platform_is_an_error_before_compiling(attention, platform):
    config = load("pretrain_text.py:tiny", model__attention=attention, model__compute_dtype="bfloat16")
    problem = rf"model\.attention={attention} needs a {platform}, this is a cpu: set model\.attention=xla"
    with pytest.raises(ConfigError, match=problem):
        build_program(config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sft_chat.py", {"data__loss_on": "user"}, "data.loss_on='user': choose one of assistant, last, all"),
        ("sft_chat.py", {"data__overlong": "keep"}, "data.overlong='keep': choose one of drop, truncate"),
        ("sft_chat.py", {"data__rename": "question"}, "data.rename has 'question'; write THEIRS=OURS"),
        ("sft_chat.py", {"objective__dft": "true", "objective__z_loss": "1e-4"}, "set objective.z_loss=0"),
        ("sft_chat.py", {"objective__neftune_alpha": "-5"}, "neftune_alpha=-5.0 must not be negative"),
        ("sft_chat.py", {"checkpoint__best_is": "low"}, "checkpoint.best_is='low' must be 'lowest' or"),
        (
            "reward_model_pairs.py",
            {"checkpoint__best_metric": "none", "training__patience": "2"},
            "training.patience=2 needs a metric to compare: set checkpoint.best_metric",
        ),
        (
            "sft_chat.py",
            {"checkpoint__best_metric": "none", "training__target": "2"},
            "training.target=2.0 needs a metric to compare: set checkpoint.best_metric",
        ),
        (
            "reward_model_pairs.py",
            {"stage": "dpo"},
            "stage='dpo' is not that of the config file: choose another",
        ),
        (
            "reward_model_pairs.py",
            {"optimizer__trainable": "haed"},
            "optimizer.trainable='haed' is found in the path of no parameter",
        ),
        ("dpo_pairs.py", {"objective__variant": "dpo"}, "objective.variant.*'dpo'.*sigmoid"),
        (
            "dpo_pairs.py",
            {"objective__variant": "hinge", "objective__label_smoothing": "0.1"},
            "objective.label_smoothing.*hinge",
        ),
        ("dpo_pairs.py", {"objective__beta": "0"}, "objective.beta=0.0 must be above 0"),
        (
            "dpo_pairs.py",
            {"objective__length_normalized": "true"},
            "objective.length_normalized is not supported in variant 'sigmoid'",
        ),
        (
            "dpo_pairs.py",
            {"data__reference": "disk"},
            "data.reference='disk' must be 'cached' or 'on_the_fly'",
        ),
    ],
)
def test_an_inconsistent_config_of_a_later_stage_is_an_error(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_program(load(name, **changes))


def test_every_field_that_may_differ_within_a_run_exists():
    stages = ("pretrain_text.py", "dpo_pairs.py", "ppo_preferences.py")
    everything = [as_dict(load(name)) for name in stages]
    for path in MAY_DIFFER:
        found = everything
        for name in path.split("."):
            found = [section[name] for section in found if name in section]
        assert found, f"{path} was renamed"


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("pretrain_text.py").seed = 1


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("sft.training.steps", "1e3", 1000),
        ("data.chats", "2024", ("2024",)),
        ("sft.data.validation", "none", ()),
        ("sft.sample.prompts", "Hello, world", ("Hello, world",)),
        ("gates.shown", "Hello, world", ("Hello, world",)),
        ("ppo.data.system", "none", None),
        ("ppo.data.prompt_format", "{a}, {b}", "{a}, {b}"),
    ],
)
def test_a_flag_is_read_as_the_type_of_its_field_and_passed_on_to_the_stages_unchanged(field, text, value):
    for flag in (text, as_flag(list(value) if isinstance(value, tuple) else value)):
        config = load_config(str(CONFIGS / "smoke.py"))
        override(config, PipelineConfig, field, flag)
        assert functools.reduce(getattr, field.split("."), parse(PipelineConfig, config)) == value
