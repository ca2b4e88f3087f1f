"""experiments/report.py on a sweep: the best config, how sure that is, and every trial."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess

import pytest
from test_report_runs import Page

from experiments import report as script
from jaxllm.config import run_script
from jaxllm.errors import ConfigError
from jaxllm.report import write_report
from jaxllm.report.sweep_pictures import apart, scale_of
from jaxllm.sweep.goal import Goal
from jaxllm.sweep.record import Sweep
from jaxllm.sweep.trials import Trial

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RATE, SIZE = "optimizer.learning_rate", "data.batch_size"


@pytest.fixture
def sweep(tmp_path):
    """Three configs of two seeds each, finished; of the last, one seed diverged."""
    sweep = Sweep(
        tmp_path / "mine", "c.py", "python sweep.py", Goal("eval/loss", False), {"stage": "sft"}, {}, []
    )
    # means 3.1, 2.1, 1.0; standard errors of the first two 0.1
    add(sweep, {RATE: 0.001, SIZE: 8}, [3.0, 3.2])
    add(sweep, {RATE: 0.01, SIZE: 8}, [2.0, 2.2])
    add(sweep, {RATE: 0.1, SIZE: "<b>"}, [1.0, None])
    return sweep


def add(sweep, settings, losses, first=0, **changes):
    """A trial for each loss; None: diverged."""
    for seed, loss in enumerate(losses, first):
        name = f"trial{len(sweep.trials)}"
        status = "diverged" if loss is None else "finished"
        sweep.trials.append(
            Trial(name, {**settings, "seed": seed}, seed, name, status, seconds=61.0, **changes)
        )
        (sweep.folder / name).mkdir(parents=True)
        row = {"step": 20, "eval/loss": loss, "eval/loss_se": 0.05, "eval/accuracy": loss}
        (sweep.folder / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def report(sweep):
    """The page, its source and the Markdown."""
    sweep.save()
    source = write_report([sweep.folder], sweep.folder).read_text()
    return Page(source), source, (sweep.folder / "report.md").read_text()


def test_the_best_config_has_the_95_percent_interval_of_its_mean_over_seeds(sweep):
    page, _, markdown = report(sweep)
    # t with 1 degree of freedom is 12.706, and the standard error 0.1
    best = "learning_rate=0.01, batch_size=8: eval/loss 2.1 ± 1.3 (mean over 2 seeds, 95% interval)."
    assert best in page.words
    assert "best of 3 means (the winner's curse)" in page.text
    assert "--confirm=3 re-runs it with fresh seeds" in page.text
    assert ["0.01", "8", "2 of 2", "2.10 ± 0.10", "2.1 ± 1.3", "–", "best"] in page.rows
    # a difference of 1 with an error of 0.141: t with 2 degrees of freedom is 4.303
    assert ["0.001", "8", "2 of 2", "3.10 ± 0.10", "3.1 ± 1.3", "1.00 ± 0.61", "different"] in page.rows
    assert "trial5 diverged." in page.words
    assert "| 0.01 | 8 | 2 of 2 | 2.10 ± 0.10 | 2.1 ± 1.3 | – | best |" in markdown


def test_a_config_with_a_diverged_seed_is_not_the_best_and_one_seed_says_so(sweep):
    page, _, _ = report(sweep)
    found = [row for row in page.rows if row[0] == "0.1"]
    assert found[0][2:4] == ["1 of 2", "1.000 ± 0.050"]
    sweep.trials = sweep.trials[:1]
    page, _, _ = report(sweep)
    assert "one seed; 95% interval over held-out rows, not over seeds" in page.text
    assert "winner's curse" not in page.text  # nothing was chosen


def test_fresh_seeds_are_shown_and_do_not_count_for_the_choice(sweep):
    add(sweep, {RATE: 0.01, SIZE: 8}, [2.5, 2.7], first=2, confirms=True)
    page, _, _ = report(sweep)
    assert "Confirmed with fresh seeds, learning_rate=0.01, batch_size=8: 2.6 ± 1.3 (mean over 2" in page.text
    assert ["0.01", "8", "2 of 2", "2.10 ± 0.10", "2.1 ± 1.3", "–", "best"] in page.rows
    assert "confirm=3" not in page.text


def test_a_best_value_at_the_edge_of_those_tried_is_named(sweep):
    page, _, _ = report(sweep)
    assert "values beyond" not in page.text
    add(sweep, {RATE: 1.0, SIZE: 8}, [0.5, 0.6])
    page, _, _ = report(sweep)
    assert "Its learning_rate=1 is the last value that was tried: values beyond may be better." in page.words


def test_the_csv_has_every_trial_in_full_precision(sweep):
    sweep.trials[0].overrides[RATE] = 0.0012345678901
    report(sweep)
    rows = list(csv.DictReader((sweep.folder / "report.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert rows[0] == {
        **{RATE: "0.0012345678901", SIZE: "8", "seed": "0", "status": "finished", "confirms": "False"},
        **{"step": "20", "eval/loss": "3.0", "error": "0.05", "seconds": "61.0", "name": "trial0"},
    }
    assert (rows[5]["status"], rows[5]["eval/loss"]) == ("diverged", "")


def test_an_unfinished_sweep_says_what_is_missing(sweep):
    sweep.trials.append(Trial("trial6", {RATE: 0.5, SIZE: 8, "seed": 0}, 0, "h"))
    sweep.trials[1].status, sweep.trials[1].message = "failed", "error: no disk"
    page, _, _ = report(sweep)
    assert "1 of 7 trials have not finished." in page.words
    assert "trial1: error: no disk." in page.words
    assert ["0.5", "8", "0", "waiting", "–", "–", "–", "trial6"] in page.rows


def test_another_metric_may_be_chosen_and_a_missing_one_is_named(sweep, capsys):
    def run(*flags):
        argv = script.runs_as_flags(["report.py", str(sweep.folder), *flags])
        return run_script(script.main, None, script.define_flags, argv), capsys.readouterr().err

    report(sweep)
    assert run("--metric", "eval/accuracy") == (0, "")
    assert "eval/accuracy, highest is best" in (sweep.folder / "report.md").read_text()
    message = "error: --metric=eval/x: no trial has logged it; they have eval/accuracy, eval/loss\n"
    assert run("--metric=eval/x", "--goal=lowest") == (ConfigError.exit_code, message)
    (sweep.folder / "sweep.json").unlink()
    assert "and it holds none" in run("--metric=eval/loss")[1]


def test_two_sweeps_are_not_compared(sweep):
    sweep.save()
    with pytest.raises(ConfigError, match="pass one folder"):
        write_report([sweep.folder, sweep.folder], sweep.folder)


def test_the_page_escapes_settings_and_allows_its_own_script_alone(sweep):
    page, source, _ = report(sweep)
    assert ["0.1", "<b>"] in [row[:2] for row in page.rows]
    assert "<b>" not in source
    (own,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags
    assert re.findall(r"https?:|//\w|@import|\bsrc=", source) == []


def test_pictures_have_a_dot_for_each_trial_and_a_line_for_each_config(sweep):
    page, source, _ = report(sweep)
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["learning_rate", "batch_size", "Parallel coordinates"]
    rate, _, parallel = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    dots = [rate.count(f"fill: var(--series-{color}); fill-opacity") for color in (1, 0)]
    assert dots == [2, 3]  # the best config, and the others that have a value
    assert [parallel.count(f"stroke: var(--series-{color}); stroke-width") for color in (1, 0)] == [1, 0]


def test_labels_that_would_overlap_are_left_out_and_numbers_are_short(sweep):
    assert apart({0.0: "a", 0.02: "b", 0.5: "c", 0.95: "d", 1.0: "e"}) == {0.0: "a", 1.0: "e", 0.5: "c"}
    sweep.trials[0].overrides[RATE] = 0.0012345678901
    page, source, _ = report(sweep)
    assert "0.001235" in {row[0] for row in page.rows}
    assert "0.00123456" not in source


def test_an_axis_is_logarithmic_where_values_span_a_factor_and_categories_keep_their_order():
    assert [scale_of([1e-3, 1e-2, 1e-1]).place(each) for each in (1e-3, 1e-1)] == pytest.approx([-3, -1])
    assert scale_of([1, 2, 4]).place(4) == 4
    assert [scale_of(["b", 1, "a"]).place(each) for each in ("b", 1, "a")] == [0, 1, 2]
    assert scale_of([True, False]).categories == ["True", "False"]
    assert scale_of([0, 10]).place(10) == 10


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_click_on_a_header_sorts_in_a_browser(sweep, tmp_path):
    _, source, _ = report(sweep)
    clicks = "const h = document.querySelectorAll('table.sortable th'); h[0].click(); h[0].click();"
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", source)
    for name, text in {"own": source, "clicked": without_policy + f"<script>{clicks}</script>"}.items():
        (tmp_path / f"{name}.html").write_text(text)
        flags = (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}/user",
        )
        command = [CHROMIUM, *flags, "--dump-dom", f"file://{tmp_path}/{name}.html"]
        shown = Page(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
        if name == "own":  # the policy lets the page's script run
            assert {attributes.get("tabindex") for tag, attributes in shown.tags if tag == "th"} == {"0"}
        else:
            assert [row[0] for row in shown.rows[1:4]] == ["0.1", "0.01", "0.001"]
