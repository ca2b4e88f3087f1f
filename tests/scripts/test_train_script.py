"""experiments/train.py checks its flags. tests/runs/ has whole runs."""

from pathlib import Path

import pytest

from experiments import train
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain_text.py"


def test_profile_is_two_steps_or_none():
    assert train.read_profile("10:12") == (10, 12)
    assert train.read_profile("3:3") == (3, 3)
    assert train.read_profile(None) is None


@pytest.mark.parametrize("text", ["10", "10:", "12:10", "0:3", "a:b", ""])
def test_any_other_profile_is_an_error(text):
    with pytest.raises(ConfigError, match=f"--profile={text} must be FIRST:LAST, two steps, such as 10:12"):
        train.read_profile(text)


def test_a_missing_workdir_is_an_error_of_one_line(capsys):
    arguments = ["train.py", f"--config={CONFIG}:tiny"]
    assert run_script(train.main, train.config_class, train.define_flags, arguments) == 78
    assert capsys.readouterr().err == "error: --workdir=FOLDER is missing\n"


def test_the_config_of_a_pipeline_is_an_error_of_one_line(capsys):
    arguments = ["train.py", f"--config={CONFIG.with_name('quickstart.py')}", "--workdir=runs/x"]
    assert run_script(train.main, train.config_class, train.define_flags, arguments) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "the config is of a pipeline: name one of its runs, --config=FILE.py:NAME" in line
