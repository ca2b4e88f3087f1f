"""What rewards read of a completion: its text, and the thought that the prompt has opened."""

import numpy as np
import pytest

from jaxllm.data.base_tokenizer import BaseTokenizer
from jaxllm.data.prompts import Prompt
from jaxllm.evaluation.completions import Completer
from jaxllm.rewards.pool import Scores
from jaxllm.rewards.scorer import RewardConfig, RewardScorer
from jaxllm.rollout.collect import Completions
from jaxllm.rollout.sampling import SamplingConfig

ANSWER = "It is 2.</think> <answer>2</answer>"


class Bytes(BaseTokenizer):
    """A token a byte, and special tokens."""

    pad_id = 0
    _prefix = ""

    def __init__(self, *special):
        self.special_ids = {name: 256 + i for i, name in enumerate(("<end>", *special))}
        self.pieces = [chr(i) for i in range(256)] + list(self.special_ids)
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""] * len(self.special_ids)

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


class Recorder(RewardScorer):
    """Records what it is given to score."""

    def __init__(self):
        super().__init__(RewardConfig((), (), None, 1.0, False, 1, 1.0, 0.0, 0, 0.0), None)
        self.texts = {}

    def begin(self, examples):
        scorer = self

        class Scoring:
            def add(self, numbers, texts):
                scorer.texts |= dict(zip(numbers, texts, strict=True))

            def result(self, check):
                known = np.ones(len(examples), bool)
                return Scores(np.zeros(len(examples), np.float32), {}, known, ~known, {}, [])

        return Scoring()


def complete(tokenizer, prompts, completion):
    """What rewards read of this completion, twice of each prompt, and the texts that are written."""

    def sample(params, ids, *, on_done, **options):
        tokens = [[*tokenizer.encode_markup(completion), tokenizer.special_ids["<end>"]]] * 2 * len(ids)
        for i in reversed(range(len(tokens))):
            on_done([i], [tokens[i]])
        return Completions(tokens, [np.zeros(len(each)) for each in tokens], ["stop"] * len(tokens), 1)

    scorer = Recorder()
    completions = Completer(sample, tokenizer, (), scorer, 8)(
        None,
        [Prompt(tokenizer.encode_markup(text), {}) for text in prompts],
        group_size=2,
        sampling=SamplingConfig(1.0, None, None, None, 9),
        keys=None,
        check=lambda: None,
    )
    return [scorer.texts[i] for i in range(2 * len(prompts))], completions.texts


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["as text", "as special tokens"])
@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("Question<end><think>", "<think>"),
        ("Question<end><think>\n", "<think>\n"),
        ("Question<end><think>\n\n", "<think>\n\n"),
        ("Question<end>", ""),
        ("What is <think>?<end>", ""),
        ("Question<end><think>\n\n</think>\n\n", ""),
        ("", ""),
        ("é" * 40 + "<think>", "<think>"),
    ],
)
def test_a_thought_that_the_prompt_has_opened_reaches_the_rewards(special, prompt, opened):
    read, written = complete(Bytes(*special), [prompt, "Other<end>"], ANSWER)
    assert read == [opened + ANSWER] * 2 + [ANSWER] * 2
    assert written == read
