"""README.md, the card of a synthesized set, and report.json: what was counted, and examples."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.data.show import printable
from jaxllm.synthesize.config import SynthesizeConfig
from jaxllm.synthesize.filters import Kept, Selection

EXAMPLES = 20


def counts(rows: Sequence[Mapping[str, Any]], found: Selection) -> dict[str, Any]:
    """The content of report.json besides the models."""

    def dropped(reasons: Counter[str]) -> dict[str, int]:
        return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))

    pairs = sum(each.worst is not None for each in found.kept)
    return {
        "rows": len(rows),
        "kept": len(found.kept),
        "pairs": pairs,
        "answers": sum(len(row["answers"]) for row in rows),
        "rows_dropped": dropped(found.rows),
        "answers_dropped": dropped(found.answers),
        "without_a_pair": dropped(found.pairs),
    }


def card(config: SynthesizeConfig, report: Mapping[str, Any], found: Selection) -> str:
    """The text of README.md."""
    models = report["models"]
    lines = [
        "# A synthesized data set",
        "",
        "Written by `experiments/synthesize.py`: model output, not checked by people.",
        "",
        f"- `sft.jsonl`: {report['kept']} of {report['rows']} rows, each with the best of its "
        f"{config.answers.per_instruction} answers",
        f"- `preferences.jsonl`: {report['pairs']} pairs of the best and the worst answer to one instruction",
        "- `rows.jsonl`: all rows and answers, before the filters; `config.json`: the settings; "
        "`report.json`: these counts",
        f"- instructions: `{config.instructions.source}`, {named(models['instructions'])}",
        f"- answers: {named(models['answers'])}, temperature {config.answers.sampling.temperature:g}",
        f"- judge: `{config.judge.kind}`, {named(models['judge'])}",
        f"- seed {config.seed}",
        "",
        "## Filters",
        "",
        "| what | of | dropped |",
        "|---|---|---|",
    ]
    for title, total, reasons in (
        ("answer", report["answers"], report["answers_dropped"]),
        ("row", report["rows"], report["rows_dropped"]),
        ("pair", report["kept"], report["without_a_pair"]),
    ):
        lines += [f"| {title}: {reason} | {total} | {count} |" for reason, count in reasons.items()]
        lines += [f"| {title}: none dropped | {total} | 0 |"] if not reasons else []
    shown = spread(found.kept, EXAMPLES)
    lines += ["", f"## {len(shown)} examples", "", "Evenly spread over the rows that are kept.", ""]
    for each in shown:
        lines += [fenced(example(each)), ""]
    return "\n".join(lines)


def named(identity: Mapping[str, str]) -> str:
    """A model and the first digits of its hash."""
    digits = f" ({identity['hash'][:12]})" if "hash" in identity else ""
    return f"`{identity['model']}`{digits}" if identity else "no model"


def spread(kept: Sequence[Kept], number: int) -> list[Kept]:
    """At most `number` of them, evenly spread."""
    number = min(number, len(kept))
    return [kept[i * len(kept) // number] for i in range(number)]


def example(kept: Kept) -> str:
    """A row as text."""
    answers = kept.row["answers"]
    parts = [f"row {kept.row['row']}", kept.row["instruction"]]
    for label, i in (("chosen", kept.best), ("rejected", kept.worst)):
        if i is not None:
            score = answers[i]["score"]
            parts.append(f"--- {label}{'' if score is None else f' ({score:.2f})'}\n{answers[i]['text']}")
    return printable("\n".join(parts))


def fenced(text: str) -> str:
    """Text as a block of Markdown that it cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
