"""Is the completion exactly the text that the example expects?"""

from collections.abc import Mapping
from typing import Any

from jaxllm.rewards.completion_text import after_thought


def exact_match(example: Mapping[str, Any], completion: str) -> float:
    """1.0 if the completion is `example["answer"]`, or one of them where that is a list; white space counts
    as one space, and none at the ends. What stands before `</think>` does not count.

    >>> exact_match({"answer": ["a dog", "dog"]}, " a  dog\\n"), exact_match({"answer": 4}, "4.")
    (1.0, 0.0)
    """
    answers, text = example["answer"], after_thought(completion)
    answers = answers if isinstance(answers, list) else [answers]
    return float(text is not None and text.split() in [str(answer).split() for answer in answers])
