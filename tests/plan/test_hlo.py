"""What the text of a compiled program says of its collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.parallel.sharding import AXES, MeshConfig, make_mesh
from jaxllm.plan.hlo import Collective, axis_of, read_program, trip_count

MESH = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
ROWS, COLUMNS = 64, 128


@pytest.fixture(scope="module")
def reading():
    """Of a program that sends arrays of known sizes, some of them in loops of known lengths."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def inner(x, _):  # 3 times
        return jax.lax.psum(x, "fsdp") * 0.5, None

    def outer(x, _):  # 5 times
        x, _ = jax.lax.scan(inner, x, None, length=3)
        whole = jax.lax.all_gather(x, "tensor", axis=0, tiled=True)
        return x + jnp.tanh(whole).sum(axis=0), None

    def program(x):
        x, _ = jax.lax.scan(outer, x, None, length=5)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return jax.lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=0, tiled=True)

    sharded = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    run = sharded(program, in_specs=P(), out_specs=P(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), np.float32)
    return read_program(jax.jit(run).lower(x).compile().as_text(), dict(mesh.shape))


@pytest.mark.parametrize(
    ("op", "axis", "devices", "count", "arrays"),
    [
        ("all-reduce", "fsdp", 2, 15, 15),
        ("all-gather", "tensor", 2, 5, 10),  # each gathers two
        ("collective-permute", "data", 2, 1, 1),
        ("reduce-scatter", "data x fsdp", 4, 1, 1),
    ],
)
def test_collectives_count_as_often_as_their_loops_run(reading, op, axis, devices, count, arrays):
    size = arrays * ROWS * COLUMNS * 4.0
    assert Collective(op, axis, devices, count, size) in reading.collectives
    assert len(reading.collectives) == 4
    assert reading.unknown_loops == 0


def test_a_loop_whose_end_depends_on_data_counts_once():
    mesh = make_mesh(MeshConfig(data=8, fsdp=1, tensor=1))

    def program(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jax.lax.psum(x, "data"), x)

    run = jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(run).lower(jax.ShapeDtypeStruct((8,), np.float32)).compile().as_text()
    found, unknown, _ = read_program(text, dict(mesh.shape))
    assert (found, unknown) == ([Collective("all-reduce", "data", 8, 1, 32.0)], 1)


# As the compilers of TPUs and GPUs write: a collective in pieces, of several arrays, and fused with a slice.
OTHERS = """
HloModule jit_train_step, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %compare = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%start.1 (p: bf16[160,432]) -> bf16[320,432] {
  %all-gather.1 = bf16[320,432]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, replica_groups={{0,2},{4,6},{1,3},{5,7}}, dimensions={0}
  ROOT %custom-call.1 = (bf16[160,432]{1,0}, bf16[320,432]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: bf16[160,432]) -> bf16[320,432] {
  %all-gather.2 = bf16[320,432]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,2},{4,6},{1,3},{5,7}}, dimensions={0}
}

%done.1 (p: bf16[160,432]) -> bf16[320,432] {
  %all-gather.3 = bf16[320,432]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,2},{4,6},{1,3},{5,7}}, dimensions={0}
  ROOT %custom-call.2 = bf16[320,432]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%async_collective_fusion.8 (p: bf16[8,8]) -> bf16[16,8] {
  %all-gather.4 = bf16[320,432]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,2},{4,6},{1,3},{5,7}}, dimensions={0}
  %custom-call.3 = bf16[320,432]{1,0} custom-call(%all-gather.4), custom_call_target="AsyncCollectiveDone"
  %all-gather.5 = bf16[16,8]{1,0} all-gather(%p), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  ROOT %custom-call.4 = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) custom-call(%all-gather.5), custom_call_target="AsyncCollectiveStart"
}

%all-reduce-scatter.1 (input: f32[2048,320]) -> f32[512,320] {
  %all-reduce.9 = f32[2048,320]{1,0:T(8,128)} all-reduce(%input), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = bf16[320,432]{1,0} fusion(%x), kind=kOutput, calls=%start.1
  %fusion.2 = bf16[320,432]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.7
  %fusion.3 = bf16[320,432]{1,0} fusion(%x), kind=kOutput, calls=%done.1, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0:T(128)}) while(%tuple), condition=%cond, body=%body
  %fusion.5 = bf16[16,8]{1,0} fusion(%z), kind=kOutput, calls=%async_collective_fusion.8
  %fusion.4 = f32[512,320]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"5"}
  %all-gather-start.1 = ((bf16[160,256]{1,0}, bf16[160,128]{1,0}), (bf16[320,256]{1,0}, /*index=5*/bf16[320,128]{1,0})) all-gather-start(%a, %b), replica_groups=[4,2]<=[8], dimensions={0}
  %all-gather-done.1 = (bf16[320,256]{1,0}, bf16[320,128]{1,0}) all-gather-done(%all-gather-start.1)
  %permute.1 = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %all-reduce-start.1 = bf16[1024,320]{1,0} all-reduce-start(%d), replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_the_texts_of_other_compilers_read_the_same():
    found, unknown, cycles = read_program(OTHERS, MESH)
    assert cycles == 7 * 100 + 5
    assert unknown == 0
    assert sorted(found) == [
        ("all-gather", "fsdp", 2, 7, 7 * 320 * 432 * 2.0),
        (
            "all-gather",
            "tensor",
            2,
            2,
            320 * 384 * 2.0 + 16 * 8 * 2.0,
        ),  # of which one in a piece that ends another
        ("all-reduce", "data x fsdp x tensor", 8, 1, 1024 * 320 * 2.0),
        ("collective-permute", "data", 2, 1, 8 * 128 * 2.0),
        ("reduce-scatter", "data x fsdp", 4, 1, 2048 * 320 * 4.0),
    ]


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("[2,4]<=[4,2]T(1,0)", "data x fsdp"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ""),
        ("{}", "data x fsdp x tensor"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "data x fsdp"),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "tensor"),
    ],
)
def test_the_axis_of_a_collective_is_that_along_which_its_devices_differ(groups, axis):
    assert tuple(MESH) == AXES
    assert axis_of(f"all-reduce(%x), replica_groups={groups}, to_apply=%add", MESH)[0] == axis


def test_a_condition_of_two_limits_has_no_trip_count():
    lines = ["  %a = s32[] constant(7)", "  %b = s32[] constant(9)", "  compare(%i, %a), direction=LT"]
    assert trip_count("while(%x), condition=%c, body=%b", {"c": lines}) is None
