import pytest

from jaxllm.rewards.countdown import countdown

ROW = {"nums": [44, 19, 35], "target": 98}

RIGHT = [
    "44 + 19 + 35",
    "44+19+35 = 98",
    "(44 + 19) + 35 = 98.",
    "First 44 + 19 = 63.\nAnswer: 35 + (19 + 44)",
    "<think>44 - 19 = 25</think>\n<answer> (44 + 19) + 35 </answer>",
    "<answer>44 + 19\n+ 35</answer>\nThat is 98.",
    "<answer>1 + 2</answer> no, <answer>44 + 19 + 35</answer>",
    "<answer>44 + 19 + 35",
    "35 − (−19 − 44)",
    "The 3 numbers give 44 + 19 + 35 = 98",
    "((((44)))) + 19 + 35",
    "- 44 + 19 + 35",  # a list item
    # after the thought, in the last tag with an answer
    "<think>44 + 19</think>44 + 19 + 35",
    "<think><answer>1 + 2</answer></think><answer>44 + 19 + 35</answer>",
    "<answer>44 + 19 + 35</answer> <answer>done</answer>",
    # in Markdown, LaTeX and other digits
    r"\boxed{44 + 19 + 35}",
    r"$44 + 19 + 35 = 98$",
    "**44 + 19 + 35**",
    "`44 + 19 + 35`",
    "４４ + 19 + 35",
    # beside its value and prose
    "x = 44 + 19 + 35 = 98",
    "98 = 44 + 19 + 35",
    "44 + 19 + 35 = 63 + 35 = 98",
    "44 + 19 + 35 (each once)",
    "44 + 19 + 35 = 98 in 2 steps",
    "44 + 19 + 35, which is 98",
    "(44 + 19) + 35 → 98",
    "44 + 19 + 35 - that is 98",
]

WRONG = [
    "",
    "98",
    "= 98",
    "44 + 19 = 63",
    "44 + 19 + 35 + 0",
    "44 + 19 + 35 + 44 - 44",
    "44 + 54",
    "44 + 19 - 35",
    "4 4 + 19 + 35",
    "44 + 19 + 35 or 1 + 2",
    "44 + 19 + 35)",
    "(44 + 19 + 35",
    "44 + (19)(35)",
    "44 + 19 35",
    "44.0 + 19 + 35",
    "044 + 19 + 35",
    "44 + 19 + 3_5",
    "44 // 1 + 19 + 35",
    "-44 + 19 + 35",
    "44 + 19 + 35 / (44 - 44)",
    "2 ** 9 ** 9 ** 9",
    "44 + 19 + 35\nDone.",
    "<answer>44 + 19</answer> + 35",
    "(" * 100 + "44" + ")" * 100 + "+ 19 + 35",
    "(" * 100_000,
    "-" * 100_000 + "1",
    "__import__('os')",
    "[44, 19, 35][0]",
    # in a thought alone, or not in the tag
    "<think>44 + 19 + 35",
    "<think>44 + 19 + 35</think>",
    "<think><answer>44 + 19 + 35</answer></think> I give up",
    "<think><answer>44 + 19 + 35</answer>",
    "<answer>none</answer>\n44 + 19 + 35",
    # a part of another expression
    "2.44 + 19 + 35",
    "3x + 44 + 19 + 35",
    "x44 + 19 + 35",
    "44 + 19 + 35x",
    "44 + 19 + 35 * x",
    "44 + 19 + 35 - x",
    "44 + 19 + 35²",
    "44 + 19 + 35^2",
    "44 + 19 + 35!",
    "44 + 19 + 35%",
    "44 + 19 + 35 ** 1",
    "44 + 19 + 35.5",
    "44 + 19 + 35e0",
    "44 + 19 + 35 ≠ 98",
    "44 + 19 + 35 < 99",
    "1,44 + 19 + 35",
    "3:44 + 19 + 35",
    "1_44 + 19 + 35",
    "0x44 + 19 + 35",
    "√44 + 19 + 35",
    r"\sqrt{4}44 + 19 + 35",
    r"\frac{1}{2}44 + 19 + 35",
    # not the last one
    "44 + 19 + 35 = 98. Wrong, so 1 + 2",
]


@pytest.mark.parametrize("completion", RIGHT)
def test_right(completion):
    assert countdown(ROW, completion) == 1.0


@pytest.mark.parametrize("completion", WRONG)
def test_wrong(completion):
    assert countdown(ROW, completion) == 0.0


@pytest.mark.parametrize(
    ("numbers", "target", "completion", "score"),
    [
        ([3, 3, 8, 8], 24, "8 / (3 - 8 / 3)", 1.0),  # 23.999999999999996 in floating point
        ([1, 3], 0.3333333333333333, "1 / 3", 0.0),
        ([3, 3], 1, "3 / 3", 1.0),
        ([3, 3], 3, "3", 0.0),
        ([7, 2], 3, "7 // 2", 0.0),
        ([2, 3], 8, "2 ** 3", 0.0),
        ([6, 7], 42, "6 × 7", 1.0),
        ([6, 3], 2, "6 ÷ 3", 1.0),
        ([5, 3], -2, "3 - 5", 1.0),
        ([5, 3], 8, "-3 + 5", 0.0),
        ([5, 3], 2, "-3 + 5", 1.0),
        ([5, 0], 0, "0 / 5", 1.0),
        ([5, 0], 0, "5 / 0", 0.0),
        (["5", "3"], "8", "5 + 3", 1.0),
        ([5], 5, "5", 1.0),
    ],
)
def test_arithmetic_is_exact(numbers, target, completion, score):
    assert countdown({"numbers": numbers, "target": target}, completion) == score


def test_the_right_numbers_get_partial_credit():
    assert countdown(ROW, "44 + 19 - 35", partial_credit=0.1) == 0.1
    assert countdown(ROW, "44 + 19", partial_credit=0.1) == 0.0
    assert countdown(ROW, "44 + 19 + 35", partial_credit=0.1) == 1.0
