"""Every shipped config describes a run that fits together."""

import dataclasses
from pathlib import Path

import jax
import pytest

from configs.models import SHAPES
from experiments.run import Program, find_stage
from experiments.train_config import MAY_DIFFER
from jaxllm.config import as_dict, load_config, override, parse
from jaxllm.errors import ConfigError
from jaxllm.training.metrics import parameter_count

CONFIGS = Path(__file__).parents[1] / "configs"

# Parameters outside the embedding and the head, as the makers count them or the name says (within 20%).
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
    config = load_config(str(CONFIGS / name))
    for field, text in changes.items():
        override(config, find_stage(config.stage).Config, field.replace("__", "."), text)
    return parse(find_stage(config.stage).Config, config)


@pytest.mark.parametrize("size", SHAPES)
def test_every_size_of_the_dial_builds(size):
    program = Program(load(f"pretrain_text.py:{size}"))
    params = program.abstract_state.params
    outside = parameter_count(params["blocks"]) + parameter_count(params["final_norm"])
    if size in SIZES:
        assert outside == pytest.approx(SIZES[size], rel=0.2)


def test_quickstart_builds():
    assert Program(load("quickstart.py"), jax.devices()[:1]).config.data.train == ("synthetic",)


def test_the_tokenizer_follows_the_model_s_vocabulary():
    assert load("pretrain_text.py", model__vocab_size="2000").tokenizer.vocab_size == 2000


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(ConfigError, match=r"no model size '1k': choose one of tiny, 1m"):
        load("pretrain_text.py:1k")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch_size": "12"}, "data.batch_size=12 .* 8 devices .* use 8 or 16"),
        ({"training__num_microbatches": "3"}, "data.batch_size=16 .*training.num_microbatches=3: use 24"),
        ({"training__num_microbatches": "0"}, "training.num_microbatches=0 must be at least 1"),
        ({"training__steps": "0"}, "training.steps=0 must be at least 1"),
        ({"mesh__data": "3"}, "mesh: data=3 x fsdp=1 x tensor=1 does not cover 8 devices"),
        ({"mesh__fsdp": "-1"}, "at most one of them -1"),
        ({"data__sequence_length": "1024"}, "data.sequence_length=1024 is over model.max_length=512"),
        ({"model__num_kv_heads": "3"}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"optimizer__name": "sgd"}, "optimizer.name='sgd': choose one of adamw, muon"),
        (
            {"optimizer__warmup_steps": "1000"},
            "optimizer.warmup_steps=1000 must be under training.steps=300",
        ),
        ({"stage": "pretrian"}, "stage='pretrian': choose one of"),
        ({"checkpoint__keep": "0"}, "checkpoint.keep=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling_with_the_mend(changes, message):
    with pytest.raises(ConfigError, match=message):
        Program(load("pretrain_text.py", **changes))


def test_every_field_that_may_differ_within_a_run_exists():
    fields = as_dict(load("pretrain_text.py"))
    for path in MAY_DIFFER:
        section = fields
        for name in path.split("."):
            section = section[name]  # KeyError for a field that was renamed


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("pretrain_text.py").seed = 1
