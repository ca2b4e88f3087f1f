"""Countdown: does the completion reach the target number using every given number once?"""

import ast
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans("×·÷−", "**/-")
_EXPRESSION = re.compile(r"-?[0-9(][-+*/()0-9 ]*+")
_MAX_LENGTH = 200  # characters of an expression: bounds the digits of its value and its nesting


def countdown(example: Mapping[str, Any], completion: str, *, partial_credit: float = 0.0) -> float:
    """1.0 if the last expression equals `example["target"]` and uses each of `example["nums"]` exactly once.

    The numbers may also be in `example["numbers"]`. The expression is read after the last `<answer>`, else on
    the last line; `= 98` after it is ignored. `partial_credit` is the reward of an expression that uses the
    right numbers but has another value.
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
    _, tag, answer = completion.rpartition("<answer>")
    if tag:
        text = " ".join(answer.partition("</answer>")[0].split())
    else:
        text = completion.strip().rpartition("\n")[2]
    text = text.translate(_SIGNS)
    expressions = _EXPRESSION.findall(text.rpartition("=")[0] or text)
    expression = expressions[-1].rstrip(" +-*/") if expressions else ""
    return expression if 0 < len(expression) <= _MAX_LENGTH else None


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
