"""A small English world without end: text that a model of a million parameters learns in minutes.

    >>> from jaxllm.toy_world import chats, documents, preferences, problems
    >>> for text in documents("train", count=3, seed=0):
    ...     print(text)

One function for each stage of training: `documents` to learn English from, `chats` to learn to answer,
`drafts` to speak as those do who have not been told what is liked, `preferences` to learn which of two
answers is better, `problems` (the easiest: `additions`) to learn to reason. All are about the world of their
seed, keep their splits apart, and write each row as a function of (seed, split, index) alone.

Beneath them, `World` says what is true, `facts` puts it into words, `sum_problem` and `word_problem` have
answers that can be checked, `stories` and `descriptions` are texts, `exchanges` are questions with their
answers. `rubric` judges any answer to the prompt of a preference: it labels the pairs and measures what came
of training on them, and no training may see it.
"""

from jaxllm.toy_world.chats import chat, chats
from jaxllm.toy_world.documents import document, documents
from jaxllm.toy_world.facts import Fact, fact
from jaxllm.toy_world.preferences import draft, drafts, preference, preferences
from jaxllm.toy_world.problems import (
    Problem,
    addition_row,
    additions,
    problem_row,
    problems,
    sum_problem,
    word_problem,
)
from jaxllm.toy_world.rubric import correct, rubric
from jaxllm.toy_world.split import Split, split_of
from jaxllm.toy_world.world import Person, Town, World, build_world

__all__ = [
    "Fact",
    "Person",
    "Problem",
    "Split",
    "Town",
    "World",
    "addition_row",
    "additions",
    "build_world",
    "chat",
    "chats",
    "correct",
    "document",
    "documents",
    "draft",
    "drafts",
    "fact",
    "preference",
    "preferences",
    "problem_row",
    "problems",
    "rubric",
    "split_of",
    "sum_problem",
    "word_problem",
]
