"""A folder of checkpoints."""

import pytest

from jaxllm.training.checkpoint import Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=10)
    yield checkpoints
    checkpoints.wait()
