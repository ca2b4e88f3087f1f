"""Each row is a way of writing a number that some grader is known to get wrong."""

import importlib
import time

import pytest

from jaxllm.rewards import expressions
from jaxllm.rewards.math_answer import final_answer, math_answer

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

# Marks, units, notation and prose around a number do not hide it.
READ = {
    "12": [
        *(
            "The answer is 12<|im_end|>",
            "12</answer>",
            r"\boxed{\$12}",
            r"\boxed{12~\mathrm{cm}^{2}}",
            "答案：12",
        ),
        *(
            r"\boxed{12\text{ m/s}^2}",
            r"\boxed{12 = 3 \times 4}",
            r"\\boxed{12}",
            "12 or so",
            "12 dollars or so",
        ),
        *("12 = 6 * 2", "The answer is 12 = 3 * 4.", "12 = x", "so x + y = 12", "2x = 12"),
        *("The answer is (B) 12.", r"\boxed{\textbf{(B)}\ 12}", "The answer is 12 and it is right"),
        *("12 or so", "12 to be exact", "12 of them", "12 times", "12 over the week", "12 minus nothing"),
        *("12 C", "98.6 F is 12 C", "**Answer: 12**", r"Answer: $\boxed{12}$", r"The answer is: \(12\)"),
        *("### Answer\n12", "12 km", "The answer is 12 km.", "12km", r"\boxed{12 \mathrm{~km}}"),
        *(r"\boxed{12\,\mathrm{km}}", r"\boxed{12\,\text{m}}", "12 m", "The answer is 12 m/s."),
        *(r"\boxed{12\text{ cm}^2}", "12 cm²", "12 m².", "12 square feet", "12 m^3", "12 km/h"),
        *("12 m/s^2", "12 miles per hour", "$12/hour", "$12 / day", "12 a day", "It is 12 a.m.", "12%"),
        *("12 percent", "12 per cent", r"\boxed{12\%}", "12°", "12 °C", r"$12^\circ$", "12 years old"),
        *("€12", "12€", "₹12", "12 USD", "He is 12-years-old", "a 12-hole course", "the 12th"),
        *("The answer is 12!", "The answer is 12, not 11.", "It is 12, not 11.", "not 11 but 12"),
        *("The answer is not 11 but 12.", "The answer is 12 rather than 11.", "12 (twelve)"),
        *("The answer is 12 (6 each).", "The answer is 12; 6 each", '"12"', "'12'", "The answer is “12”."),
        *("*12*", "_12_", "__12__", "**12**", "`12`", "- 12", "* 12 apples", "1. 12", "(12)", "(see 12)"),
        *("> 12", "| total | 12 |", "<b>12</b>", "Step 3: 12", "Day 1: 12", "Total: 12", "x: 12"),
        *("x = 12", "So x = 12.", "2x = 24, x = 12", "2x = 24, so x = 12", r"\boxed{x = 12}"),
        *(r"x \approx 12", "x ≈ 12", "3 * 6 = 18, 18 - 6 = 12", "3 * 6 = 18 and 18 - 6 = 12"),
        *("3 * 6 = 18, and 18 - 6 = 12", "5 cm + 7 cm = 12 cm", "5 dollars + 7 dollars = 12 dollars"),
        *("=> 12", "2 + 10 -> 12", r"2 + 10 \Rightarrow 12", r"&= 12 \\", r"\[ x = 12 \]", r"\( 12 \)"),
        *("f(x) = 12", "x_1 = 12", "5! / 10 = 12", "4 x 3 = 12", "3(4) = 12", "sqrt(144) = 12"),
        *("The square root of 144 is 12.", "Answer: 12", "answer = 12", "Answer:\n12"),
        *("The answer is:\n\n$$12$$\n", "Final Answer: The final answer is $12$. I hope it is correct."),
        *("１２", "答案是12。", "答案是 12 元", "١٢", "The answer is 12 … I think", "= 12..."),
        *("3 more than 9 is 12", "A total of 12", "That adds up to 12.", "It is equal to 12"),
        *("Multiplied by 12", "In 2 days he sells 12", "He had 20, gave 8 away and has 12"),
        *("What is left is 12 I think", "The answer isn't 11. It is 12.", "12.0", "012", "+12"),
        *(r"\boxed{\boxed{12}}", r"\boxed{x = \boxed{12}}", r"\fbox{12}", r"\boxed {12}"),
        *(r"\boxed{12 \quad}", r"\boxed{\left(12\right)}", r"I write it in \boxed{ and it is \boxed{12}"),
        *(r"\boxed{\text{Total} = 12}", r"\boxed{\text{Answer: }12}", r"\boxed{\mathbf{12}}", "f(3) = 12"),
        *("x_{1} = 12", "5 apples cost 12", "The answer is **12**.", "She has **12** apples"),
        r"\begin{align*} x &= 12 \end{align*}",
    ],
    "19": [
        "COVID-19",
    ],
    "7": [
        "12 minus 5 is 7",
    ],
    "5000": [
        *(r"The answer is $5 \times 10^3$.", r"\boxed{5 \times 10^{3}}", "#### 5 × 10³", "It is 5*10^3"),
        *("It is 5 x 10^3.", r"= 5\cdot 10^3"),
    ],
    "0.005": [
        r"\boxed{5 \times 10^{-3}}",
    ],
    "1000": [
        "The answer is 10^3.",
    ],
    "-5000": [
        r"\boxed{-5 \times 10^3\text{ m}}",
    ],
    "300000000": [
        *(r"\boxed{3 \times 10^8 \text{ m/s}}", "The answer is 3 × 10^8 m/s."),
    ],
    "42": [
        *("#### Step 1: multiply\n6 * 7 = 42\n\nThe answer is 42.", "#### 1. Multiply\nThe answer is 42."),
        *("The answer is 42.\n\n#### Summary", "#### Final answer: 42", "#### The answer is 42"),
        *("#### Final answer\n42", "####\n42", "#### **42**", r"\boxed{42} Hence \boxed{\text{done}}."),
        *(r"It is 42. \boxed{}", "\\boxed{42}\n#### Step 2: check", "#### 42\n#### Done"),
    ],
    "41": [
        *(r"<think>Try \boxed{42}. No, one less.</think> The answer is 41.", "<think>42</think>41"),
        *("<think>a</think><think>42</think>\n\n41", "Try 42.</think>41"),
        *("<think>#### 42</think><answer>41</answer>", "<answer>42</answer> No: <answer>41</answer>"),
        "<answer>41</answer> <answer>done</answer>",
    ],
    "5": [
        *("$5", "5 apples", r"\$5", "#### 5 apples", r"\boxed{5 \text{ apples}}", "- $5"),
    ],
    "12000000": [
        *("$12m", "12 Million"),
    ],
    "1200": [
        "12 hundred",
    ],
    "60": [
        "5 dozen eggs",
    ],
    "-12": [
        *("The answer is -12.", "The answer is negative 12.", "minus 12", "x = - 12", r"\boxed{- 12}"),
        "-$12",
    ],
    "0.75": [
        *(r"\boxed{\frac{3}{4}}", r"\boxed{\tfrac34}", "3/4 cup", "3 / 4"),
    ],
    "1.75": [
        *("1¾", r"1 \frac{3}{4}", "1 3/4 cups"),
    ],
    "1234": [
        "1,234",
    ],
    "1234567.5": [
        "$1,234,567.50",
    ],
    "2": [
        "x_1 = 2",
    ],
    "62": [
        "30 + 20 = 50, 7 + 5 = 12, and 50 + 12 = 62",
    ],
}

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

# An expression is read whole or not at all: of these no number is read, wherever they stand.
UNREAD = [
    *("12 or more", "12 or less", r"2^{10}", r"\frac{\sqrt{3}}{2}", r"x \in (2, 5)", "(5)(3)", "f(5)"),
    *("12 and a half", "12 = 6x", "12 = y + 3", "12+", "12 per 100", "(12, 13)", "5 km-3 km", "<12"),
    *(">12", "12.500,00", "1'234", "0x12", "1_2", "12e", "12E", "4√2", "sqrt(2)", "the square root of 2"),
    *("4 sqrt(2)", "4sqrt2", r"\sqrt[3]{8}", "12 pi", "12pi", r"$12 \pi$", r"12\pi cm", r"\frac{\pi}{12}"),
    *("π/12", "pi/12", "π - 3", "pi - 3", "2πr", "12 e", r"5 \times 10^n", "2^3 = 2^3", "[3, 5]"),
    *("[3, 5)", "(3, 5]", r"[3, \infty)", "[3, ∞)", "(-∞, 3]", r"(-\infty, 3)", "]3, 5[", "(3, x)"),
    *("(x, 3)", r"(3,5) \cup (7,9)", r"\{3, 5\}", "{3, 5}", r"\{3\}", r"x \in \{3, 5\}", "x > 5", "x < 5"),
    *("x >= 5", "x <= 5", "x ≥ 5", r"x \geq 5", r"x \le 5", "x ≠ 5", "x != 5", r"x \ne 5", "3 < x < 5"),
    *("5 < x", "5 > x", "y = x > 5", "less than 5", "x = ±5", r"x = \pm 5", "2 ± 5", "between 3 and 5"),
    *("over 5", "3:4", "3 : 4", "The ratio is 3: 4", "3 to 4", "3-to-4", "3 out of 4", "3 of 4", "10:30"),
    *("at 10:30", "10:30:15", "50% of 20", "1/2 of 30", "half of 30", "twice 30", "3a", "3x", "3n", "3 x"),
    *("3 a", "3m", "3xy", "3ab", "3x^2", "3x2", "3i", "2 + 3i", "3k", "3α", "x3", "3 + x", "x + 3"),
    *("3 - x", "x/3", "3/x", "a = 3b", "x^3", "x_3", "3_4", "11_2", "11₂", "1,2,3", "1, 2, 3"),
    *("1, 2 and 3", "1, 2, and 3", "2 and 3", "2 or 3", "5 to 7", "5-7", "5–7", "x = 5 or x = -5"),
    *("x = 5, y = 6", "x = 5 and y = 6", "x = 1, 2", "x_1 = 1, x_2 = 2", "5 & 6", "5 apples and 3 pears"),
    *("2 hours 30 minutes", "5 ft 3 in", "5'3\"", "5°30'", "5 or 6 apples", "5 apples or 6"),
    *("5 cm + 3 cm", "5 cm × 3 cm", "5 km - 3 km", "5 remainder 3", "5 R 3", "from 10-7", "10 - 7"),
    *("10 + 7", "10 * 7", "10 × 7", "10 ÷ 7", "10 times 7", "10 plus 7", "10 minus 7", "10 over 7"),
    *("10 divided by 7", "x = 3 * 6", "3 * 6 = x", "5²", "5^2", "5²5", "5 squared", "5 cubed"),
    *("5 factorial", "$5!$", "5!·2", "5 thirds", "log_2 8", "log 8", "sin 30°", "|-5|"),
    *(r"\lfloor 5.5 \rfloor", r"\binom{5}{2}", "1/2/2020", "2020-01-05", "1/2/3", "3.1.4", "0.333..."),
    *("0.33…", "0.(3)", "1,23", "1 234", "It isn't 5", "12M", "5k"),
    *(r"\begin{pmatrix} 5 \\ 6 \end{pmatrix}", r"\frac{2\sqrt{3}}{3}", r"\log_2 8", "0.1(6)"),
    *("f(3) = 12, f(4) = 5", "x_{1} = 1, x_{2} = 2", "f(3) = 12 and f(4) = 5", "2**12", "2 ** 12"),
]
PLACES = [
    "{}",
    "The answer is {}.",
    "#### {}",
    "\\boxed{{{}}}",
    "So it is {}, as we saw.",
    "**Answer:** ${}$",
]

# Texts without an answer.
NO_ANSWER = [
    *(
        "The answer is π. There are 5 others.",
        "The answer is x, since 5 is too small.",
        r"Answer: $\emptyset$ (not 5)",
    ),
    *(r"The answer is $4\sqrt{2}$.", r"The answer is $4\sqrt2$.", "The answer is 12π."),
    *("The answer is 12 π.", "The answer is (3, 5).", "The answer is > 5.", "The answer is more than 5."),
    *("The answer is at least 5.", "The answer is 10:30 am.", "The answer is 3a.", "The answer is 3x."),
    *(r"\boxed{3a}", r"\boxed{3m}", r"\boxed{3 x}", "The answers are 1, 2, and 3."),
    *("The answer is 2 or 3.", "The answer is 2, or 3.", "The answer is 5 to 7."),
    *("The answer is 5 apples and 3 pears.", "The answer is 2 hours and 30 minutes."),
    *("The answer is 2 hours 30 minutes.", r"\boxed{5!}", "#### 5!", "The answer is not 5."),
    *("The answer isn't 5.", "<think>5", r"<think>\boxed{5}", "<think>a</think><think>5"),
    *("<think>5</think>", "<think>The answer is 5.</think> I do not know.", "5<think>"),
    *("<think><answer>5</answer></think>", "<answer>none</answer> 5", "The answer is 5. <answer>"),
    *(r"The answer is 5. \boxed{6", r"5 \boxed{x}", r"5 \boxed{\pi}", r"\boxed{5} \boxed{5, 6}"),
    *("5 #### 5 or 6", "5 #### x + 1", r"\boxed{5 \text{ or } 6}", r"\boxed{5 \text{ and } 6}"),
    *(r"\boxed{5, 6}", r"\boxed{(5, 6)}", r"\boxed{5:6}", r"\boxed{x > 5}", r"\boxed{\text{about } 5}"),
    *(r"\boxed{\begin{pmatrix} 5 \\ 6 \end{pmatrix}}", r"\boxed{5\%\text{ of }6}"),
    *(r"\boxed{5 \text{ R } 2}", "#### 5 hours 3 minutes", r"\boxed{5 \pm 1}", r"\boxed{5^{\circ}30'}"),
    *(r"\boxed{\frac{1}{2}\pi}", r"\boxed{5 \mod 7}", r"\boxed{5 \pmod{7}}", r"\boxed{A = 5, B = 6}"),
    *(r"\boxed{5 = x, 6}", r"\boxed{\frac{2\sqrt{3}}{3}}"),
]

# Another number is read than the one expected.
OTHER = [
    ("3", "5 × 10^3"),
    ("5", "5 × 10^3"),
    ("10", "5 × 10^3"),
    ("3", "10^3"),
    ("10", "10^3"),
    ("10", "10^{-3}"),
    ("12", "0.12%"),
    ("0.3", r"0.\overline{3}"),
    ("234", "1,234"),
    ("5", "The answer is negative 5."),
    ("5", "-5"),
    ("5", "answer: -5"),
    ("12", "$12m"),
    ("12", "12 hundred"),
    ("12", "12 dozen"),
]


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_right(answer, completion):
    assert math_answer({"answer": answer}, completion) == 1.0


@pytest.mark.parametrize(("answer", "completion"), WRONG + OTHER)
def test_wrong(answer, completion):
    assert math_answer({"answer": answer}, completion) == 0.0


@pytest.mark.parametrize(("answer", "completion"), [(a, text) for a, texts in READ.items() for text in texts])
def test_what_stands_around_a_number_does_not_hide_it(answer, completion):
    assert math_answer({"answer": answer}, completion) == 1.0


@pytest.mark.parametrize("expression", UNREAD)
def test_an_expression_is_read_whole_or_not_at_all(expression):
    read = {place: final_answer(place.format(expression)) for place in PLACES}
    assert not {place: number for place, number in read.items() if number is not None}


@pytest.mark.parametrize("completion", NO_ANSWER)
def test_a_text_without_an_answer(completion):
    assert final_answer(completion) is None


@pytest.mark.parametrize("answer", ["", "B", "x + 1", "18 or 20", "1e999999999", "{1, 2}"])
def test_it_does_not_apply_where_the_answer_is_not_a_number(answer):
    assert math_answer({"answer": answer}, "#### 1") is None


PIECES = [
    *(
        "9",
        " 9",
        "9 9",
        "9,999",
        ".9",
        "9/",
        "9 1/2 ",
        "9^",
        "9e9",
        "½",
        "¹",
        "-",
        "- ",
        "-$",
        "$",
        "9a",
        "a",
        "A 9: ",
    ),
    *(
        "{",
        "(",
        "[9, ",
        "9)",
        " ",
        "\n",
        "=",
        "= ",
        ">",
        "->",
        "<a",
        "<<9",
        "|",
        "*",
        "* ",
        "_",
        "'",
        "!",
        "%",
        "\\",
    ),
    *(
        "9, ",
        "9 and ",
        "and ((",
        "9 apples and ",
        "9 cm + ",
        "9 m/a",
        "9:",
        "x = 9, ",
        "not 9 ",
        "minus ",
        "9..",
    ),
    *("answer is ", "####", "#### a ", "#### 9 a", "<answer>", "<answer>9", "<think>", "</think>"),
    *(
        r"\boxed{",
        r"\boxed{9",
        r"\boxed{9}",
        r"\boxed{a}",
        r"\boxed{(",
        r"\frac",
        r"\frac{",
        r"\text{",
        r"\left(",
    ),
]


@pytest.mark.parametrize("piece", PIECES)
def test_every_character_is_read_a_few_times_at_most(piece, monkeypatch):
    """Text is searched for expressions in pieces that do not overlap, so that hostile text is read as fast as
    any."""
    read = []

    def counted(text):
        read.append(len(text))
        return expressions.expressions(text)

    monkeypatch.setattr(importlib.import_module(math_answer.__module__), "expressions", counted)
    text = piece * (1000 // len(piece))
    for completion in (text, "#### 9" + text, "the answer is" + text + "x", "(" * 500 + "9" + ")" * 500):
        read.clear()
        math_answer({"answer": "9"}, completion)
        assert sum(read) <= 3 * len(expressions.plain(completion)) + 9


@pytest.mark.parametrize("piece", PIECES)
def test_every_pattern_takes_linear_time(piece):
    """A quadratic one takes at least half a second for the first, and longer for the second."""
    for read, length in ((expressions.plain, 60_000), (expressions._TOKENS.findall, 15_000)):
        text = piece * (length // len(piece))
        began = time.process_time()
        read(text)
        assert time.process_time() - began < 0.3
