"""The names by which clients choose among the served checkpoints."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import ConfigError

# A name has no slash, so that runs/lr=0.1 is a path.
_NAMED = re.compile(r"([^/=]+)=(.+)")


def name_checkpoints(checkpoints: Sequence[str]) -> dict[str, str]:
    """Paths by name, in the order of `checkpoints`, each of which is NAME=PATH or PATH.

    Without NAME, the name is the shortest end of the path that distinguishes it from the others: `sft` for
    runs/sft; `a/sft` and `b/sft` where both are served. RUN/best and RUN/checkpoints/STEP are named after
    their run: `sft/best`, `sft/200`. Raises ConfigError where a checkpoint or a name is given twice.
    """
    given = [split_name(checkpoint) for checkpoint in checkpoints]
    parts = [name_parts(path) for _, path in given]
    for i, (_, path) in enumerate(given):
        if parts[i] in parts[:i]:
            raise ConfigError(f"--checkpoint names {path} twice; remove one of them")
    unnamed = [each for (name, _), each in zip(given, parts, strict=True) if name is None]
    taken = {name for name, _ in given if name is not None}
    named: dict[str, str] = {}
    for (name, path), each in zip(given, parts, strict=True):
        name = name or shortest_name(each, [other for other in unnamed if other != each], taken)
        if name in named:
            raise ConfigError(f"--checkpoint uses the name {name!r} twice; give each its own by NAME=PATH")
        named[name] = path
    return named


def split_name(checkpoint: str) -> tuple[str | None, str]:
    """NAME, if there is one, and PATH."""
    match = _NAMED.fullmatch(checkpoint)
    if match is None or Path(checkpoint).exists():
        return None, checkpoint
    return match[1], match[2]


def name_parts(path: str) -> tuple[str, ...]:
    """The components of a path that names are made of: those of RUN, then `best` or STEP."""
    parts = Path(os.path.abspath(os.path.expanduser(path))).parts
    parts = parts[1:] or parts  # without the root
    step = parts[-1:] if ends_in_step(parts) else ()
    run = parts[: len(parts) - len(step)]
    return (*(run[:-1] if run[-1:] == ("checkpoints",) else run), *step)


def ends_in_step(parts: Sequence[str]) -> bool:
    return parts[-1] == "best" or parts[-1].isdecimal()


def shortest_name(parts: Sequence[str], others: Sequence[Sequence[str]], taken: set[str]) -> str:
    """The shortest end of `parts` that is not in `taken` and that none of `others` ends in."""
    for count in range(2 if ends_in_step(parts) else 1, len(parts)):
        name = "/".join(parts[-count:])
        if name not in taken and all(other[-count:] != parts[-count:] for other in others):
            return name
    return "/".join(parts)
