"""A conversation as one training row: token ids, and which of them the loss counts."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxllm.errors import ConfigError

LOSS_ON = ("assistant", "last", "all")


class Encoded(NamedTuple):
    """A conversation as a training row."""

    ids: list[int]
    loss_mask: list[bool]  # of the same length: True where the loss counts the token as a target


def joined(pieces: Sequence[tuple[list[int], bool]], loss_on: str) -> Encoded:
    """Pieces (ids, whether they are an assistant's) as one row."""
    if loss_on not in LOSS_ON:
        raise ConfigError(f"data.loss_on={loss_on!r}: choose one of {', '.join(LOSS_ON)}")
    last_turn = max(i for i, (_, by_assistant) in enumerate(pieces) if by_assistant)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for i, (piece, by_assistant) in enumerate(pieces):
        in_loss = loss_on == "all" or (by_assistant and (loss_on == "assistant" or i == last_turn))
        ids += piece
        loss_mask += [in_loss] * len(piece)
    loss_mask[0] = False  # the first token is never a target
    return Encoded(ids, loss_mask)
