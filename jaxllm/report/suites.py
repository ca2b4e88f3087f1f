"""The section on evaluation suites: each run's last results, and runs compared question by question."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxllm.evaluation.suites import Result, as_ratio, metrics, read_results
from jaxllm.report.document import Block, Heading, Paragraph, Table, number, with_error
from jaxllm.report.estimates import paired_difference
from jaxllm.report.runs import Run
from jaxllm.report.sections import problems

EXPLAINED = (
    "Two runs are compared on the same questions. Where scores are 0 or 1, p is of McNemar's exact test: how "
    "often a coin divides the questions that only one of them gets right so unevenly. The result is then "
    "“different” where p < 0.05; for other scores, where the 95% interval of the mean difference "
    "excludes 0. Neither reflects the variation between seeds, and there is no correction for several "
    "comparisons."
)


class Measured(NamedTuple):
    """The last results of a run on a suite."""

    run: str
    suite: str
    step: int
    results: list[Result]

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.step:,}"


def suite_section(runs: Sequence[Run]) -> list[Block]:
    """Results, and for several runs their differences; nothing where no run has results."""
    unread: list[str] = []
    found = [each for run in runs for each in last_results(run, unread)]
    if not (found or unread):
        return []
    rows = []
    for each in sorted(found, key=lambda each: each.suite):
        row = metrics(each.results)
        rows += [
            (f"{each.suite}/{name}", each.name, number(len(each.results)), with_error(x, row[f"{name}_se"]))
            for name, x in row.items()
            if not name.endswith("_se")
        ]
    header = ("metric", "run", "questions", "value, ± one standard error")
    blocks: list[Block] = [Heading(2, "Suites"), *problems(unread), Table(header, rows)]
    if pairs := differences(found):
        header = ("metric", "first", "second", "questions", "second minus first, 95% interval", "p", "result")
        blocks += [Table(header, pairs, "Differences, paired over questions"), Paragraph(EXPLAINED, "note")]
    return blocks


def last_results(run: Run, unread: list[str]) -> list[Measured]:
    """The results at the last step of each suite; files that cannot be read are added to `unread`."""
    steps: dict[str, list[Path]] = {}
    for file in run.folder.glob("suites/*/*.jsonl"):
        if file.stem.isdecimal():
            steps.setdefault(file.parent.name, []).append(file)
    found = []
    for suite, files in sorted(steps.items()):
        last = max(files, key=lambda file: int(file.stem))
        try:
            found.append(Measured(run.name, suite, int(last.stem), list(read_results(last))))
        except (OSError, ValueError) as error:
            unread.append(f"{run.name}/suites/{suite}/{last.name} cannot be read: {error}")
    return found


def differences(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A row for each metric and each two runs that have questions in common."""
    rows = []
    for a, b in itertools.combinations(found, 2):
        if a.suite != b.suite:
            continue
        by_id = {result.id: result for result in a.results}
        pairs = [(by_id[result.id], result) for result in b.results if result.id in by_id]
        total = max(len(a.results), len(b.results))
        for name in dict.fromkeys(name for result in a.results for name in result.scores):
            scores = [(as_ratio(x, name), as_ratio(y, name)) for x, y in pairs]
            known = [(x, y) for x, y in scores if x is not None and y is not None]
            if known:
                difference = paired_difference(known)
                result = "different" if difference.is_distinguishable else "not distinguishable"
                count = number(len(known)) + (f" of {number(total)}" if len(known) < total else "")
                shown = with_error(difference.value, difference.half_width)
                rows.append((f"{a.suite}/{name}", a.name, b.name, count, shown, number(difference.p), result))
    return rows
