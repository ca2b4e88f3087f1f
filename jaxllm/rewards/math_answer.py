"""Is the final answer of a completion exactly the number that the example expects?

Numbers are compared as fractions. Nothing is evaluated: an answer is read whole or not at all, so that `12π`
and `5 or 6` are no numbers. The time is linear in the length of the text (see `expressions`), so that no
completion, however hostile, takes much longer than reading it.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from jaxllm.rewards.completion_text import after_thought, last_tagged
from jaxllm.rewards.expressions import NUMBER, Expression, expressions, plain


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
    on the last line with a number, else the last number of that line. A box or a `####` of words alone is
    none. What stands before `</think>` does not count, and where there is an `<answer>` its text alone does.
    None if the example's own answer is not a number.
    """
    answer = plain(str(example["answer"]))
    marked = _marked(answer)
    expected = parse_number(answer if marked is None else marked)
    if expected is None:
        return None
    given = final_answer(completion)
    return float(given is not None and given.equals(expected))


def final_answer(completion: str) -> Number | None:
    """The number that a completion gives as its answer, or None if it gives none."""
    text = after_thought(completion)
    if text is None:
        return None
    tagged = last_tagged(text, "answer")
    text = plain(text if tagged is None else tagged)
    marked = _marked(text)
    if marked is not None:
        return parse_number(marked)
    phrases = [match.end() for match in _ANSWER_IS.finditer(text)]
    # An answer without a digit, such as π, is one too: the next number is not.
    ends = set(phrases)
    numbers = [each for each in expressions(text) if each.has_number or each.start in ends]
    places = [each.start for each in numbers]
    for end in reversed(phrases):
        i = bisect_left(places, end)
        if i < len(places) and _NEAR.fullmatch(text, end, min(places[i], end + 50)):
            return read(numbers[i])
    if not numbers:
        return None
    line = text.rfind("\n", 0, places[-1])
    on_line = numbers[bisect_left(places, line) :]
    return read(next((each for each in reversed(on_line) if _is_equation(each)), on_line[-1]))


def parse_number(text: str) -> Number | None:
    """The number in `text`, which may have a currency, a unit or `x =`, but nothing else; or None."""
    found = list(expressions(text))
    if len(found) != 1 or "!" in text:  # 5! is another number
        return None
    before = text[: found[0].start].strip(" \"'“‘(\n")
    return read(found[0], spaced_sign=True) if not before or before[-1] in ":=" else None


def read(expression: Expression, *, spaced_sign: bool = False) -> Number | None:
    """The number that an expression is, or has after its last `=`. None for any other expression."""
    *others, last = expression.text.split(";")
    if (others and not _is_chain([*others, last])) or _INEQUALITY.search(last):
        return None
    left, equals, right = last.rpartition("=")
    value = _value(right, spaced_sign=spaced_sign or bool(equals) or expression.is_result)
    if value is None and equals and "=" not in left and _CALCULATION.fullmatch(right):  # 18 = 9 * 2
        return _value(left, spaced_sign=False)
    return value


def _is_equation(expression: Expression) -> bool:
    return expression.is_result or "=" in expression.text


def _is_chain(items: list[str]) -> bool:
    """Whether a list is of steps (16 - 3 = 13, 9 * 2 = 18) of which at most one gives a name its value."""
    names = [item.rpartition("=")[0].strip() for item in items]
    return all(names) and sum(_NAME.fullmatch(name) is not None for name in names) <= 1


def _value(text: str, *, spaced_sign: bool) -> Number | None:
    text = text.strip()
    if len(text) > _LONGEST or (_SPACED_SIGN.match(text) and not spaced_sign):  # - 3 in 5 cm - 3 cm
        return None
    while text[:1] in ("(", "{") and text[-1:] in (")", "}"):
        text = text[1:-1].strip()
    if power := _POWER_OF_TEN.fullmatch(text):
        mantissa = _decimal(power["mantissa"] or "1")
        if mantissa is None:
            return None
        value = mantissa * Fraction(10) ** int(power["exponent"])
        return Number(-value if power["sign"] == "-" else value, percent=False)
    match = _NUMBER.fullmatch(text)
    if match is None:
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
    value *= _SCALES.get((match["scale"] or "").lower(), 1)
    return Number(-value if match["sign"] == "-" else value, percent=match["percent"] is not None)


def _decimal(text: str) -> Fraction | None:
    _, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-")) > 2:  # 1e999999999 would have a billion digits
        return None
    return Fraction(text.replace(",", ""))


def _marked(text: str) -> str | None:
    """The content of the last `\\boxed{}` with an expression, else of the last such line after `####`, else
    None. "" for a box that is cut off."""
    boxes = _BOX.split(text)[1:]
    if boxes and _closed(boxes[-1]) is None:
        return ""
    for box in map(_closed, reversed(boxes)):
        if box is not None and any(expressions(box)):
            return box
    for part in reversed(text.split("####")[1:]):
        line = part.strip().partition("\n")[0]
        is_heading = _NUMBERED.match(line) or (_WORD.match(line) and parse_number(line) is None)
        if any(expressions(line)) and not is_heading:
            return line
    return None


def _closed(text: str) -> str | None:
    """The text up to the brace that closes it."""
    depth = 1
    for end, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:end]
    return None


_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{")
_WORD = re.compile("[A-Za-z]{2}")  # of a heading: Step 1: multiply
_NUMBERED = re.compile(r"[0-9]++[.):] ++[A-Za-z]{2}")  # 1. Multiply
_ANSWER_IS = re.compile(r"(?i:\banswer\s{0,9}(?:is\b|:|=))\s{0,9}")
_NEAR = re.compile(r"[^\n]{0,40}")
_NAME = re.compile(r"[A-Za-zα-ω](?:_\w|_\{\w++\})?(?:\([^()]*+\))?")
_INEQUALITY = re.compile("[<>≤]")
_CALCULATION = re.compile(r" *+(?:[A-Za-z]|[-+*/^÷()0-9., ]++)")
_LONGEST = 200  # characters of a number
_SPACED_SIGN = re.compile(r"[-+] ")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000} | {
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_NUMBER = re.compile(
    rf"""(?P<sign>[-+])?+ [ ]?+ (?P<whole>{NUMBER}) (?: [ ]++ (?P<top>[0-9]++) (?=[ ]?+/) )?+
    (?: [ ]?+/[ ]?+ (?P<bottom>{NUMBER}) )?+ [ ]?+ (?P<percent>%)?+ [ ]?+
    (?P<scale>(?i:{"|".join(_SCALES)}))?+""",
    re.VERBOSE,
)
_POWER_OF_TEN = re.compile(
    rf"""(?P<sign>[-+])?+ [ ]?+ (?: (?P<mantissa>{NUMBER}) [ ]?+ [*x] [ ]?+ )?+
    10 [ ]?+ \^ [ ]?+ [{{(]?+ [ ]?+ (?P<exponent>[-+]?+[0-9]{{1,2}}) [ ]?+ [)}}]?+""",
    re.VERBOSE,
)
