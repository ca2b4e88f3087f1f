"""Which held-out rows are evaluated, and how often each counts."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.evaluation.completions import ScoredCompletions, completion_metrics
from jaxllm.evaluation.preference import mean
from jaxllm.pipeline.gates import average, by_prompt
from jaxllm.rl.hooks import held_out_prompts
from jaxllm.runs.hooks import held_out_batches


class Numbers(list):
    """Rows that are numbers."""

    def blank(self):
        return -1


SOURCES = [Numbers(range(600)), Numbers(range(1000, 1600))]


@pytest.mark.parametrize(
    ("max_rows", "expected"), [(500, [248, 248]), (None, [600, 600]), (2000, [600, 600]), (1, [8, 8])]
)
def test_a_share_of_every_source_is_evaluated(max_rows, expected):
    evaluation = SimpleNamespace(max_rows=max_rows, num_sources=None)
    config = SimpleNamespace(evaluation=evaluation, data=SimpleNamespace(batch_size=16))
    rows = np.concatenate(list(held_out_batches(config, SOURCES)))
    assert [int((rows // 1000 == i).sum()) for i in (0, 1)] == expected
    evaluation.num_sources = 1
    assert (np.concatenate(list(held_out_batches(config, SOURCES))) < 600).all()


def test_a_share_of_the_prompts_of_every_source_is_completed():
    prompts = held_out_prompts(SOURCES, 10)
    assert prompts == [0, 1, 2, 3, 4, 1000, 1001, 1002, 1003, 1004]
    assert held_out_prompts(SOURCES[:1], 10) == list(range(10))
    assert held_out_prompts([], 10) == []


def test_completions_of_one_prompt_count_once_in_a_standard_error():
    """Three rows, of which two have one prompt, with two completions each; a reward applies to two rows."""
    rewards = np.array([1, 0, 1, 1, 0, 0], np.float32)
    applies = np.array([1, 0, np.nan, np.nan, 0, 0], np.float32)
    prompts = np.repeat([[7, 8], [7, 8], [9, 8]], 2, axis=0).astype(np.int32)
    completions = ScoredCompletions(
        completions=None,
        texts=[""] * 6,
        tokens=np.concatenate([prompts, np.arange(6)[:, None]], axis=1),
        prompt_lengths=np.full(6, 2),
        lengths=np.ones(6, int),
        truncated=np.zeros(6, bool),
        rewards=rewards,
        scores=SimpleNamespace(by_name={"a": rewards, "b": applies}),
        seconds=0.0,
    )
    found = completion_metrics(completions, 2, "eval/")
    assert (found["eval/reward"], found["eval/reward_se"]) == mean(np.array([0.5, 1, 0]), np.array([0, 0, 1]))
    assert (found["eval/reward/b"], found["eval/reward/b_se"]) == mean(np.array([0.5, 0.0]))


def test_a_gate_counts_a_repeated_prompt_once():
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"chosen": "c"}]
    assert by_prompt(rows).tolist() == [0, 0, 1, 2]
    values = np.array([1.0, 1.0, 0.0, np.nan])
    assert average(values, by_prompt(rows)) == mean(np.array([1.0, 1.0, 0.0]), np.array([0, 0, 1]))
