"""A report as one HTML file, light or dark as the reader's system is, with no external file. Its only script
sorts tables, in pages that have one to sort."""

import base64
import hashlib
import html
import re
from pathlib import Path

from jaxllm.data.show import printable
from jaxllm.report.document import (
    Block,
    Card,
    Code,
    Gallery,
    Heading,
    Legend,
    Paragraph,
    Picture,
    Report,
    Table,
)

# A second defense, besides escaping, against markup in generated text.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = (Path(__file__).parent / "style.css").read_text()
_SORT = (Path(__file__).parent / "sort.js").read_text()
_SORT_HASH = base64.b64encode(hashlib.sha256(_SORT.encode()).digest()).decode()

LONG_CELL = 32  # characters; only longer cells wrap, so that no column gets too narrow on a phone
_CELL_STYLES = {"passed": "good", "failed": "bad", "different": "strong"}


def to_html(report: Report) -> str:
    """The page."""
    headings = [block.text for block in report.blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{_text(text)}</a>' for text in headings)
    facts = "".join(f"<span>{_text(fact)}</span>" for fact in report.facts)
    verdict = report.verdict
    sorts = any(isinstance(block, Table) and block.sortable for block in report.blocks)
    policy = f"{_POLICY}; script-src 'sha256-{_SORT_HASH}'" if sorts else _POLICY
    summary = f'<p class="verdict {verdict.style}">{_text(verdict.text)}</p>' if verdict else ""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(report.title)}</title>",
            f"<style>{_STYLE}</style></head><body><main>",
            f'<header><h1>{_text(report.title)}</h1>{summary}<p class="facts">{facts}</p>',
            f"<nav>{links}</nav></header>" if len(headings) > 1 else "</header>",
            *map(_block, report.blocks),
            f"</main>{f'<script>{_SORT}</script>' if sorts else ''}</body></html>\n",
        ]
    )


def _text(text: str) -> str:
    return html.escape(printable(text))


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _block(block: Block) -> str:
    match block:
        case Heading(2, text):
            return f'<h2 id="{_anchor(text)}">{_text(text)}</h2>'
        case Heading(level, text):
            return f"<h{level}>{_text(text)}</h{level}>"
        case Paragraph(text, style):
            return f'<p class="{style}">{_text(text)}</p>'
        case Table():
            return _table(block)
        case Code(title, text):
            return f'<div class="title">{_text(title)}</div><pre><code>{_text(text)}</code></pre>'
        case Gallery(pictures):
            return f'<div class="gallery">{"".join(map(_picture, pictures))}</div>' if pictures else ""
        case Card():
            return _card(block)


def _table(table: Table) -> str:
    numeric = [' class="number"' if table.is_numeric(i) else "" for i in range(len(table.header))]
    head = "".join(f"<th{kind}>{_text(cell)}</th>" for cell, kind in zip(table.header, numeric, strict=True))
    rows = []
    for row in table.rows:
        cells = "".join(_cell(cell, kind) for cell, kind in zip(row, numeric, strict=True))
        rows.append(f"<tr>{cells}</tr>")
    caption = f"<caption>{_text(table.title)}</caption>" if table.title and not table.folded else ""
    kind = ' class="sortable"' if table.sortable else ""
    whole = (
        f'<div class="scroll"><table{kind}>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f"<details><summary>{_text(table.title)}</summary>{whole}</details>" if table.folded else whole


def _cell(cell: str, kind: str) -> str:
    if cell in _CELL_STYLES:
        kind = f' class="{_CELL_STYLES[cell]}"'
    elif len(cell) > LONG_CELL:
        kind = ' class="long"'
    return f"<td{kind}>{_text(cell)}</td>"


def _picture(picture: Picture) -> str:
    legend = "".join(map(_legend, picture.legend))
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{_text(picture.title)}"', 1)
    return (
        f"<figure><figcaption><strong>{_text(picture.title)}</strong>"
        f'<span class="legend">{legend}</span></figcaption>{svg}</figure>'
    )


def _legend(legend: Legend) -> str:
    dash = ("solid", "dashed", "dotted", "double")[legend.dash % 4]
    line = f'<i style="border-top-color: var(--series-{legend.color}); border-top-style: {dash}"></i>'
    return f"<span>{line}{_text(legend.label)}</span>"


def _card(card: Card) -> str:
    rows = []
    for model, note, text in card.completions:
        shown = f"<dd>{_text(text)}</dd>" if text.strip() else '<dd class="empty">(empty)</dd>'
        rows.append(f"<div><dt>{_text(model)} <small>{_text(note)}</small></dt>{shown}</div>")
    return f'<section class="card"><h3>{_text(card.prompt)}</h3><dl>{"".join(rows)}</dl></section>'
