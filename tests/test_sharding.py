"""Meshes, logical axes and their errors, on eight fake CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from uld_jax import sharding
from uld_jax.errors import UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1, 1)),
        ((1, -1, 2), (1, 4, 1, 2)),
        ((2, 2, -1), (2, 2, 1, 2)),
        ((2, 4, 1), (2, 4, 1, 1)),
        ((8, -1, 1), (8, 1, 1, 1)),
        ((1, 2, 1, -1), (1, 2, 4, 1)),
        ((-1, 1, 2, 2), (2, 1, 2, 2)),
    ],
)
def test_mesh_shape(given, expected):
    first, sequence = given[:3], (*given[3:], 1)[0]
    assert sharding.mesh_shape(*first, device_count=8, sequence=sequence) == expected
    mesh = sharding.make_mesh(*first, sequence=sequence)
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")


@pytest.mark.parametrize(
    "given", [(3, -1, 1), (2, 2, 1), (0, -1, 1), (-2, 4, 1), (8, 2, 1), (16, -1, 1), (-2, -4, 1)]
)
def test_axes_that_do_not_fit_the_devices(given):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(*given)
    message = str(caught.value)
    data, fsdp, tensor = given
    assert f"mesh (data, fsdp, sequence, tensor) = {(data, fsdp, 1, tensor)}" in message
    assert "8 devices" in message
    assert "config.mesh" in message
    assert "\n" not in message


def test_two_free_axes():
    with pytest.raises(UserError, match="at most one axis may be -1"):
        sharding.mesh_shape(-1, -1, 1, device_count=8)


def test_mesh_of_some_devices():
    mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[2:4])
    assert mesh.devices.flatten().tolist() == jax.devices()[2:4]


def test_parts_of_the_devices_have_some_of_each_process():
    class Device:
        def __init__(self, number):
            self.number, self.process_index = number, number // 4 % 2

    devices = [Device(number) for number in (4, 5, 6, 7, 0, 1, 2, 3)]
    parts = sharding.split_devices([2, 1], devices)
    assert [[d.number for d in part] for part in parts] == [[0, 4], [2, 3, 6, 7], [1, 5]]
    assert sharding.split_devices([]) == [jax.devices()]
    with pytest.raises(UserError, match="process 0 has 4 devices: expected more than the 4 that"):
        sharding.split_devices([3, 1], devices)


def test_the_order_of_devices_is_kept():
    devices = jax.devices()[5:1:-1]
    mesh = sharding.make_mesh(2, 1, 2, devices=devices, keep_order=True)
    assert mesh.devices.flatten().tolist() == devices


def test_batch_shards():
    assert sharding.batch_shards(sharding.make_mesh(2, 2, 2)) == 4
    assert sharding.batch_shards(sharding.make_mesh(2, 1, 2, sequence=2)) == 2


class Device:
    """Of a machine that tests do not have; the mesh is never computed on."""

    platform = "gpu"

    def __init__(self, number, slice_index=None):
        self.number, self.process_index = number, number // 2
        if slice_index is not None:
            self.slice_index = slice_index


def slices_of(mesh, slice_of):
    """The slices that each place of the data axis has devices of."""
    return [{slice_of(device) for device in part.flat} for part in mesh.devices]


@pytest.mark.parametrize("slices", [2, 4])
def test_the_data_axis_alone_spans_the_slices(slices):
    mesh = sharding.make_mesh(4, 1, 2, slices=slices)
    order = jax.devices()
    each = [order.index(device) * slices // 8 for device in mesh.devices.flat]
    by_place = [{*each[2 * place : 2 * place + 2]} for place in range(4)]
    assert by_place == [{place * slices // 4} for place in range(4)]
    x = jax.device_put(np.arange(8.0), sharding.named_sharding(mesh, ("batch",)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2,)}


def test_slices_of_machines_are_told_apart_by_the_devices():
    devices = [Device(number, slice_index=number % 2) for number in range(8)]
    mesh = sharding.make_mesh(2, 2, 2, slices=2, devices=devices, keep_order=True)
    assert slices_of(mesh, lambda d: d.slice_index) == [{0}, {1}]
    # Without slices: contiguous, process by process, in whatever order they were given.
    devices = [Device(number) for number in (6, 7, 0, 1, 2, 3, 4, 5)]
    mesh = sharding.make_mesh(2, 1, 2, sequence=2, slices=2, devices=devices, keep_order=True)
    assert slices_of(mesh, lambda d: d.process_index // 2) == [{0}, {1}]


@pytest.mark.parametrize(
    ("data", "slices", "of_each", "message"),
    [
        (-1, 3, None, "3 slices do not divide the 8 shards of the data axis"),
        (2, 4, None, "4 slices do not divide the 2 shards of the data axis"),
        (8, 0, None, "0 slices do not divide"),
        (8, 4, lambda number: number % 2, "config.mesh.slices: expected 2, the slices that the 8"),
        (8, 2, lambda number: number // 5, "got 2 for parts of 5, 3"),
        (8, 2, lambda number: 0, "config.mesh.slices: expected 1, the slices"),
    ],
)
def test_slices_that_do_not_fit(data, slices, of_each, message):
    devices = [Device(number, of_each and of_each(number)) for number in range(8)]
    rest = {"keep_order": True, "fsdp": 1 if data in (-1, 8) else 4}
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(data, slices=slices, devices=devices, **rest)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slices_of_tpus_must_be_named():
    devices = [Device(number, slice_index=number // 4) for number in range(8)]
    assert sharding.make_mesh(8, devices=devices, keep_order=True).devices.size == 8
    for device in devices:
        device.platform = "tpu"
    with pytest.raises(UserError, match="expected 2, the slices that the 8 devices belong to"):
        sharding.make_mesh(8, devices=devices, keep_order=True)


def test_parameters_may_be_whole_on_the_fsdp_axis():
    whole, cut = (sharding.parameter_rules(sharded) for sharded in (False, True))
    assert cut == sharding.RULES
    axes = ("layers", "embed", "mlp")
    assert sharding.partition_spec(axes, whole) == PartitionSpec(None, None, "tensor")
    mesh = sharding.make_mesh(1, 4, 2)
    # What does not divide is not cut.
    named = sharding.named_sharding(mesh, axes, (2, 5, 4), rules=whole)
    assert named.shard_shape((2, 5, 4)) == (2, 5, 2)
    with pytest.raises(UserError, match="'embed' has size 5"):
        sharding.named_sharding(mesh, axes, (2, 5, 4), rules=cut)


def test_partition_spec():
    assert sharding.partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert sharding.partition_spec(("layers", "embed", "heads")) == PartitionSpec(
        None, "fsdp", "tensor"
    )


def test_one_mesh_axis_on_two_array_axes():
    with pytest.raises(ValueError, match=r"\('vocab', 'mlp'\).*'tensor', 'tensor'"):
        sharding.partition_spec(("vocab", "mlp"))
    with pytest.raises(ValueError, match="one mesh axis on two array axes"):
        sharding.partition_spec(("batch", "embed"))


def test_unknown_logical_axis():
    with pytest.raises(ValueError, match=r"unknown logical axes \['vocabulary'\]; known: .*vocab"):
        sharding.partition_spec(("vocabulary", "embed"))


def test_named_sharding_places_shards():
    mesh = sharding.make_mesh(2, 2, 2)
    placed = sharding.named_sharding(mesh, ("vocab", "embed"), (6, 4))
    x = jax.device_put(np.arange(24.0).reshape(6, 4), placed)
    assert {shard.data.shape for shard in x.addressable_shards} == {(3, 2)}
    # Without a shape there is nothing to check.
    assert sharding.named_sharding(mesh, ("vocab", "embed")) == placed


@pytest.mark.parametrize(
    ("axes", "shape", "parts"),
    [
        (("vocab", "embed"), (7, 4), ["'vocab'", "size 7", "tensor", "size 2"]),
        (("vocab", "embed"), (8, 5), ["'embed'", "size 5", "fsdp", "size 2"]),
        (("batch", None), (6, 3), ["'batch'", "size 6", "data", "fsdp", "size 4"]),
    ],
)
def test_an_axis_that_does_not_divide(axes, shape, parts):
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(UserError) as caught:
        sharding.named_sharding(mesh, axes, shape, "blocks.mlp.up")
    message = str(caught.value)
    assert message.startswith("blocks.mlp.up: ")
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


def test_an_axis_left_to_the_compiler_stays_as_it_is():
    mesh = sharding.make_mesh(2, 1, 2, sequence=2)
    x = jax.device_put(np.zeros((4, 6, 8)), sharding.named_sharding(mesh, (None, "length", "mlp")))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(2 * x, "batch", None, ...))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 6, 4)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "batch", None) is x


def test_constrain_pins_the_layout():
    mesh = sharding.make_mesh(2, 2, 2)
    pinned = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "vocab"))
    with jax.set_mesh(mesh):
        y = pinned(jnp.zeros((8, 6)))
    assert y.sharding.is_equivalent_to(sharding.named_sharding(mesh, ("batch", "vocab")), 2)
    np.testing.assert_array_equal(y, np.ones((8, 6)))
