"""Countdown: does the completion reach the target number using every given number once?"""

import ast
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from jaxllm.rewards.completion_text import after_thought, last_tagged
from jaxllm.rewards.expressions import plain

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{([^{}]*)\}")
# What is no part of an expression. Everything else is: of `2.44 + 19` nothing is read, rather than `44 + 19`.
_PROSE = re.compile(r"\(?[A-Za-z]{2,}[.]?|[;?→\"“”\n]|[.,:](?![0-9])|(?<![0-9]):")
_OPERATOR = re.compile(r"[0-9)] *+[-+*/]")
_DIGIT = re.compile("[0-9]")
_ARITHMETIC = re.compile("[-+*/()0-9 ]+")
_MAX_LENGTH = 200  # characters of an expression: bounds the digits of its value and its nesting


def countdown(example: Mapping[str, Any], completion: str, *, partial_credit: float = 0.0) -> float:
    """1.0 if the last expression equals `example["target"]` and uses each of `example["nums"]` exactly once.

    The numbers may also be in `example["numbers"]`. The expression is read after the last `<answer>`, else on
    the last line, and never before `</think>`; `= 98` after it is ignored. It is read whole or not at all.
    `partial_credit` is the reward of an expression that uses the right numbers but has another value.
    """
    expression = _last_expression(completion)
    if expression is None:
        return 0.0
    try:
        numbers: list[int] = []
        value = _evaluate(ast.parse(expression, mode="eval").body, numbers)
    except (SyntaxError, ZeroDivisionError, RecursionError):
        return 0.0
    if sorted(numbers) != sorted(map(Fraction, example["numbers" if "numbers" in example else "nums"])):
        return 0.0
    return 1.0 if value == Fraction(example["target"]) else partial_credit


def _last_expression(completion: str) -> str | None:
    text = after_thought(completion)
    if text is None:
        return None
    tagged = last_tagged(text, "answer")
    text = text.strip().rpartition("\n")[2] if tagged is None else " ".join(tagged.split())
    parts = _PROSE.split(_BOX.sub(r";\1;", plain(text)).replace("÷", "/"))
    last = _last_with(_OPERATOR, parts) or _last_with(_DIGIT, parts)
    sides = last.split("=")  # x = 44 + 19 + 35 = 98
    expression = (next(filter(_OPERATOR.search, sides), None) or sides[0]).strip().rstrip(" -")
    return expression if len(expression) <= _MAX_LENGTH and _ARITHMETIC.fullmatch(expression) else None


def _last_with(pattern: re.Pattern[str], parts: list[str]) -> str:
    return next(filter(pattern.search, reversed(parts)), "")


def _evaluate(node: ast.expr, numbers: list[int]) -> Fraction:
    """The value of the expression, exactly; the numbers in it are appended to `numbers`."""
    match node:
        case ast.Constant(value=int(number)):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, numbers)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_evaluate(left, numbers), _evaluate(right, numbers))
    raise SyntaxError("only numbers, + - * / and parentheses")
