"""A small text and a tokenizer trained on it, for all tests of `jaxllm/data/`."""

import pytest

from jaxllm.data.chat_template import ChatTemplate, load_template
from jaxllm.data.tokenizer import Tokenizer, train_tokenizer

NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("red  ball", "wooden boat", "old book", "small lamp", "blue kite")
PLACES = ("garden", "kitchen", "harbour", "market", "forest", "tower", "school")


def make_documents(count: int) -> list[str]:
    """Different short texts, with newlines, double spaces and numbers."""
    return [
        f"{NAMES[i % 6]} left the {THINGS[i % 5]} in the {PLACES[i % 7]}.\n\n"
        f"{NAMES[(i + 1) % 6]} counted {i} + {i % 9} = {i + i % 9}.\n" * (1 + i % 3)
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(200)


@pytest.fixture(scope="session")
def tokenizer(documents) -> Tokenizer:
    return train_tokenizer(documents, vocab_size=400, max_bytes=1_000_000)


@pytest.fixture(scope="session")
def native(tokenizer) -> ChatTemplate:
    return load_template(tokenizer, None)


@pytest.fixture(scope="session")
def chatml() -> ChatTemplate:
    from chat_templates import CHATML, hf_tokenizer

    return load_template(hf_tokenizer(CHATML), None)


@pytest.fixture(params=["native", "chatml"])
def any_template(request) -> ChatTemplate:
    return request.getfixturevalue(request.param)
