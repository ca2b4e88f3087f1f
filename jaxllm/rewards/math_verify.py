"""Mathematical equality beyond numbers (sets, intervals, algebra), by the library Math-Verify.

It takes milliseconds a completion, and its whole time limit for a hostile one. It interrupts itself by
signals, so it works only on the main thread of a process, where `RewardPool` calls it.
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.rewards.completion_text import after_thought

try:
    from math_verify import parse, verify
except ImportError:
    raise ConfigError(
        "the reward math_verify needs the library Math-Verify: pip install 'jaxllm[math]'"
    ) from None


def math_verify(example: Mapping[str, Any], completion: str) -> float | None:
    """1.0 if the completion's answer equals `example["answer"]`, or the part of it after `####`.

    What stands before `</think>` does not count, and a thought that is cut off gives 0. None where
    the library cannot parse the example's own answer.
    """
    answer = str(example["answer"]).rpartition("####")[2].strip()
    expected = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}")
    if not expected:
        return None
    text = after_thought(completion)
    return 0.0 if text is None else float(verify(expected, parse(text)))
