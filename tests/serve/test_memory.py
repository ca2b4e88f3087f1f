"""Memory is planned before anything is loaded; a length that does not fit is an error with one that does."""

from dataclasses import replace

import pytest

from configs.base.models import model as model_shape
from jaxllm.config import parse
from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig
from jaxllm.serve.memory import Sizes, cache_bytes, fitting_plan, plan, working_bytes

# 2 layers of 4 key-value heads of 8 in float32: 2 * 2 * 4 * 8 * 4 = 512 bytes a token.
CONFIG = replace(
    parse(ModelConfig, model_shape("tiny")),
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_width=100,
    vocab_size=1000,
    max_length=1024,
    attention="xla",
    compute_dtype="float32",
)
SMALL = {"a": Sizes(CONFIG, 4_000_000)}


def test_the_cache_holds_all_rows_a_quarter_more_while_it_grows_and_one_prompt():
    assert cache_bytes(CONFIG, rows=16, length=1024) == (16 + 4 + 1) * 1024 * 512
    half = replace(CONFIG, compute_dtype="bfloat16")
    assert cache_bytes(half, 16, 1024) == cache_bytes(CONFIG, 16, 1024) // 2


def test_attention_scores_of_a_long_prompt_grow_with_the_square_of_its_length():
    assert working_bytes(CONFIG, rows=16, length=1024) == 5 * 8 * 1024**2 + 3 * 4 * 1024 * 100
    assert working_bytes(CONFIG, rows=16, length=2048) == 5 * 8 * 2048**2 + 3 * 4 * 2048 * 100
    flash = replace(CONFIG, attention="cudnn")
    assert working_bytes(flash, rows=16, length=1024) == 3 * 4 * 1024 * 100
    assert working_bytes(flash, rows=200, length=1024) == 3 * 4 * 200 * 1000  # logits


def test_models_share_the_memory_and_each_keeps_its_own_longest():
    models = {"a": Sizes(CONFIG, 1000), "b": Sizes(replace(CONFIG, max_length=512), 2000)}
    both = plan(models, rows=4, max_length=1024, available=0)
    assert both.params == 3000
    assert both.cache == cache_bytes(CONFIG, 4, 1024) + cache_bytes(CONFIG, 4, 512)
    assert both.working == working_bytes(CONFIG, 4, 1024)


@pytest.mark.parametrize(
    ("available", "wanted", "length"),
    [(10**9, None, 1024), (10**9, 300, 300), (21_000_000, None, 512), (20_500_000, 300, 300)],
)
def test_without_a_flag_the_longest_that_fits_is_served(available, wanted, length):
    fitting = fitting_plan(SMALL, 16, wanted, available)
    assert fitting.max_length == length
    assert fitting.total <= available


@pytest.mark.parametrize(
    ("available", "wanted", "message"),
    [
        (10**9, 1025, "--max_length=1025 must be from 1 to 1024"),
        (10**9, 0, "--max_length=0 must be from 1 to 1024"),
        (21_000_000, 1024, r"--max_length=1024 with --rows=16 does not fit .*; --max_length=512 does"),
        (3_000_000, None, "--checkpoint and --rows=16 do not fit the memory"),
    ],
)
def test_what_does_not_fit_is_an_error_with_what_does(available, wanted, message):
    with pytest.raises(ConfigError, match=message):
        fitting_plan(SMALL, 16, wanted, available)
