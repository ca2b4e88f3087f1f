"""Is the completion short? To be combined with a reward for correctness, never used alone."""

from collections.abc import Mapping
from typing import Any


def length(example: Mapping[str, Any], completion: str, *, limit: int = 256) -> float:
    """max(0, 1 - words / limit): 1 for an empty completion, 0 for `limit` words or more.

    `jaxllm.losses.overlong_penalty` penalizes only completions near their maximum length, in tokens.
    """
    return max(0.0, 1.0 - len(completion.split()) / limit)
