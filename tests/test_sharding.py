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
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((2, 4, 1), (2, 4, 1)),
        ((8, -1, 1), (8, 1, 1)),
    ],
)
def test_mesh_shape(given, expected):
    assert sharding.mesh_shape(*given, device_count=8) == expected
    assert tuple(sharding.make_mesh(*given).shape.values()) == expected


@pytest.mark.parametrize(
    "given", [(3, -1, 1), (2, 2, 1), (0, -1, 1), (-2, 4, 1), (8, 2, 1), (16, -1, 1), (-2, -4, 1)]
)
def test_axes_that_do_not_fit_the_devices(given):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(*given)
    message = str(caught.value)
    assert str(given) in message
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
