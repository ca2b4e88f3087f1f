"""The shapes of a run's rollouts are those of its config, and its mesh must be able to split their rows."""

import pytest
from tiny_runs import parse_config

from jaxllm.errors import ConfigError
from jaxllm.parallel.sharding import MeshConfig, make_mesh
from jaxllm.rl.rollouts import rollout_shapes

MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def config(decode_batch_size):
    return parse_config("smoke.py:grpo", {"rollout.decode_batch_size": str(decode_batch_size)})


@pytest.mark.parametrize(("rows", "sizes"), [(6, "4 or 8"), (2, "4")])
def test_rows_that_cannot_be_split_over_the_devices_are_an_error(rows, sizes):
    message = rf"rollout.decode_batch_size={rows} is not divisible by mesh.data x mesh.fsdp = 4: use {sizes}$"
    with pytest.raises(ConfigError, match=message):
        rollout_shapes(config(rows), MESH)


def test_every_batch_is_split_over_the_devices():
    shapes = rollout_shapes(config(64), MESH)
    assert all(rows % 4 == 0 for rows in shapes.batches)
    assert shapes.sizes[0] >= config(64).data.sequence_length - config(64).rollout.sampling.max_new_tokens
