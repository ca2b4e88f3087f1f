"""The loss mask is visible: tokens outside the loss are in brackets."""

import pytest

from jaxllm.data.chat_template import NativeTemplate
from jaxllm.data.show import one_line, printable, show_mask


@pytest.fixture(scope="module")
def row(tokenizer):
    messages = [
        {"role": "user", "content": "Who left\n the  ball?"},
        {"role": "assistant", "content": "Ada, 漢."},
    ]
    return NativeTemplate(tokenizer).encode(messages, loss_on="assistant")


def test_tokens_outside_the_loss_are_in_brackets_and_special_tokens_by_name_on_one_line(row, tokenizer):
    assert show_mask(*row, tokenizer) == (
        "⟦<s><|user|>Who left\\n the  ball?<|end|><|assistant|>⟧Ada, 漢.<|end|>"
    )


def test_color_dims_tokens_outside_the_loss_and_marks_the_others_green(row, tokenizer):
    shown = show_mask(*row, tokenizer, color=True)
    assert shown.startswith("\033[2m⟦<s>")
    assert shown.endswith("⟧\033[0m\033[32mAda, 漢.<|end|>\033[0m")


def test_repeated_special_tokens_are_each_shown(tokenizer):
    pad = tokenizer.pad_id
    assert show_mask([pad, pad, tokenizer.eos_id], [False, False, True], tokenizer) == "⟦<pad><pad>⟧</s>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07\tc\nd\x9b\r", "a[2Jb\tc\nd"),
        ("a\u2028b\u202ec\u2066d", "abcd"),  # line breaks of their own; text that runs backwards
        ("half \ud83d", "half "),  # cannot be encoded
        # Invisible, and part of the text: joiners of Persian, Hindi and emoji, marks of direction, spaces.
        *[(text, text) for text in ("می\u200cخواهم", "क\u094d\u200dष", "👩\u200d👧", "\u200fא!\u200e")],
        *[(text, text) for text in ("10\u00a0km", "1\u202f000", "漢\u3000字", "co\u00adop", "\ue000")],
    ],
)
def test_printable_text_loses_what_controls_the_terminal_and_nothing_else(text, shown):
    assert printable(text) == shown
    assert one_line(text) == shown.replace("\n", "").replace("\t", "")


def test_a_text_cannot_control_the_terminal(tokenizer):
    ids = tokenizer.encode("a\r\033[31mb\x9b2J\u2028c\td")
    assert show_mask(ids, [True] * len(ids), tokenizer) == "a\\r\\x1b[31mb\\x9b2J\\u2028c\\td"
