"""Each row is a way of writing a number that some grader is known to get wrong."""

import time

import pytest

from jaxllm.rewards.math_answer import math_answer

RIGHT = [
    # where the answer is
    ("18", "16 - 3 = 13, and 9 * 2 = 18 #### 18"),
    ("18", "#### 18\nI hope this helps 100 of you."),
    ("18", "#### 7\nNo, I forgot some.\n#### 18"),
    ("18", r"so 9 * 2 is \boxed{18}, not 20"),
    ("18", r"\boxed{7} is wrong, \boxed{18}"),
    ("18", r"\boxed{18} #### 20"),
    ("18", r"\boxed{\text{18}}"),
    ("18", r"$\boxed{x = 18}$"),
    ("18", "The answer is 18. Check: 18 / 9 = 2."),
    ("18", "The answer is 3 * 6 = 18"),
    ("18", "**Answer:** 18"),
    ("18", "The answer is: $18$."),
    ("18", "The final answer is that she earns $18 on each of 7 days"),
    ("18", "So 9 * 2 = 18 dollars on 1 day."),
    ("18", "9 * 2 = 20, no:\nshe makes 18"),
    ("18", "He has 20, gives away 2 and keeps 18"),
    ("18", "<think>It is 20? = 20</think><answer>18</answer>"),
    ("18", "<answer>The answer is 18</answer> of 20"),
    ("9", "She has 16-3-4=<<16-3-4=9>>9"),
    # how it is written
    ("18", "#### 18."),
    ("18", "#### 18.00"),
    ("18.0", "#### 18"),
    ("18", "#### $18 per day"),
    ("18", "#### 18cm"),
    ("18", r"\boxed{18\text{ m}^2}"),
    ("18", r"\boxed{18\,\text{km/h}}"),
    ("18", "#### +18"),
    ("1234567", "#### 1,234,567"),
    ("1,234", "#### 1234"),
    ("1234", r"\boxed{1{,}234}"),
    ("1234", r"\boxed{1\,234}"),
    ("1234.5", "it is $1,234.50."),
    ("-5", "#### -5"),
    ("-5", "#### −5"),
    ("-5", "the answer is -$5"),
    ("-5", r"\boxed{-5^\circ}"),
    ("-5", "it is -5°C"),
    ("3", "10 - 7 leaves 10-7=3"),
    ("7", "from 10-7"),
    ("0.5", "#### .5"),
    ("0.5", "#### 1/2"),
    ("3/4", "#### 0.75"),
    ("3/4", "#### 6/8"),
    ("3/4", r"\boxed{\frac{3}{4}}"),
    ("3/4", r"the answer is $\dfrac34$"),
    ("-3/4", r"\boxed{-\frac{3}{4}}"),
    ("-3/4", r"\boxed{\frac{-3}{4}}"),
    ("1.5", "#### 1 1/2 cups"),
    ("1.5", r"\boxed{1\frac{1}{2}}"),
    ("1.5", "he eats 1½"),
    ("-1.5", "#### -1 1/2"),
    ("50", "#### 50%"),
    ("50", r"\boxed{50\%}"),
    ("50%", "the answer is 50"),
    ("50%", "#### 0.5"),
    ("0.5", "it is 50 percent"),
    ("5000000", "#### 5 million"),
    ("100000", "#### 1e5"),
    (18, "#### 18"),
    (18.0, "#### 18"),
    (0.1, "#### 1/10"),
    ("9 * 2 = <<9*2=18>>18 eggs\n#### 18", "so 18"),
    (r"Hence \boxed{18}.", "so 18"),
]

WRONG = [
    ("18", ""),
    ("18", "eighteen"),
    ("18", "#### "),
    ("18", "#### 18 or 20"),
    ("18", "#### 18, 20"),
    ("18", "#### about"),
    ("18", "18 #### 20"),
    ("18", r"18 is \boxed{20}"),
    ("18", r"18, so \boxed{18"),
    ("18", r"\boxed{18x}"),
    ("18", r"\boxed{18\pi}"),
    ("18", r"\boxed{18\sqrt{2}}"),
    ("18", r"\boxed{18^2}"),
    ("18", "the area is 18^2"),
    ("18", "it is 2^18"),
    ("18", "#### -18"),
    ("18", "#### 18 million"),
    ("18", "#### 1 8"),
    ("1", "#### 1 2"),
    ("1", "the answer is 12"),
    ("2", "the answer is 12"),
    ("123", "#### 1,23"),
    ("1", "the answer is 1,234"),
    ("50%", "#### 0.5%"),
    ("0.5%", "#### 50%"),
    ("0.3333", "#### 1/3"),
    ("0", "#### 1/0"),
    ("0", "#### 0/0"),
    ("9", r"\boxed{9^{9^9}}"),
    ("1", "#### 1e999999999"),
    ("1", "it is 1e999999999"),
    ("1", "#### nan"),
    ("1", "#### inf"),
    ("1", "#### True"),
]


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_right(answer, completion):
    assert math_answer({"answer": answer}, completion) == 1.0


@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_wrong(answer, completion):
    assert math_answer({"answer": answer}, completion) == 0.0


@pytest.mark.parametrize("answer", ["", "B", "x + 1", "18 or 20", "1e999999999", "{1, 2}"])
def test_it_does_not_apply_where_the_answer_is_not_a_number(answer):
    assert math_answer({"answer": answer}, "#### 1") is None


@pytest.mark.parametrize(
    "piece",
    [
        *("9", " 9", "9 9", "9,999", ".9", "9/", "9 1/2 ", "9^", "9e9", "½", "-", "- ", "-$", "$", "9a", "a"),
        *("{", "(", " ", "\n", "= ", "answer is ", "####", "#### a ", "<answer>"),
        *(r"\boxed{", r"\frac", r"\frac{", r"\text{"),
    ],
)
def test_the_time_is_linear_in_the_length_of_the_text(piece):
    text = piece * (100_000 // len(piece))
    for completion in (text, "#### 9" + text, "the answer is" + text + "x", "= 9" + text):
        began = time.process_time()
        math_answer({"answer": "9"}, completion)
        assert time.process_time() - began < 1.0  # a quadratic pattern takes a minute
