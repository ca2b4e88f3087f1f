"""The typed batches that data loaders make and objectives read. Every field is described once, here.

B sequences, T positions. A batch is a plain NamedTuple of arrays: numpy on the host, global
`jax.Array`s once the loader has placed it.
"""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax.Array on the device: the fields do not care which.


class TokenBatch(NamedTuple):
    """Next-token prediction over packed documents (pretraining and instruction fine-tuning).

    Position t of `tokens` predicts position t of `targets`: the shift is already done.
    """

    tokens: Array  # int32 [B, T], what the model reads
    targets: Array  # int32 [B, T], what it should say next
    mask: Array  # bool [B, T], True where the target counts in the loss
    segment_ids: Array  # int32 [B, T], 1, 2, ... a document within its row; 0 is padding
    positions: Array  # int32 [B, T], distance from the start of the document within its row
