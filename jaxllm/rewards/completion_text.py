"""Where in a completion its answer stands: after its thought, in the last of its tags."""

import re

_THINK = re.compile(r"<(/?)think>")


def after_thought(completion: str) -> str | None:
    """The text after the last `</think>`, or all of it where nothing is thought; None for a thought that is
    cut off, or that begins again and has no end."""
    marks = list(_THINK.finditer(completion))
    if not marks:
        return completion
    return completion[marks[-1].end() :] if marks[-1][1] else None


def last_tagged(text: str, tag: str) -> str | None:
    """The content of the last `<tag>` that has a digit in it, up to its end tag or the end of the text; "" if
    none has; None where there is no such tag."""
    contents = [part.partition(f"</{tag}>")[0] for part in text.split(f"<{tag}>")[1:]]
    if not contents:
        return None
    return next((content for content in reversed(contents) if re.search("[0-9]", content)), "")
