"""A little text and a tokenizer trained on it, for all tests of the data."""

import pytest

from jaxllm.data.tokenizer import Tokenizer, train_tokenizer

NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("red  ball", "wooden boat", "old book", "small lamp", "blue kite")
PLACES = ("garden", "kitchen", "harbour", "market", "forest", "tower", "school")


def make_documents(count: int) -> list[str]:
    """Different little texts, with newlines, double spaces and numbers."""
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
