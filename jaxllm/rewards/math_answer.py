"""Is the final answer of a completion exactly the number that the example expects?

Numbers are compared as fractions. Nothing is evaluated, and every pattern takes time linear in the length of
the text, so that no completion, however hostile, takes much longer than reading it.
"""

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple


class Number(NamedTuple):
    value: Fraction  # as written: 50 for 50%
    percent: bool

    def equals(self, other: "Number") -> bool:
        """50% equals 50, where the unit is left out, and 0.5; but 50% does not equal 0.5%."""
        if self.percent == other.percent:
            return self.value == other.value
        percent, plain = (self, other) if self.percent else (other, self)
        return plain.value in (percent.value, percent.value / 100)


def math_answer(example: Mapping[str, Any], completion: str) -> float | None:
    """1.0 if the completion's final answer equals `example["answer"]`, a number or a solution with `#### x`.

    The final answer is the last `\\boxed{}`, else the last `#### x`, else x in "answer is x", else x in "= x"
    on the last line with a number, else the last number of that line; only text in `<answer>` counts if there
    is any. None if the example's own answer is not a number.
    """
    answer = _plain(str(example["answer"]))
    stated = _stated(answer)
    expected = parse_number(answer if stated is None else stated)
    if expected is None:
        return None
    given = final_answer(completion)
    return float(given is not None and given.equals(expected))


def final_answer(completion: str) -> Number | None:
    """The number that a completion gives as its answer, or None if it gives none."""
    text = _plain(completion.rpartition("<answer>")[2].partition("</answer>")[0])
    stated = _stated(text)
    if stated is not None:
        return parse_number(stated)
    if answers := _ANSWER_IS.findall(text):
        return parse_number(answers[-1])
    last_line = next((line for line in reversed(text.splitlines()) if _DIGIT.search(line)), "")
    numbers = _EQUALS.findall(last_line) or _ANYWHERE.findall(last_line)
    return parse_number(numbers[-1]) if numbers else None


def _stated(text: str) -> str | None:
    """The content of the last `\\boxed{}`, else of the last line marked `####`, else None."""
    _, box, after = text.rpartition("\\boxed{")
    if box:
        depth = 1
        for end, character in enumerate(after):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return after[:end]
        return ""  # truncated before the closing brace
    _, mark, after = text.rpartition("####")
    return after.strip().partition("\n")[0] if mark else None


def parse_number(text: str) -> Number | None:
    """The number in `text`, which may have a currency, a unit or `x =`, but nothing else; or None."""
    match = _WHOLE.fullmatch(text.rpartition("=")[2].strip())
    if match is None or match["unit"].strip() in _UNKNOWNS or len(match[0]) > 200:
        return None
    decimals = [_decimal(part) for part in (match["whole"], match["top"], match["bottom"]) if part]
    parts = [decimal for decimal in decimals if decimal is not None]
    if len(parts) < len(decimals):
        return None
    value = parts[0]
    if match["bottom"]:
        if parts[-1] == 0:
            return None
        value = parts[-2] / parts[-1] + (parts[0] if match["top"] else 0)
    value *= _SCALES.get(match["scale"], 1)
    return Number(-value if match["sign"] == "-" else value, percent=match["percent"] is not None)


def _decimal(text: str) -> Fraction | None:
    _, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-")) > 2:  # 1e999999999 would have a billion digits
        return None
    return Fraction(text.replace(",", ""))


def _plain(text: str) -> str:
    """The text with numbers in LaTeX, Markdown and Unicode notation rewritten in ASCII."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _vulgar(match: re.Match[str]) -> str:
    """A Unicode fraction such as ½ as 1/2."""
    mixed = match.string[match.start() - 1 : match.start()].isdigit()
    return " " * mixed + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("[−–﹣-]", "-"),
        ("[\u00a0\u202f]|\\\\[;: ]|~", " "),
        (r"\\[,!]", ""),
        (r"\{,\}", ","),
        (r"\^(?:\\circ|\{\\circ\})", "°"),
        ("[¼-¾⅐-⅞]", _vulgar),  # 1½ is 1 1/2
        (r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r" \1 "),
        (r"(?<=[0-9])\s*+\\[dt]?frac", r" \\frac"),  # 1\frac{1}{2} is 1 1/2
        (r"\\[dt]?frac\s*+\{\s*+([^{}]*)\}\s*+\{\s*+([^{}]*)\}", r"\1/\2"),
        (r"\\[dt]?frac\s*+([0-9])\s*+([0-9])", r"\1/\2"),
        (r"\\%", "%"),
        (r"(?<![0-9])-\\?\$", "$-"),  # -$5 is $-5
        (r"\\?[$€£¥]|\\[()\[\]]|\*\*|`", " "),  # currency and what surrounds a formula or bold text
    )
]

# Groups are atomic, so that 12 is never matched as 1 and there is no backtracking.
_UNSIGNED = (
    r"(?>[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++(?:\.[0-9]++)?+|[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?:[eE][-+]?[0-9]++)?+"
)
_QUANTITY = rf"{_UNSIGNED}(?:\s++[0-9]++/[0-9]++|\s?+/\s?+{_UNSIGNED})?+"
_SUFFIX = r"(?:\s?+(?:%|percent\b))?+(?:\s?+(?:thousand|million|billion)\b)?+"
# In running text, a sign is not the minus between two terms, and a number is not part of a word, a power or
# an algebraic term.
_SIGN = r"(?<![\w)\]}^])(?<!\^\{)[-+]"
_START = r"(?<![\w^])(?<![0-9]\.)(?<!\^[-{])"
_END = r"(?![0-9^\\]|[xyznik]\b)"
_IN_TEXT = rf"((?:{_SIGN}|{_START}){_QUANTITY}{_SUFFIX}){_END}"
_LAST_TERM = r"(?!\s*+[-+*/×÷]\s*+[0-9(])"
_ANSWER_IS = re.compile(rf"(?i:\banswer\s{{0,9}}(?:is|:|=))[^0-9\n]{{0,40}}?{_IN_TEXT}{_LAST_TERM}")
_EQUALS = re.compile(rf"=\s*+{_IN_TEXT}{_LAST_TERM}")
_ANYWHERE = re.compile(_IN_TEXT)
_DIGIT = re.compile("[0-9]")

_WHOLE = re.compile(
    rf"""(?:[A-Za-z ]++:)?+ \s*+ (?P<sign>[-+])?+ \s*+
    (?P<whole>{_UNSIGNED}) (?: \s++ (?P<top>[0-9]++) (?=\s*+/) )?+ (?: \s*+/\s*+ (?P<bottom>{_UNSIGNED}) )?+
    \s*+ (?P<percent>%|percent\b)?+ \s*+ (?P<scale>thousand|million|billion)?+
    (?P<unit> \s*+ (?: [A-Za-z°µ] (?: [A-Za-z°µ²³/\-'(), .] | \^\{{?[0-9]\}}? )*+ )?+ ) [.]?+ \s*+""",
    re.VERBOSE,
)
_SCALES = {"thousand": 1000, "million": 10**6, "billion": 10**9}
_UNKNOWNS = frozenset("xyznik")  # 5x is not 5
