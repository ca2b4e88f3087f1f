"""Scaling laws are found again in losses and rewards that follow one."""

import json
import math

import numpy as np
import pytest
from tiny_runs import ROOT

from experiments import scaling as script
from jaxllm.command_line import runs_as_flags
from jaxllm.config import as_dict, load_config, override, parse, run_script
from jaxllm.errors import ConfigError
from jaxllm.models.config import flops_per_token
from jaxllm.report.runs import read_run
from jaxllm.report.scaling import Trained, fit_isoflops, fit_sigmoid, hours, sigmoid
from jaxllm.stages import find_stage


def chinchilla(noise=0.0, factors=(0.25, 0.5, 1, 2, 4)):
    """Losses whose best size is 0.1 sqrt(FLOPs)."""
    random = np.random.default_rng(0)

    def loss(flops, by):
        return 3 - 0.01 * math.log(flops) + 0.03 * math.log(by) ** 2 + noise * random.normal()

    budgets = (1e12, 4e12, 1.6e13)
    return [Trained(0.1 * math.sqrt(c) * by, c, loss(c, by)) for c in budgets for by in factors]


def test_the_best_size_is_found():
    law = fit_isoflops(chinchilla())
    assert law.exponent.value == pytest.approx(0.5)
    assert law.coefficient == pytest.approx(0.1, rel=1e-3)
    assert [optimum.parameters.value for optimum in law.optima] == pytest.approx([1e5, 2e5, 4e5], rel=1e-3)


def test_the_interval_holds_the_exponent_and_widens_with_the_noise():
    quiet, loud = (fit_isoflops(chinchilla(noise)).exponent for noise in (0.001, 0.01))
    assert loud.low < 0.5 < loud.high
    assert loud.high - loud.low > 5 * (quiet.high - quiet.low)


def test_a_budget_whose_lowest_loss_is_at_an_end_is_not_used():
    ends = [point for point in chinchilla() if point.flops > 1e12 or point.parameters > 1.5e5]
    ends.append(Trained(8e5, 1e12, 3 - 0.01 * math.log(1e12) + 0.03 * math.log(8) ** 2))
    law = fit_isoflops(ends)
    assert [optimum.in_range for optimum in law.optima] == [False, True, True]
    assert law.exponent.value == pytest.approx(0.5)


def test_sizes_on_one_side_alone_are_an_error():
    with pytest.raises(ConfigError, match="0 of 3 budgets have their lowest loss between the sizes"):
        fit_isoflops(chinchilla(factors=(2, 4, 8)))


def test_a_sigmoid_is_found():
    compute = np.linspace(0, 10, 21)
    values = sigmoid(compute, 0.3, 0.8, 3.0, 1.5)
    law = fit_sigmoid(compute, values, [0.01] * 21)
    assert law.initial == 0.3
    assert law.asymptote.value == pytest.approx(0.8, abs=1e-3)
    assert law.midpoint.value == pytest.approx(3.0, rel=1e-2)
    assert law.asymptote.low < 0.8 < law.asymptote.high


def test_an_asymptote_is_uncertain_before_the_curve_has_bent():
    def width(end):
        compute = np.linspace(0, end, 12)
        asymptote = fit_sigmoid(compute, sigmoid(compute, 0.3, 0.8, 3.0, 1.5), [0.005] * 12).asymptote
        return asymptote.high - asymptote.low

    assert width(1.0) > 5 * width(12.0)


def test_few_evaluations_are_an_error():
    with pytest.raises(ConfigError, match="4 evaluations are too few"):
        fit_sigmoid(range(4), range(4), [0] * 4)


def write_run(folder, rows, config=None):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "x", "starts": [{"devices": {"count": 2}}]}))
    (folder / "config.json").write_text(json.dumps({"version": 3, **(config or {"stage": "grpo"})}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_compute_is_hours_of_all_devices(tmp_path):
    rows = [
        {"step": 0, "eval/reward": 0.1, "eval/reward_se": 0.01},
        {"step": 10, "perf/step_time": 180.0},
        {"step": 20, "perf/step_time": 360.0, "eval/reward": 0.2, "eval/reward_se": 0.02},
    ]
    run = read_run(write_run(tmp_path / "run", rows), "run")
    assert hours(run, "eval/reward") == ([0.0, 3.0], [0.1, 0.2], [0.01, 0.02])


def isoflop_runs(folder):
    """Runs of configs/isoflops.py, with losses by a law."""
    from configs.isoflops import sweep

    Config = find_stage("pretrain").Config
    for i, overrides in enumerate(sweep()):
        config = load_config(f"{ROOT}/configs/isoflops.py")
        for name, value in overrides.items():
            override(config, Config, name, str(value))
        parsed = parse(Config, config)
        tokens = parsed.training.steps * parsed.data.batch_size * parsed.data.sequence_length
        flops = tokens * flops_per_token(parsed.model, parsed.data.sequence_length)
        loss = 3 + 0.1 * math.log(parsed.model.width / 5 / flops**0.1) ** 2
        row = {"step": parsed.training.steps, "train/tokens": tokens, "eval/loss": loss}
        write_run(folder / str(i), [row], as_dict(parsed))
        yield flops


def run(*argv):
    return run_script(script.main, None, script.define_flags, runs_as_flags(["scaling.py", *argv]))


def test_the_shipped_sweep_has_budgets_of_equal_flops_and_its_law_is_written(tmp_path, capsys):
    flops = np.array(list(isoflop_runs(tmp_path / "sweep"))).reshape(4, 6)
    np.testing.assert_allclose(flops / flops.mean(axis=1, keepdims=True), 1, atol=0.05)
    assert run(str(tmp_path / "sweep"), f"--output={tmp_path}/law.svg") == 0
    assert "24 runs, 4 budgets" in (text := capsys.readouterr().out)
    assert "best parameters = " in text
    assert (tmp_path / "law.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no folder given: pass folders of runs"),
        (["{tmp}/run"], "--metric=NAME is missing"),
        (["{tmp}/run", "--metric=eval/x"], "--metric=eval/x: {tmp}/run has eval/reward"),
        (["{tmp}/run", "--metric=eval/reward"], "1 evaluations are too few"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(tmp_path, capsys, flags, message):
    write_run(tmp_path / "run", [{"step": 0, "eval/reward": 0.1}])
    assert run(*(flag.format(tmp=tmp_path) for flag in flags)) == 78
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
