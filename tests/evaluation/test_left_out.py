"""Rows that are not evaluated are named, a few of each kind, and the others counted."""

from jaxllm.data.sources import BadRow
from jaxllm.evaluation.left_out import print_left_out


def test_many_rows_with_one_problem_take_a_few_lines(capsys):
    too_long = [(f"a.jsonl:{i}", BadRow("too long", f"{i} tokens")) for i in range(1, 141)]
    print_left_out([*too_long, ("a.jsonl:141", BadRow("not JSON"))])
    assert capsys.readouterr().err.splitlines() == [
        *(f"left out: a.jsonl:{i}: too long ({i} tokens)" for i in (1, 2, 3)),
        "left out: 137 more rows: too long",
        "left out: a.jsonl:141: not JSON",
    ]
