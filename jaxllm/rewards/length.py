"""Is the completion short? To be weighed against a reward for being right, never used alone."""

from collections.abc import Mapping
from typing import Any


def length(example: Mapping[str, Any], completion: str, *, limit: int = 256) -> float:
    """max(0, 1 - words / limit): 1 for nothing, 0 from `limit` words on.

    What punishes only answers near the end of the window is `jaxllm.losses.overlong_penalty`, in tokens.
    """
    return max(0.0, 1.0 - len(completion.split()) / limit)
