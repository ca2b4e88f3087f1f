"""The names of served checkpoints: the shortest end of the path that is unique, or the user's own."""

import pytest

from jaxllm.errors import ConfigError
from jaxllm.serve.model_names import name_checkpoints


@pytest.mark.parametrize(
    ("checkpoints", "names"),
    [
        (["runs/sft"], ["sft"]),
        (["/data/runs/sft/"], ["sft"]),
        (["runs/sft", "runs/dpo"], ["sft", "dpo"]),
        (["a/sft", "b/sft", "b/dpo"], ["a/sft", "b/sft", "dpo"]),
        (["x/a/sft", "y/a/sft", "x/b/sft"], ["x/a/sft", "y/a/sft", "b/sft"]),
        (["/sft", "/x/sft"], ["sft", "x/sft"]),
        (["runs/sft/best"], ["sft/best"]),
        (["runs/sft", "runs/sft/best", "runs/dpo/best"], ["sft", "sft/best", "dpo/best"]),
        (["a/sft/best", "b/sft/best"], ["a/sft/best", "b/sft/best"]),
        (["runs/sft/checkpoints"], ["sft"]),
        (["runs/sft/checkpoints/200", "runs/sft/checkpoints/400"], ["sft/200", "sft/400"]),
        (["checkpoints/sft", "checkpoints/dpo"], ["sft", "dpo"]),
        # Names of the user's own.
        (["small=runs/sft", "runs/dpo"], ["small", "dpo"]),
        (["x=a/sft", "b/sft"], ["x", "sft"]),
        (["sft=runs/a", "runs/sft"], ["sft", "runs/sft"]),
        (["runs/lr=0.1"], ["lr=0.1"]),
    ],
)
def test_each_checkpoint_has_the_shortest_unique_name(checkpoints, names):
    named = name_checkpoints(checkpoints)
    assert list(named) == names
    assert all(each.endswith(path) for each, path in zip(checkpoints, named.values(), strict=True))


def test_a_path_that_exists_is_not_split_at_its_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_checkpoints(["lr=0.1"]) == {"lr": "0.1"}
    (tmp_path / "lr=0.1").mkdir()
    assert name_checkpoints(["lr=0.1"]) == {"lr=0.1": "lr=0.1"}


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        (["a=runs/sft", "a=runs/dpo"], "the name 'a' twice"),
        (["runs/sft", "runs/dpo", "runs/sft/"], "runs/sft/ twice"),
        (["a=runs/sft", "b=runs/../runs/sft"], "twice"),
        (["runs/sft", "runs/sft/checkpoints"], "twice"),
    ],
)
def test_a_name_or_a_checkpoint_given_twice_is_an_error(checkpoints, message):
    with pytest.raises(ConfigError, match=message):
        name_checkpoints(checkpoints)
