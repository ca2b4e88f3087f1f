"""The content of a report without its format: blocks that `html` and `markdown` render."""

import math
import re
from typing import NamedTuple, TypeGuard

_NUMBER = r"-?\d[\d.,]*(e[-+]\d+)?"
_NUMERIC = re.compile(rf"{_NUMBER}( ± {_NUMBER})?( (GB|MB|s|\d+ s|min( \d+ s)?|h \d+ min|\(step \d+\)))?|–|")


class Heading(NamedTuple):
    level: int  # 2 or 3; the report's title is 1
    text: str


class Paragraph(NamedTuple):
    text: str
    style: str = ""  # "good", "bad" or "note"


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str = ""
    folded: bool = False  # opened by a click
    sortable: bool = False  # by a click on a column's header

    def is_numeric(self, column: int) -> bool:
        """Whether all cells of the column are numbers; they are then aligned on the right."""
        return all(_NUMERIC.fullmatch(row[column]) for row in self.rows)


class Code(NamedTuple):
    title: str
    text: str


class Legend(NamedTuple):
    label: str
    color: int
    dash: int  # 0 is a solid line


class Picture(NamedTuple):
    title: str
    svg: str
    legend: list[Legend]


class Gallery(NamedTuple):
    pictures: list[Picture]


class Completion(NamedTuple):
    model: str
    note: str  # on the model or on the completion, such as its reward
    text: str


class Card(NamedTuple):
    """One prompt with the completion of each model."""

    prompt: str
    completions: list[Completion]


Block = Heading | Paragraph | Table | Code | Gallery | Card


class Report(NamedTuple):
    title: str
    verdict: Paragraph | None
    facts: list[str]  # in a line below the title
    blocks: list[Block]


# Numbers as text, the same in both formats


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object) -> str:
    """A number with four significant digits, integers whole; None as a dash; any other value as text."""
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def with_error(value: object, error: object) -> str:
    """A value with its standard error, to two significant digits of the error: 0.542 ± 0.022."""
    if not (is_number(value) and is_number(error)):
        return number(value)
    if error < 1e-6:  # rounding error
        return f"{number(value)} ± 0"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def duration(seconds: object) -> str:
    """Seconds as 13 min 20 s."""
    if not is_number(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(num_bytes: object) -> str:
    """Bytes as GB or MB."""
    if not is_number(num_bytes):
        return "–"
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
