"""Examples in columns, as a cache holds them, without its files."""

import numpy as np

from jaxllm.data.examples import COLUMNS, Columns, ExampleRows, as_columns


def in_memory(examples) -> ExampleRows:
    """The rows of these examples."""
    arrays = {
        name: np.frombuffer(each, COLUMNS[name]) if isinstance(each, bytes) else each
        for name, each in as_columns(examples, [each.content for each in examples]).items()
    }
    ids = [ids for each in examples for ids in each.ids]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in ids])])
    columns = Columns(np.concatenate(ids), offsets, arrays, {each.kind for each in examples})
    return ExampleRows(columns, np.arange(len(examples)))
