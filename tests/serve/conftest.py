"""The tiny chat model as the server has it."""

import pytest
from http_server import serving

from jaxllm.serve.server import load_model
from jaxllm.training.step_folder import find_checkpoint


@pytest.fixture(scope="session")
def model(chat_model):
    model = load_model("chat", find_checkpoint(chat_model), 8)
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with serving([model], tmp_path_factory.mktemp("served") / "preferences.jsonl") as client:
        yield client
