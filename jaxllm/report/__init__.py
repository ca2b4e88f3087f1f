"""A report on runs and pipelines: `report.html`, one file that works offline, and `report.md`."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.files import write_file
from jaxllm.report.comparison import comparison_report
from jaxllm.report.html import to_html
from jaxllm.report.markdown import to_markdown
from jaxllm.report.runs import Run, read_all
from jaxllm.report.sections import pipeline_report, run_report


def write_report(runs: Sequence[Path], folder: Path) -> Path:
    """Write the report on one run or pipeline, or the comparison of several, and return its report.html.

    Files that are missing in a folder are named in the report. Raises ConfigError where one of `runs` is
    neither a run nor a pipeline, and where a package of the `plot` extra is missing.
    """
    check_extra()
    found = read_all(list(runs))
    if len(found) > 1:
        report = comparison_report(found)
    else:
        report = run_report(found[0]) if isinstance(found[0], Run) else pipeline_report(found[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "report.md", to_markdown(report).encode())
        write_file(folder / "report.html", to_html(report).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    return folder / "report.html"


def check_extra() -> None:
    """ConfigError where a package of the `plot` extra is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "scipy")):
        raise ConfigError("the report needs matplotlib and scipy: pip install 'jaxllm[plot]'")
