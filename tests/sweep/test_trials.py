"""From sweep() to trials: names, duplicates, and errors that name the trial and the field."""

import re
from pathlib import Path

import numpy as np
import pytest
from sweeps import RATE, make_base, write_config

from configs import sweep_pretrain
from experiments import train
from jaxllm.config import as_dict, run_script
from jaxllm.errors import ConfigError
from jaxllm.sweep.trials import call_search, make_trials, read_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path)


def test_a_trial_is_named_by_its_overrides_in_safe_characters_and_by_a_hash(base):
    overrides = {
        RATE: 0.0012345678,
        "data.train": ("a/b c.txt", "../d"),
        "training.target": None,
        "optimizer.decay_pattern": "kernel$|" + "x" * 200,
        "seed": 3,
    }
    ((trial,), _) = make_trials(base, [overrides | {"training.target": None}])
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,90}", trial.name)
    assert trial.name.startswith(
        "learning_rate_0.001235-train_a_b_c.txt_.._d-target_none-decay_pattern_kernel_x"
    )
    assert trial.name.endswith(f"-{trial.hash}")
    assert trial.seed == 3


def test_the_hash_is_of_the_resolved_config(base):
    # the default, and values that a reference derives from another field
    trials, _ = make_trials(base, [{"seed": 0}, {"training.steps": 50}, {"seed": 1}])
    assert len({trial.hash for trial in trials}) == 3
    ((again,), _) = make_trials(base, [{"training.steps": 50, "optimizer.warmup_steps": 2}])
    assert again.hash == trials[1].hash


def test_duplicates_are_left_out_and_named(base):
    trials, left_out = make_trials(base, [{"seed": 0}, {RATE: 0.5}, {"seed": 0, "data.batch_size": 8}])
    assert [trial.overrides for trial in trials] == [{"seed": 0}, {RATE: 0.5}]
    assert left_out == [f"trial 3 (seed=0, batch_size=8) has the config of {trials[0].name}"]


def test_values_may_be_of_numpy_and_paths(base):
    overrides = {"data.batch_size": np.int64(16), RATE: np.float64(0.5), "data.train": Path("a.txt")}
    ((trial,), _) = make_trials(base, [overrides])
    assert trial.overrides == {"data.batch_size": 16, RATE: 0.5, "data.train": "a.txt"}
    assert [type(value) for value in trial.overrides.values()] == [int, float, str]
    assert base.resolve(trial.overrides) == base.resolve(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.rate": 1}, "trial 2 (rate=1): config.optimizer.rate: unknown key"),
        (
            {RATE: "fast"},
            "(learning_rate=fast): config.optimizer.learning_rate: must be a finite float, got 'fast'",
        ),
        ({"data.batch_size": 0.5}, "config.data.batch_size: must be an int, got 0.5"),
        ({"training.target": 1.0}, "trial 2 (target=1): training.target=1.0 needs a metric to compare"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_trial(base, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_trials(base, [{"seed": 1}, overrides])


def test_the_command_of_a_trial_gives_its_config(base):
    base = base._replace(fields={"wandb_project": "a b", "seed": "7"})
    overrides = {RATE: 1e-05, "data.train": ("a,b.txt", "c.txt"), "evaluation.max_rows": None}
    ((trial,), _) = make_trials(base, [overrides])
    command = base.command(trial, "runs/x")
    found = []
    run_script(
        lambda config, flags: found.append((config, flags.workdir)),
        train.config_class,
        train.define_flags,
        command[1:],
    )
    ((config, workdir),) = found
    assert as_dict(config) == base.resolve(overrides)
    assert (config.seed, config.wandb_project, config.data.train) == (7, "a b", ("a,b.txt", "c.txt"))
    assert workdir == f"runs/x/{trial.name}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", r"config.py: defines no sweep\(\); docs/how-to/sweep.md shows one"),
        ("def sweep(): return [3]\n", r"sweep\(\): trial 1 is 3; yield a dict of overrides"),
        ("def sweep(): pass\n", r"sweep\(\) returns None; yield or return the trials"),
        ("def sweep(): return []\n", r"sweep\(\) yields no trial"),
        ("def sweep():\n    yield {}\n    1 / 0\n", r"config.py:5: ZeroDivisionError: division by zero"),
    ],
)
def test_a_config_file_without_a_usable_sweep(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(write_config(tmp_path, body))


def test_sweep_may_take_the_argument_of_the_config_file(tmp_path):
    file = write_config(tmp_path, "def sweep(size): yield {'model.width': {'tiny': 32, '1m': 64}[size]}\n")
    assert read_sweep(f"{file}:1m") == [{"model.width": 64}]
    file = write_config(tmp_path, "def sweep(): yield {'seed': 1}\n")
    assert read_sweep(f"{file}:1m") == [{"seed": 1}]


def test_the_shipped_sweep_has_18_trials_of_3_seeds(base):
    trials, left_out = make_trials(base, sweep_pretrain.sweep())
    assert (len(trials), left_out) == (18, [])
    assert {trial.seed for trial in trials} == {0, 1, 2}
    assert len({str(trial.settings) for trial in trials}) == 6


def test_the_examples_of_the_how_to_are_usable(tmp_path):
    page = (ROOT / "docs" / "how-to" / "sweep.md").read_text()
    for name, text in re.findall(r'```python title="(.*?)"\n(.*?)```', page, flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    base = make_base(tmp_path)
    trials, left_out = make_trials(base, read_sweep(str(tmp_path / "my_sweep.py")))
    assert (len(trials), left_out) == ((3 + 5) * 2 * 3, [])
    optuna = pytest.importorskip("optuna", reason="needs the extra 'sweep'")
    fixed = optuna.trial.FixedTrial({"optimizer": "adamw", "adamw_rate": 0.002})
    found = call_search(str(tmp_path / "my_search.py"), fixed)
    assert make_trials(base, [found])[0][0].overrides == {"optimizer.name": "adamw", RATE: 0.002}
