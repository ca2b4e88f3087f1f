"""Mathematical equality beyond numbers (sets, intervals, algebra), by the library Math-Verify.

It costs milliseconds a sample, and a hostile answer its whole time-out; it interrupts itself by signals, and
so only works on a main thread, which is where `RewardPool` runs it.
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import ConfigError

try:
    from math_verify import parse, verify
except ImportError:
    raise ConfigError(
        "the reward math_verify needs a library that is missing: pip install 'jaxllm[math]'"
    ) from None


def math_verify(example: Mapping[str, Any], completion: str) -> float | None:
    """1.0 if the completion's answer equals `example["answer"]` or what stands behind `####` in it.

    None where the library cannot read the example's own answer.
    """
    answer = str(example["answer"]).rpartition("####")[2].strip()
    expected = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}")
    return float(verify(expected, parse(completion))) if expected else None
