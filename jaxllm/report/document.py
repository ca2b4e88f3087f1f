"""What a report says, apart from how it looks: blocks, which `html` and `markdown` write down."""

import math
import re
from typing import Any, NamedTuple

_NUMBER = r"-?\d[\d.,]*(e[-+]\d+)?"
_NUMERIC = re.compile(rf"{_NUMBER}( ± {_NUMBER})?( (GB|MB|s|\d+ s|min( \d+ s)?|h \d+ min|\(step \d+\)))?|–|")


class Heading(NamedTuple):
    level: int  # 2 or 3; the report's title is 1
    text: str


class Paragraph(NamedTuple):
    text: str
    mood: str = ""  # "good", "bad" or "note"


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str = ""
    folded: bool = False  # shown when asked for

    def is_numeric(self, column: int) -> bool:
        """Whether all cells of the column are numbers, to be aligned on the right."""
        return all(_NUMERIC.fullmatch(row[column]) for row in self.rows)


class Code(NamedTuple):
    title: str
    text: str


class Legend(NamedTuple):
    label: str
    colour: int
    dash: int  # 0 is a solid line


class Picture(NamedTuple):
    title: str
    svg: str
    legend: list[Legend]


class Gallery(NamedTuple):
    pictures: list[Picture]


class Answer(NamedTuple):
    model: str
    kind: str  # what is to be expected of it
    text: str


class Card(NamedTuple):
    """One prompt, and what each model says to it."""

    prompt: str
    answers: list[Answer]


Block = Heading | Paragraph | Table | Code | Gallery | Card


class Report(NamedTuple):
    title: str
    verdict: Paragraph | None
    facts: list[str]  # in a line below the title
    blocks: list[Block]


# Numbers, as they are written in both


def number(value: Any) -> str:
    """Four digits of a number; a dash for none; anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def with_error(value: Any, error: Any) -> str:
    """A value with its standard error, to two digits of the latter: 0.542 ± 0.022."""
    numbers = [isinstance(x, int | float) and math.isfinite(x) for x in (value, error)]
    if not all(numbers):
        return number(value)
    if error < 1e-6:  # none, but for rounding
        return f"{number(value)} ± 0"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def duration(seconds: Any) -> str:
    """13 min 20 s."""
    if not isinstance(seconds, int | float):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: Any) -> str:
    """Bytes as GB or MB."""
    if not isinstance(count, int | float):
        return "–"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
