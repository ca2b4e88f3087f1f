"""A report on runs, pipelines and sweeps: `report.html`, one file that works offline, and `report.md`."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from jaxllm.errors import ConfigError
from jaxllm.files import write_file
from jaxllm.report.comparison import comparison_report
from jaxllm.report.document import Report
from jaxllm.report.html import to_html
from jaxllm.report.markdown import to_markdown
from jaxllm.report.runs import Run, read_all
from jaxllm.report.sections import pipeline_report, run_report
from jaxllm.report.suites import suite_section
from jaxllm.report.sweep import sweep_report, to_csv
from jaxllm.sweep.goal import find_goal
from jaxllm.sweep.record import FILE as SWEEP_FILE
from jaxllm.sweep.record import read as read_sweep


def write_report(runs: Sequence[Path], folder: Path) -> Path:
    """Write the report on one run, pipeline or sweep, or compare several runs; return its report.html.

    Files that are missing in a folder are named in the report. Raises ConfigError where one of `runs` is
    neither a run nor a pipeline, and where a package of the `plot` extra is missing.
    """
    check_extra()
    if any((each / SWEEP_FILE).exists() for each in runs):
        return write_sweep_report(runs, folder)
    found = read_all(list(runs))
    if len(found) > 1:
        report = comparison_report(found)
    else:
        (only,) = found
        report = run_report(only) if isinstance(only, Run) else pipeline_report(only)
        report.blocks.extend(suite_section([only] if isinstance(only, Run) else only.stages))
    return write_files(folder, report)


def write_sweep_report(
    runs: Sequence[Path], folder: Path, metric: str | None = None, goal: str | None = None
) -> Path:
    """The report on one sweep, with its trials as report.csv too; `metric` and `goal` as experiments/sweep.py
    takes them, by default those of the sweep."""
    if len(runs) > 1:
        raise ConfigError("a report is on one sweep: pass one folder")
    sweep = read_sweep(runs[0])
    if sweep is None:
        raise ConfigError(f"{runs[0]}: --metric and --goal are those of a sweep, and it holds none")
    if metric is not None or goal is not None:
        sweep.goal = find_goal(sweep.base, metric or sweep.goal.metric, goal)
    return write_files(folder, sweep_report(sweep), {"report.csv": to_csv(sweep)})


def write_files(folder: Path, report: Report, more: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a report in both formats, and more files; its report.html."""
    files = {"report.md": to_markdown(report), "report.html": to_html(report), **more}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_file(folder / name, text.encode())
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    return folder / "report.html"


def check_extra() -> None:
    """ConfigError where a package of the `plot` extra is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "scipy")):
        raise ConfigError("the report needs matplotlib and scipy: pip install 'jaxllm[plot]'")
