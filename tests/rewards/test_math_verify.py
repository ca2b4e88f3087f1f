"""math_verify by a stand-in for the library, which is an extra: what of a completion it is given."""

import sys
import types

import pytest

from jaxllm.rewards.load import load_reward


@pytest.fixture
def math_verify(monkeypatch):
    library = types.ModuleType("math_verify")
    library.parse = lambda text: [text] if text else []
    library.verify = lambda expected, given: expected[0].removeprefix("\\boxed{").rstrip("}") in given
    monkeypatch.setitem(sys.modules, "math_verify", library)
    monkeypatch.delitem(sys.modules, "jaxllm.rewards.math_verify", raising=False)
    yield load_reward("math_verify")
    sys.modules.pop("jaxllm.rewards.math_verify")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("41", 1.0),
        ("<think>42</think>41", 1.0),
        ("Try 42.</think>41", 1.0),
        ("<think>41</think>42", 0.0),
        ("<think>41", 0.0),
        ("41<think>", 0.0),
    ],
)
def test_the_answer_is_what_stands_after_the_thought(math_verify, completion, reward):
    assert math_verify({"answer": "41"}, completion) == reward
