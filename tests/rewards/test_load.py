"""Loading rewards by name, and the one-line errors for those that cannot be loaded."""

import sys

import pytest

from jaxllm.errors import ConfigError
from jaxllm.rewards.load import load_reward, reward_names
from jaxllm.rewards.math_answer import math_answer


@pytest.fixture
def user_file(tmp_path):
    def write(source):
        path = tmp_path / "mine.py"
        path.write_text(source)
        return path

    return write


def test_rewards_of_this_package_have_bare_names():
    assert load_reward("math_answer") is math_answer
    assert {"countdown", "format", "length", "math_answer", "math_verify"} <= set(reward_names())
    for name in reward_names():
        assert load_reward(name).__name__ == name


def test_functions_of_users_have_dotted_names_or_files(user_file):
    assert load_reward("jaxllm.rewards.math_answer.math_answer") is math_answer
    path = user_file(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from functools import partial\n"
        "from jaxllm.rewards.countdown import countdown\n"
        "@dataclass\nclass Row:\n    nums: list\n"
        "reward = partial(countdown, partial_credit=0.5)\n"
    )
    assert load_reward(f"{path}:reward")({"nums": [2], "target": 3}, "2") == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math_anwser", "'math_anwser': unknown, did you mean 'math_answer'?"),
        ("pool", "'pool': unknown"),
        ("scorer", "'scorer': unknown"),
        ("nowhere_to_be_found.reward", "No module named 'nowhere_to_be_found'"),
        ("jaxllm.rewards.countdown.cuntdown", "no function 'cuntdown', did you mean 'countdown'?"),
        ("math.pi", "math: no function 'pi'"),
        ("math.gcd.gcd", "No module named 'math.gcd'"),
        ("os.path.join.", "'os.path.join.'"),
    ],
)
def test_a_name_that_does_not_exist(name, message):
    with pytest.raises(ConfigError) as caught:
        load_reward(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def reward(example, completion):\n    return (1.0\n",
            "mine.py:2: SyntaxError: '(' was never closed",
        ),
        ("\nimport nowhere_to_be_found\n", "mine.py:2: ModuleNotFoundError: No module named"),
        ("\n\nLIMIT = 1 / 0\n", "mine.py:3: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", "mine.py:2: json.decoder.JSONDecodeError"),
        ("import sys\nsys.exit('no')\n", "mine.py:2: SystemExit: no"),
        ("def rewrad(example, completion): ...\n", "mine.py: no function 'reward', did you mean 'rewrad'?"),
        ("reward = 1.0\n", "mine.py: no function 'reward'"),
        ("def reward(completion): ...\n", "must take (example, completion): too many positional arguments"),
    ],
)
def test_a_faulty_file_is_a_one_line_error_with_file_and_line(user_file, source, message):
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{user_file(source)}:reward")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_function_name(user_file):
    path = user_file("")
    with pytest.raises(ConfigError, match=r"no such file, did you mean 'mine.py'\?"):
        load_reward(f"{path.parent}/mime.py:reward")
    with pytest.raises(ConfigError, match=r"give the name of the function too, as .*mine.py:FUNCTION"):
        load_reward(str(path))


def test_a_missing_extra_is_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "jaxllm.rewards.math_verify", raising=False)
    with pytest.raises(ConfigError, match=r"^the reward math_verify .*pip install 'jaxllm\[math\]'$"):
        load_reward("math_verify")
