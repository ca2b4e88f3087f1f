"""A report as Markdown: the content of the HTML page without its pictures."""

import re

from jaxllm.data.show import printable
from jaxllm.report.document import Block, Card, Code, Gallery, Heading, Paragraph, Report, Table

# Characters that Markdown reads as markup; an underscore within a word is not among them.
_MARKUP = re.compile(r"[\\`*\[\]<>|~#]|(?<![^\W_])_|_(?![^\W_])")


def to_markdown(report: Report) -> str:
    """The text of report.md."""
    head = [f"# {_text(report.title)}"]
    if report.verdict is not None:
        head.append(f"**{_text(report.verdict.text)}**")
    if report.facts:
        head.append(_text(" · ".join(report.facts)))
    blocks = [_block(block) for block in report.blocks]
    return "\n\n".join([*head, *(block for block in blocks if block)]) + "\n"


def _text(text: str) -> str:
    """On one line, with all markup escaped."""
    escaped = _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text).replace("&", "&amp;").strip())
    return "<br>".join(escaped.splitlines())


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_text(text)}"
        case Paragraph(text):
            return _text(text)
        case Table(header, rows, title):
            lines = [header, [_rule(block, i) for i in range(len(header))], *rows]
            written = "\n".join(_row(cells, i == 1) for i, cells in enumerate(lines))
            return f"{_text(title)}\n\n{written}" if title else written
        case Code(title, text):
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            titled = f"{_text(title)}\n\n" if title else ""
            return f"{titled}{fence}\n{printable(text)}\n{fence}"
        case Gallery():
            return ""
        case Card(prompt, completions):
            rows = [
                (f"{model} ({note})" if note else model, text if text.strip() else "(empty)")
                for model, note, text in completions
            ]
            return f"### {_text(prompt)}\n\n" + _block(Table(("model", "completion"), rows))


def _rule(table: Table, column: int) -> str:
    return "---:" if table.is_numeric(column) else "---"


def _row(cells: tuple[str, ...] | list[str], is_rule: bool) -> str:
    return f"| {' | '.join(cells if is_rule else map(_text, cells))} |"
