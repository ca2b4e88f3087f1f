"""Is the completion a thought followed by an answer, each in its tags?"""

import re
from collections.abc import Mapping
from typing import Any


def format(
    example: Mapping[str, Any], completion: str, *, tags: tuple[str, ...] = ("think", "answer")
) -> float:
    """1.0 if the completion is `<think>...</think> <answer>...</answer>`, each tag once around some text, and
    nothing else. Where the prompt has opened the `<think>`, the completion begins with it here."""
    if any(completion.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return 0.0
    pattern = r"\s*".join(rf"<{re.escape(tag)}>\s*+\S.*</{re.escape(tag)}>" for tag in tags)
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)
