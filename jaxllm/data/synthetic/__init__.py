"""A small English world without end: text that a model of a million parameters learns in minutes.

    >>> from jaxllm.data.synthetic import documents
    >>> for text in documents("train", count=3, seed=0):
    ...     print(text)

`World` says what is true, `facts` puts it into words, `problems` makes sums whose answers can be checked,
`stories` and `descriptions` write texts from them, and `documents` mixes these and keeps the splits apart.
"""

from jaxllm.data.synthetic.documents import document, documents
from jaxllm.data.synthetic.facts import Fact, fact
from jaxllm.data.synthetic.problems import Problem, sum_problem, word_problem
from jaxllm.data.synthetic.split import Split, split_of
from jaxllm.data.synthetic.world import Person, Town, World, build_world

__all__ = [
    "Fact",
    "Person",
    "Problem",
    "Split",
    "Town",
    "World",
    "build_world",
    "document",
    "documents",
    "fact",
    "split_of",
    "sum_problem",
    "word_problem",
]
