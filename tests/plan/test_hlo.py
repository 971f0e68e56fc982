"""What is read in the text of programs that XLA has really compiled, here for eight CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from uld_jax.plan import Program, Traffic
from uld_jax.plan.hlo import shape_bytes

AXES = ("rows", "columns")
ROWS = PartitionSpec("rows")


def compiled(function, *specs, shape=(8, 16), mesh_shape=(2, 4)):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(mesh_shape, AXES, axis_types=auto, devices=jax.devices()[:8])
    in_specs, out_specs = specs
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Program(jax.jit(mapped).lower(x).compile().as_text())


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs():
    def summed(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.psum(jnp.sin(y), "columns"), x)

    program = compiled(summed, ROWS, ROWS)
    size = 4 * 16 * 4  # f32[4, 16] on a device
    assert program.devices == 8
    assert program.endless == 0
    # Each device of a ring of four sends 3/4 twice.
    assert program.collectives() == {"all-reduce": Traffic(5, 5 * size, 5 * size * 1.5)}


def test_each_kind_is_counted_by_its_whole_array():
    def exchanged(x):
        whole = jax.lax.all_gather(x, "rows", tiled=True)
        part = jax.lax.psum_scatter(whole, "columns", tiled=True)
        turned = jax.lax.all_to_all(whole, "columns", 1, 1, tiled=True)
        return jax.lax.ppermute(part, "rows", [(0, 1), (1, 0)]), turned

    found = compiled(exchanged, ROWS, (PartitionSpec("columns"), PartitionSpec(None, "columns")))
    whole = 8 * 16 * 4
    traffic = found.collectives()
    assert traffic["all-gather"] == Traffic(1, whole, whole / 2)
    assert traffic["all-to-all"] == Traffic(1, whole, whole * 3 / 4)
    assert traffic["collective-permute"] == Traffic(1, whole / 4, whole / 4)
    # XLA's CPU backend may scatter by an all-reduce: either way the whole array is reduced.
    reduced = traffic.get("reduce-scatter") or traffic["all-reduce"]
    assert (reduced.count, reduced.bytes) == (1, whole)


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    def shrunk(x):
        return jax.lax.while_loop(
            lambda y: jax.lax.pmax(jnp.abs(y).max(), "rows") > 1, lambda y: y / 2, x
        )

    program = compiled(shrunk, ROWS, ROWS)
    assert program.endless == 1
    assert program.collectives() == {"all-reduce": Traffic(1, 4, 4)}


@pytest.mark.parametrize("runs", [1, 7])
def test_memory_traffic_grows_with_the_runs_of_a_loop(runs):
    def squared(w):
        def layer(x, w):
            return x @ w, None

        return jax.lax.scan(layer, jnp.ones((64, 64)), w)[0]

    w = jax.ShapeDtypeStruct((runs, 64, 64), jnp.float32)
    program = Program(jax.jit(squared).lower(w).compile().as_text())
    matrix = 64 * 64 * 4
    # A matrix is cut out (read, written), and the product reads two and writes one.
    assert 3 * runs * matrix <= program.memory_bytes() <= (8 * runs + 6) * matrix


def test_bytes_of_shapes():
    assert shape_bytes("s4[3,2]{1,0}") == 3
    assert shape_bytes("(pred[5], /*index=1*/f8e4m3fn[2]{0:T(128)})") == 7
    assert shape_bytes("token[]") == 0


# As a v5e program has them: a chain of fused steps of one gather, groups named by mesh axes, and
# a loop that does two steps at a time (1, 3, ... 11: six runs).
CHAIN = """
HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_computation.1 (param_0.1: bf16[2,32,64]) -> bf16[2,32,128] {
  %param_0.1 = bf16[2,32,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[2,32,128]{2,1,0:T(2,128)(2,1)} all-gather(%param_0.1), channel_id=3, \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={2}, frontend_attributes={chain_id="7"}
}

%async_collective_fusion.2 (param_0.2: bf16[2,32,64]) -> bf16[2,32,128] {
  %param_0.2 = bf16[2,32,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[2,32,128]{2,1,0:T(2,128)(2,1)} all-gather(%param_0.2), channel_id=3, \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={2}, frontend_attributes={chain_id="7"}
}

%add.1 (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.4 (input_0.1: bf16[8,8]) -> bf16[4,8] {
  %input_0.1 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all-reduce.4 = bf16[8,8]{1,0:T(8,128)(2,1)} all-reduce(%input_0.1), channel_id=5, \
replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add.1
  ROOT %slice.4 = bf16[4,8]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.4, %zero, %zero)
}

%body.1 (carry.1: (s32[], bf16[2,32,64])) -> (s32[], bf16[2,32,64]) {
  %carry.1 = (s32[]{:T(128)}, bf16[2,32,64]{2,1,0}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %next.1 = s32[]{:T(128)} add(%count.1, %two)
  %shard = bf16[2,32,64]{2,1,0} get-tuple-element(%carry.1), index=1
  %fusion.1 = bf16[2,32,128]{2,1,0} fusion(%shard), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = bf16[2,32,128]{2,1,0} fusion(%shard), kind=kOutput, calls=%async_collective_fusion.2
  %all-reduce.1 = bf16[2,32,64]{2,1,0} all-reduce(%shard), channel_id=13, \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add.1
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[2,32,64]{2,1,0}) tuple(%next.1, %all-reduce.1)
}

%condition.1 (carry.2: (s32[], bf16[2,32,64])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, bf16[2,32,64]{2,1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %count.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%count.2, %limit), direction=LT
}

ENTRY %main.1 (param.1: bf16[2,32,64], param.2: bf16[8,8]) -> bf16[4,8] {
  %param.1 = bf16[2,32,64]{2,1,0} parameter(0)
  %param.2 = bf16[8,8]{1,0} parameter(1)
  %start = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%start)
  %tuple.2 = (s32[]{:T(128)}, bf16[2,32,64]{2,1,0}) tuple(%copy.1, %param.1)
  %while.1 = (s32[]{:T(128)}, bf16[2,32,64]{2,1,0}) while(%tuple.2), condition=%condition.1, \
body=%body.1
  ROOT %fusion.4 = bf16[4,8]{1,0} fusion(%param.2), kind=kCustom, calls=%all-reduce-scatter.4
}
"""


def test_the_ways_of_a_tpu():
    program = Program(CHAIN)
    gathered, reduced, scattered = 2 * 32 * 128 * 2, 2 * 32 * 64 * 2, 8 * 8 * 2
    assert program.endless == 0
    assert program.collectives() == {
        "all-gather": Traffic(6, 6 * gathered, 6 * gathered / 2),
        "all-reduce": Traffic(6, 6 * reduced, 6 * reduced * 1.5),
        "reduce-scatter": Traffic(1, scattered, scattered / 2),
    }
