"""Token sequences as readable text, with the loss mask visible."""

import itertools
import re
from collections.abc import Iterable

from jaxllm.data.tokenizer import BaseTokenizer

# Characters that control the terminal, break lines, reorder the text around them, or cannot be encoded. Other
# invisible ones stay: without U+200C and U+200D Persian, Hindi and emoji read differently.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_DIM, _GREEN, _RESET = "\033[2m", "\033[32m", "\033[0m"


def printable(text: str) -> str:
    """`text` without control characters, so that a model's output cannot control the terminal."""
    return _CONTROLS.sub(lambda control: control[0] if control[0] in "\n\t" else "", text)


def one_line(text: str) -> str:
    """`printable` text without line breaks and tabs."""
    return _CONTROLS.sub("", text)


def show_mask(
    ids: Iterable[int], loss_mask: Iterable[bool], tokenizer: BaseTokenizer, *, color: bool = False
) -> str:
    """The ids as text on one line: tokens outside the loss in ⟦ ⟧ (dim in color), special tokens by name."""
    names = {i: piece for piece, i in tokenizer.special_ids.items()}
    shown = ""
    for in_loss, group in itertools.groupby(
        zip(ids, loss_mask, strict=True), key=lambda token: bool(token[1])
    ):
        text = ""
        for name, part in itertools.groupby(group, key=lambda token: names.get(int(token[0]))):
            tokens = [int(i) for i, _ in part]
            text += name * len(tokens) if name else tokenizer.decode(tokens, from_start=False)
        text = _CONTROLS.sub(lambda control: repr(control[0])[1:-1], text)
        text = text if in_loss else f"⟦{text}⟧"
        shown += f"{_GREEN if in_loss else _DIM}{text}{_RESET}" if color else text
    return shown
