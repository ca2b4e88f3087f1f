"""experiments/report.py on several runs: which settings differ, and which metrics by more than chance."""

import math

import pytest
from test_report_runs import config, report, write_run

from jaxllm.report.estimates import Estimate, difference, over_seeds


def runs_at(folder, losses, *, error=0.02, values=None):
    """A run for each last held-out loss; `values` are their configs, by default all the same."""
    return [
        write_run(
            folder / f"run{i}",
            values[i] if values else config(),
            [
                {"step": 0, "eval/loss": 6.0, "eval/loss_se": error},
                {"step": 10, "eval/loss": loss - 0.5, "eval/loss_se": error},
                {"step": 20, "eval/loss": loss, "eval/loss_se": error},
            ],
        )
        for i, loss in enumerate(losses)
    ]


def seeds(*numbers, **changes):
    return [config(seed=number, **changes) for number in numbers]


def verdicts(page):
    return [row for row in page.rows if row[-1] in ("different", "not distinguishable")]


def test_runs_differ_where_the_interval_of_their_difference_excludes_0(tmp_path):
    # 1.96 standard errors of a difference are 1.96 * sqrt(2) * 0.02 = 0.0554
    folders = runs_at(tmp_path, [3.0, 3.055, 3.056])
    page, _, markdown = report(*folders, output=tmp_path / "out")
    found = [
        ["Loss", "run0", "run1", "0.055 ± 0.055", "not distinguishable"],
        ["Loss", "run0", "run2", "0.056 ± 0.055", "different"],
        ["Loss", "run1", "run2", "0.001 ± 0.055", "not distinguishable"],
    ]
    assert verdicts(page) == found
    for row in found:
        assert f"| {' | '.join(row)} |" in markdown


def test_the_last_value_is_shown_with_the_best(tmp_path):
    page, _, _ = report(*runs_at(tmp_path, [3.0, 2.0]), output=tmp_path / "out")
    assert ["Loss", "run0", "3.000 ± 0.020", "20", "2.500 ± 0.020 (step 10)"] in page.rows
    assert ["Loss", "run1", "2.000 ± 0.020", "20", "1.500 ± 0.020 (step 10)"] in page.rows


def test_metrics_without_a_standard_error_are_not_compared(tmp_path):
    page, _, _ = report(*runs_at(tmp_path, [3.0, 2.0], error=None), output=tmp_path / "out")
    assert verdicts(page) == []


def test_settings_that_differ_are_listed(tmp_path):
    values = [config(), config(seed=3)]
    values[1]["optimizer"] = values[1]["optimizer"] | {"learning_rate": 0.5}
    page, _, _ = report(*runs_at(tmp_path, [3.0, 3.0], values=values), output=tmp_path / "out")
    first = page.rows.index(["setting", "run0", "run1"])
    rate = str(values[0]["optimizer"]["learning_rate"])
    assert page.rows[first + 1 : first + 3] == [["seed", "0", "3"], ["optimizer.learning_rate", rate, "0.5"]]
    assert len(page.rows[first + 3]) != 3


def test_runs_that_differ_only_in_the_seed_are_grouped(tmp_path):
    values = [*seeds(0, 1, 2), *seeds(0, 1, 2, stage="pretrain", wandb_project="other")]
    folders = runs_at(tmp_path, [3.0, 3.1, 3.2, 3.3, 3.4, 3.5], values=values)
    page, _, _ = report(*folders, output=tmp_path / "out")
    mean = f"3.100 ± {0.1 / math.sqrt(3):.3f}"
    assert ["Loss", "run0 and 2 more seeds", "3", mean, "0.10", "3 to 3.2"] in page.rows
    # 0.3 is 3.67 standard errors of 0.1 * sqrt(2 / 3); with 4 degrees of freedom t is 2.776
    pair = ["Loss", "run0 and 2 more seeds", "run3 and 2 more seeds"]
    assert verdicts(page) == [[*pair, "0.30 ± 0.23", "different"]]


def test_seeds_of_a_single_config_are_also_compared_one_by_one(tmp_path):
    page, _, _ = report(*runs_at(tmp_path, [3.0, 3.5], values=seeds(0, 1)), output=tmp_path / "out")
    assert "Statistics over seeds" in page.words
    assert [row[1:3] for row in verdicts(page)] == [["run0", "run1"]]


def test_a_repeated_seed_does_not_count_as_a_second_seed(tmp_path):
    page, _, _ = report(*runs_at(tmp_path, [3.0, 3.0], values=seeds(0, 0)), output=tmp_path / "out")
    assert "Statistics over seeds" not in page.words
    assert verdicts(page) == [["Loss", "run0", "run1", "0.000 ± 0.055", "not distinguishable"]]


def test_pipelines_in_different_folders_are_seeds_of_one_config(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        model = f"runs/seed{seed}/reward_model/best"
        values = config("ppo", seed=seed, reward={"model": model})
        rows = [{"step": 5, "eval/reward": 0.5 + seed / 10, "eval/reward_se": 0.01}]
        write_run(folder / "ppo", values, rows)
        (folder / "gates.json").write_text(
            '{"gates": [{"name": "ppo", "passed": true, "measured": 0.5, "standard_error": 0.01}]}'
        )
    page, _, _ = report(tmp_path / "seed0", tmp_path / "seed1", output=tmp_path / "out")
    assert ["gate", "seed0", "seed1"] in page.rows
    assert ["ppo", "passed: 0.500 ± 0.010", "passed: 0.500 ± 0.010"] in page.rows
    assert ["seed", "0", "1"] in page.rows
    assert "seed0/ppo and 1 more seed" in {row[1] for row in page.rows}
    assert not any("reward.model" in row for row in page.rows)


def test_runs_of_several_stages_have_a_section_each(tmp_path):
    folders = runs_at(tmp_path, [3.0, 3.5, 4.0], values=[config(), config("sft"), config("sft")])
    page, _, _ = report(*folders, output=tmp_path / "out")
    assert [row[1:3] for row in verdicts(page)] == [["run1", "run2"]]
    headings = [attributes.get("id") for tag, attributes in page.tags if tag == "h2"]
    assert headings[:2] == ["pretrain", "sft"]


def test_folders_of_the_same_name_get_distinct_names(tmp_path):
    folders = [*runs_at(tmp_path / "a", [3.0]), *runs_at(tmp_path / "b", [3.5])]
    page, _, _ = report(*folders, output=tmp_path / "out")
    assert [row[1:3] for row in verdicts(page)] == [["a/run0", "b/run0"]]


def test_each_run_has_its_own_line_style(tmp_path):
    folders = runs_at(
        tmp_path, [3.0 + i / 10 for i in range(10)], values=[config(extra=i) for i in range(10)]
    )
    page, source, _ = report(*folders, output=tmp_path / "out")
    styles = [attributes["style"] for tag, attributes in page.tags if tag == "i"]
    assert len(styles) == len(set(styles)) == 10
    assert source.count("fill-opacity: 0.18") == 10


def test_the_mean_over_seeds_has_the_error_of_their_spread():
    assert over_seeds([Estimate(0.5, 0.2)]) == Estimate(0.5, 0.2)
    value, error, freedom = over_seeds([Estimate(0.2, 9.0), Estimate(0.4, 9.0)])
    assert (value, freedom) == (pytest.approx(0.3), 1)
    assert error == pytest.approx(0.1)  # standard deviation 0.1 * sqrt(2), over sqrt(2)


@pytest.mark.parametrize(
    ("before", "after", "half_width"),
    [
        (Estimate(0, 3), Estimate(1, 4), 1.959964 * 5),
        (Estimate(0, 1, 1), Estimate(1, 1, 1), 4.302653 * math.sqrt(2)),  # t with 2 degrees of freedom
        (Estimate(0, 0), Estimate(1, 2, 1), 12.706205 * 2),  # with 1
        (Estimate(0, 0, 2), Estimate(0, 0, 2), 0),
    ],
)
def test_intervals_are_wider_where_errors_are_from_few_seeds(before, after, half_width):
    found = difference(before, after)
    assert found.half_width == pytest.approx(half_width, rel=1e-5)
    assert found.value == after.value


def test_equal_values_without_error_do_not_differ():
    assert not difference(Estimate(1, 0), Estimate(1, 0)).is_distinguishable
    assert difference(Estimate(1, 0), Estimate(0.9, 0)).is_distinguishable
