"""A generator of synthetic English data for every stage of training, about a small invented world.

A model of a million parameters learns it in minutes, and every answer in it can be checked. Configs name it
as a source: `synthetic`, `synthetic:chats`, ... (`jaxllm.data.sources`).

    >>> from jaxllm.toy_world import documents
    >>> for text in documents("train", count=3, seed=0):
    ...     print(text)

There is one function per kind of data:

- `documents`: plain texts, for pretraining.
- `chats`: conversations, for instruction fine-tuning.
- `drafts`: prompts with completions of mixed quality, for a policy that preference training can improve.
- `preferences`: pairs of completions labeled by a hidden rubric, for a reward model or DPO.
- `problems`, and the easier `additions`: arithmetic with a checkable answer, for GRPO and PPO.

Each takes a split, a number of rows and a seed. The seed determines the world: 48 people, their towns, jobs
and friends, the same in the data of all kinds. A row is a function of (seed, split, index) alone, so any
number of rows can be generated in any order. A hash assigns texts, prompts and equations to the training or
the validation split, so that the two never overlap.

From the bottom up: `language` fills in templates; `english/*.txt` has the templates and the words (in British
spelling); `lexicon` has things, animals and jobs; `world` draws the people and towns; `facts` puts single
facts into words; `problems`, `stories` and `descriptions` make texts; `exchanges` makes questions with
reference answers. `rubric` scores any completion of a prompt of `preferences`. It labels the pairs and
measures the effect of training on them, so no training may use it as a reward.
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
