"""Runs compared on suites, question by question."""

import math

import pytest
from test_report_runs import config, report, write_run

from jaxllm.evaluation.suites import Result, write_results
from jaxllm.report.estimates import paired_difference


def run_with(folder, step=10, rows=(), **suites):
    """A run with the results of suites at a step: NAME=(METRIC, scores)."""
    write_run(folder, config(), [{"step": step, "eval/loss": 3.0, "eval/loss_se": 0.1}, *rows])
    for name, (metric, scores) in suites.items():
        results = [Result(f"q{i}", {metric: score}, {}) for i, score in enumerate(scores)]
        write_results(folder / "suites" / name / f"{step}.jsonl", results)
    return folder


def scores(right, wrong):
    return [1.0] * right + [0.0] * wrong


def suite_rows(page, suite):
    return [row for row in page.rows if row[0].startswith(f"{suite}/")]


def test_mcnemars_test_counts_the_questions_that_one_model_alone_gets_right():
    right, wrong = (1.0, 1.0), (0.0, 1.0)
    # 8 of 10: 2 (1 + 10 + 45) / 2^10
    found = paired_difference([(wrong, right)] * 8 + [(right, wrong)] * 2 + [(right, right)] * 90)
    assert found.p == pytest.approx(2 * 56 / 1024)
    # differences 1, -1, 0 with mean 0.06; t of 99 degrees of freedom is 1.984
    spread = math.sqrt((10 - 100 * 0.06**2) / 99 / 100)
    assert (found.value, found.half_width) == pytest.approx((0.06, 1.984 * spread), rel=1e-3)
    assert not found.is_distinguishable
    assert paired_difference([(wrong, right)] * 6).is_distinguishable
    assert paired_difference([(right, right)] * 9).p == 1


def test_scores_that_are_no_zeros_and_ones_are_compared_by_their_mean_difference():
    pairs = [((8.0, 4.0), (4.0 + i % 2, 4.0)) for i in range(9)]
    found = paired_difference(pairs)
    assert found.p is None
    assert found.value == pytest.approx(sum(i % 2 - 4 for i in range(9)) / 36)
    assert found.is_distinguishable
    assert not paired_difference([((8.0, 4.0), (8.0 + (-1) ** i, 4.0)) for i in range(8)]).is_distinguishable


def test_runs_are_compared_over_the_questions_that_both_have(tmp_path):
    a = run_with(tmp_path / "a", mc=("accuracy", scores(50, 50)), text=("bits_per_byte", [(8.0, 4.0)] * 3))
    b = run_with(tmp_path / "b", mc=("accuracy", scores(53, 47)), text=("bits_per_byte", [(4.0, 4.0)] * 3))
    c = run_with(tmp_path / "c", mc=("accuracy", scores(60, 30)))
    page, text, _ = report(a, b, c, output=tmp_path / "out")
    assert suite_rows(page, "mc") == [
        ["mc/accuracy", "a, step 10", "100", "0.500 ± 0.050"],
        ["mc/accuracy", "b, step 10", "100", "0.530 ± 0.050"],
        ["mc/accuracy", "c, step 10", "90", "0.667 ± 0.050"],
        ["mc/accuracy", "a, step 10", "b, step 10", "100", "0.030 ± 0.034", "0.25", "not distinguishable"],
        ["mc/accuracy", "a, step 10", "c, step 10", "90 of 100", "0.111 ± 0.066", "0.001953", "different"],
        ["mc/accuracy", "b, step 10", "c, step 10", "90 of 100", "0.078 ± 0.056", "0.01562", "different"],
    ]
    assert suite_rows(page, "text")[-1][-3:] == ["-1 ± 0", "–", "different"]
    assert "McNemar" in text


def test_the_last_step_counts_and_a_file_that_cannot_be_read_is_named(tmp_path):
    a = run_with(tmp_path / "a", step=100, mc=("accuracy", scores(1, 1)))
    write_results(a / "suites" / "mc" / "20.jsonl", [Result("q0", {"accuracy": 1.0}, {})])
    (a / "suites" / "bad").mkdir()
    (a / "suites" / "bad" / "100.jsonl").write_text("[]\n")
    page, text, _ = report(a, output=tmp_path / "out")
    assert ["mc/accuracy", "a, step 100", "2", "0.50 ± 0.50"] in page.rows
    assert "a/suites/bad/100.jsonl cannot be read" in text


def test_suites_measured_while_training_are_curves_and_not_compared_unpaired(tmp_path):
    metric = "eval/suite/arc/accuracy"
    rows = [{"step": step, metric: step / 40, f"{metric}_se": 0.01} for step in (20, 30)]
    folders = [run_with(tmp_path / name, rows=rows) for name in ("a", "b")]
    page, text, _ = report(folders[0], output=tmp_path / "one")
    assert "arc: accuracy" in text
    assert [row[:3] for row in page.rows if metric in row] == [
        ["arc: accuracy", "fraction of questions", metric]
    ]
    page, _, _ = report(*folders, output=tmp_path / "two")
    assert [row[0] for row in page.rows if row[-1] == "not distinguishable"] == ["Loss"]
