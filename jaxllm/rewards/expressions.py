r"""The mathematics in a text, and the prose around it.

An expression is everything between two pieces of prose, so that whoever reads one reads it whole: `4\sqrt{2}`
is one expression, and so are `5 or 7`, `3:4` and `x > 2`, but of `12 km` only 12 is mathematics. Nothing is
evaluated, and every pattern takes time linear in the length of the text.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple


class Expression(NamedTuple):
    """An expression in a text."""

    text: str  # the items of a list are separated by ;
    start: int  # where it starts in the text
    is_result: bool  # the words before it end with =

    @property
    def has_number(self) -> bool:
        return _DIGIT.search(self.text) is not None


def expressions(text: str) -> Iterator[Expression]:
    """The expressions of a text in the notation of `plain`, without those that are denied (`not 5`)."""
    tokens: list[tuple[str, int]] = []  # of the expression so far, each with its place
    opened: list[int] = []  # the brackets among them that are not closed
    before, denied, listed = "", False, False
    for match in _TOKENS.finditer(text + "\n"):
        kind, token = match.lastgroup or "", match[0]
        if (
            (kind in _AFTER_TERMS and before not in _TERMS)
            or (kind == "close" and not opened)  # of `(see 5)`, or of a numbered list
            or (kind == "list" and token.endswith("and ") and token[0] == "," and not listed)  # a clause
            or (kind == "dash" and not tokens)  # of COVID-19
        ):
            kind = "prose"
        if kind in ("prose", "word", "denial"):
            if tokens and not denied:
                yield from _cut(tokens, opened, before_word=kind == "word")
            tokens, opened, before, denied, listed = [], [], "", kind == "denial", False
            continue
        if kind == "open":
            opened.append(len(tokens))
        elif kind == "close":
            opened.pop()
        listed |= kind == "list"
        before = before if kind == "space" else kind
        tokens.append((_WRITTEN.get(kind, token), match.start()))


def _cut(tokens: list[tuple[str, int]], opened: list[int], *, before_word: bool) -> Iterator[Expression]:
    """The expression of these tokens: several, where a bracket is closed only after some prose."""
    starts = [0, *(place + 1 for place in opened)]
    for first, last in zip(starts, [*opened, len(tokens)], strict=True):
        is_result = False
        while first < last and tokens[first][0] in (" ", "="):
            is_result |= tokens[first][0] == "="
            first += 1
        text = "".join(token for token, _ in tokens[first:last]).rstrip(" ")
        if before_word and last == len(tokens):
            text = text.rstrip(" -/")  # 18-hole, 18 - that is, 18/day
        if text:
            yield Expression(text, tokens[first][1], is_result)


def plain(text: str) -> str:
    """The text with numbers in LaTeX, Markdown and Unicode notation rewritten in ASCII."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _vulgar(match: re.Match[str]) -> str:
    """A Unicode fraction such as ½ as 1/2."""
    mixed = match.string[match.start() - 1 : match.start()].isdigit()
    return " " * mixed + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")


def _superscript(match: re.Match[str]) -> str:
    """² as ^{2}."""
    return "^{" + unicodedata.normalize("NFKC", match[0]).replace("−", "-") + "}"


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Unicode
        ("[−–—﹣-]", "-"),
        (r"(?![0-9])\d", lambda match: str(unicodedata.decimal(match[0]))),  # １８ and ١٨
        ("[⁰¹²³⁴-⁹⁻⁺]++", _superscript),
        ("[₀-₉]", lambda match: "_" + unicodedata.normalize("NFKC", match[0])),
        ("[¼-¾⅐-⅞]", _vulgar),  # 1½ is 1 1/2
        ("[×·⋅∙]", "*"),
        ("[’ʼ]", "'"),
        # HTML, and the calculations in GSM8K's solutions: <<3*6=18>>
        (r"<<[^<>\n]*+>>|</?+[A-Za-z][\w-]*+\s?+/?+>|<\|[\w-]++\|>", " "),
        # LaTeX
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s?+\{([^{}]*+)\}", r" \1 "),
        (r"\\,(?=[0-9])|\\!|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\\(?:[,;: ]|q?quad(?![a-zA-Z]))|[~&\t\u00a0\u2009\u202f]", " "),
        (r"\\(?:begin|end)\{(?:align(?:ed)?|equation|gather(?:ed)?|split)\*?\}", " "),
        (r"\{,\}", ","),
        (r"\^\s?+(?:\\circ|\{\s?+\\circ\s?+\})|\\degree(?![a-zA-Z])|º", "°"),
        (r"(?<=[0-9])\s*+\\[dtc]?frac(?![a-zA-Z])", r" \\frac"),  # 1\frac{1}{2} is 1 1/2
        (r"\\[dtc]?frac\s*+\{\s*+(-?+[0-9.,]++)\s*+\}\s*+\{\s*+(-?+[0-9.,]++)\s*+\}", r"\1/\2"),
        (r"\\[dtc]?frac\s*+([0-9])\s*+([0-9])", r"\1/\2"),
        (r"!(?=\s?+(?:\$|\\\)|\\\]))", r"\\factorial "),
        (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
        (r"\\%|(?i:\bper ?cent\b)", "%"),
        (r"<=|=<|>=|!=|[≥≦≧≠]|\\(?:[gl]eq?(?:slant)?|neq?|[lg]t)(?![a-zA-Z])", "≤"),
        (
            r"(?<!-)-++>|(?<!=)=++>|\\(?:[Ll]ong)?[Rr]ightarrow(?![a-zA-Z])|\\(?:implies|iff|to)(?![a-zA-Z])",
            "→",
        ),
        (r"\\(?:approx|simeq|cong|equiv|doteq)(?![a-zA-Z])|[≈≅≡＝]|==++", "="),
        # Money, and the sign before it
        (r"(?i:\b(?:negative|minus)\s++)(?=\\?+[$€£¥]?+[0-9.])", "-"),
        (r"(?<![0-9])-(\\?+[$€£¥])", r"\1-"),  # -$5 is $-5
        (r"([$€£] ?+[0-9][0-9.,]*+) ?+[mM]\b(?! ?+\$)", r"\1 million"),
        (r"(?<=[0-9)\]}])[ ]?+\*\*[ ]?+(?=[0-9(])", "^"),  # 2**18, but not **18**
        (r"\\?+[$€£¥₹]|\\[()\[\]]|\*\*|`", " "),  # currency and what surrounds a formula or bold text
        # Markdown
        (r"(?m)^[ ]*+(?:[-*+•>][ ]++)++", ""),
        # *18* and _18_, but not 2 * 18 * 3
        (r"(?<![\w)\]}.])(?<![0-9)\]}] )([*_]{1,2})(?![\s*_])([^*_\n]{1,80})(?<!\s)\1(?![\w(])", r"\2"),
        (r"(?<![\w)])\([A-E]\)(?= *+[-$0-9])", " "),  # (B) 18
        (r"\b([A-Z][a-z]++ [0-9]++):(?= )", r"\1."),  # Day 1: 18
        (" {2,}", " "),
    )
]

_DIGIT = re.compile("[0-9]")

# Groups are atomic, so that 12 is never matched as 1 and there is no backtracking.
NUMBER = (
    r"(?>[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++(?:\.[0-9]++)?+|[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?:[eE][-+]?+[0-9]++)?+"
)
_INDEX = r"(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,9}\})(?![A-Za-z0-9]))"
_TERM = (  # begins here: of a list, or of what a word says about it
    r"[-+(\[{]{0,3}(?:\.?[0-9]|[√π∞]|\\(?:[dt]?frac|sqrt|pi|infty)"
    rf"|[A-Za-z]{_INDEX}?(?:[ ]?[=)\]}}]|\())"
)
_POWER = r"(?:[ ]?+\^[ ]?+\{?+-?+[0-9]\}?+)?+"
_UNIT = rf"{_POWER}(?:/[A-Za-z]++{_POWER})*+"  # the end of cm^2 or km/h
_MEASURES = (
    "degrees?|hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|feet|foot|ft|yards?|miles?|pounds?|lbs?|"
    "dollars?|(?:kilo)?meters?|k?m|(?:kilo)?grams?|kg"
)

_TOKENS = re.compile(
    rf"""
    (?P<space>[ ])
    # What is part of an expression and never of a number: functions, 0.333..., products of variables (3xy).
    |(?P<unreadable>[0-9]*+\.[0-9]++(?:\.\.|…)[.]*+|[0-9]*+\.[0-9]*+(?:\([0-9]++\)|\\(?=overline|bar|dot))
        |\\(?:begin|end)\{{[a-z*]++\}}|\\[A-Za-z]++
        |(?:pi|sqrt|cbrt|(?:log|ln|exp|sin|cos|tan)(?=[ ]?[0-9(\[{{^_\\]))(?![a-z])
        |(?<=[0-9])(?:[a-z][0-9_][A-Za-z0-9_]*+|(?:x[yz]|yz|xyz|a[bc]|bc|abc|mn|pqr?|rs|uv)(?![A-Za-z])))
    |(?P<number>{NUMBER})
    # Between two numbers, or after one: what makes another number of it, or a list.
    |(?P<list>,[ ]?(?:(?:and|or)[ ])?(?={_TERM})|(?:and|or)[ ](?={_TERM}))
    |(?P<infix>(?:to|through|by|of|out[ ]of|into|times|plus|minus|(?:divided|multiplied)[ ]by|vs\.?|versus|
        remainder|mod|modulo|choose|per)[ ](?={_TERM})|-to-(?=[0-9])
        |(?:(?<=[0-9])|(?<=[0-9][ ])):[ ]?(?=[0-9]))
    |(?P<suffix>(?:squared|cubed|factorial|halves|thirds|fifths|sixths|sevenths|eighths|ninths|tenths|
        hundredths|thousandths|and[ ]a[ ](?:half|third|quarter)
        |or[ ](?:more|less|fewer|higher|greater))\b|[°'′″"](?=[ ]?[0-9]))
    |(?P<scale>(?i:hundred|thousand|million|billion|trillion|dozen)\b)
    # A unit in a list (5 cm and 3 cm), in a sum (5 cm + 3 cm), before a smaller one (5 ft 3 in).
    |(?P<unit>(?!(?:and|or|to)\b)[A-Za-z]{{2,}}+{_POWER}
        (?=,?[ ](?:and|or|to)[ ][.]?[0-9]|[ ]?[-+*/=][ ]?[0-9(])
        |(?:{_MEASURES})(?=[ ][0-9]))
    # Before a number: what makes another one of it, or none.
    |(?P<denial>(?:(?:is|was|are|does)n't|not|never|rather[ ]than|instead[ ]of)[ ]
        (?:be[ ]|equal[ ](?:to[ ])?)?(?={_TERM}))
    |(?P<prefix>(?:than|least|most|over|under|above|below|between|twice|double|triple|
        (?:half|third|quarter|root|square|cube|reciprocal)[ ]of)[ ](?:the[ ])?(?={_TERM}))
    |(?P<indexed>[A-Za-z]{_INDEX})
    # Words: abbreviations, articles, units of one letter (5 m, but 5m is five times m), all that are longer.
    |(?P<word>(?:[A-Za-z]\.){{2,}}|(?<![0-9])[aAI](?=[ ](?:[A-Za-z]{{2}}|[0-9])|')
        |(?<=[0-9}}%)][ ])[mgshlLVWJNCF]{_UNIT}(?![A-Za-z0-9'^_(])(?![ ]?[-+*/=^<>≤][ ]?[0-9A-Za-z(\\])
        |(?<=[0-9])[mgsh](?=/[A-Za-z]){_UNIT}|°[ ]?[CFK]?\b|[A-Za-z][A-Za-z0-9_]++(?:'[a-z]++)?+{_UNIT})
    |(?P<letter>[A-Za-zα-ωΑ-Ω∞])
    |(?P<open>[(\[{{]|\\\{{)
    |(?P<close>[)\]}}]|\\\}})
    |(?P<percent>%)
    |(?P<dash>(?<=[A-Za-z]{{2}})-(?=[0-9]))
    |(?P<sign>[-+*/^_=<>≤±∓√∛÷]|!(?![\s"'”)])|\|(?=[^\s|])|(?<=[^\s|])\|)
    |(?P<prose>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_AFTER_TERMS = {"list", "infix", "suffix", "scale", "unit"}
_TERMS = {"number", "unreadable", "letter", "indexed", "close", "percent", "suffix", "scale", "unit"}
_WRITTEN = {"list": ";", "infix": "?", "suffix": "?", "unit": "?", "prefix": "?"}
