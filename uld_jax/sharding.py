"""Meshes and logical-axis rules: which array axis lies on which mesh axis.

Every parameter names its axes ("vocab", "embed", "heads", …); `RULES` maps those names to the
three mesh axes. One table serves every model, so a new family needs no sharding code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from uld_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
EMBED_AXIS = "fsdp"

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "layers": None,
    "vocab": "tensor",
    "embed": EMBED_AXIS,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "narrow": None,
    "positions": None,
    "norm": None,
}


def mesh_shape(data: int, fsdp: int, tensor: int, device_count: int) -> tuple[int, int, int]:
    """Fills in the one axis given as -1 and checks that the axes multiply to the device count.

    Args:
        data: Data-parallel shards, or -1 for the remaining devices.
        fsdp: Shards of parameters and batch, or -1.
        tensor: Shards of heads, MLP and vocabulary, or -1.
        device_count: Devices to place.

    Returns:
        The three axis sizes.

    Raises:
        UserError: More than one -1, or a product that is not the device count.

    Example:
        >>> mesh_shape(-1, 2, 2, device_count=8)
        (2, 2, 2)
    """
    sizes = [data, fsdp, tensor]
    given = "mesh (data, fsdp, tensor) = " + str((data, fsdp, tensor))
    if sizes.count(-1) > 1:
        raise UserError(f"{given}: at most one axis may be -1 (the remaining devices)")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and known > 0 and device_count % known == 0:
        sizes[sizes.index(-1)] = device_count // known
    if min(sizes) < 1 or int(np.prod(sizes)) != device_count:
        raise UserError(
            f"{given} does not multiply to the {device_count} devices present: "
            "change config.mesh.* (one axis may be -1)"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    keep_order: bool = False,
) -> Mesh:
    """Lays the devices out as a (data, fsdp, tensor) mesh.

    Args:
        data: Data-parallel shards, or -1 for the remaining devices.
        fsdp: Shards of parameters and batch, or -1.
        tensor: Shards of heads, MLP and vocabulary, or -1.
        devices: The devices; all of them by default.
        keep_order: Whether they stay in this order. For whole slices of TPUs jax has one that
            suits their network; for parts of them it has none.

    Returns:
        A mesh with the axes "data", "fsdp" and "tensor".

    Raises:
        UserError: The axes do not multiply to the number of devices.

    Example:
        >>> make_mesh(1, 1, 1, devices=jax.devices()[:1]).axis_names
        ('data', 'fsdp', 'tensor')
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, tensor, len(devices))
    auto = (AxisType.Auto,) * len(MESH_AXES)
    if keep_order:
        return Mesh(np.array(devices, object).reshape(shape), MESH_AXES, axis_types=auto)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)


def split_devices(counts: Sequence[int], devices: Sequence[Any] | None = None) -> list[list[Any]]:
    """Divides every process's devices alike, so that each part has some of each process.

    Args:
        counts: Devices of a process in each part but the first.
        devices: To be divided; all of them by default.

    Returns:
        What is left, and then the parts, the first of them at the end of each process's devices.

    Raises:
        UserError: A process has too few to leave any.

    Example:
        >>> device = jax.devices()[0]
        >>> [len(part) for part in split_devices([2, 1], 4 * [device])]
        [1, 2, 1]
    """
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices() if devices is None else devices:
        by_process.setdefault(device.process_index, []).append(device)
    parts: list[list[Any]] = [[] for _ in (0, *counts)]
    for process, left in sorted(by_process.items()):
        if sum(counts) >= len(left):
            raise UserError(
                f"process {process} has {len(left)} devices: expected more than the "
                f"{sum(counts)} that streaming teachers take of each (teacher.devices)"
            )
        for part, count in zip(parts[1:], counts, strict=True):
            part += left[len(left) - count :]
            left = left[: len(left) - count]
        parts[0] += left
    return parts


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards that the batch axis is cut into.

    Example:
        >>> batch_shards(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        1
    """
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def platform() -> str:
    """What a program is traced for: the mesh's devices where one is set, else this machine's.

    Returns:
        "cpu", "gpu" or "tpu".

    Example:
        >>> platform() == jax.default_backend()
        True
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Maps logical axis names to mesh axes.

    Args:
        axes: One logical name an array axis, None for an axis that is never sharded.

    Returns:
        The PartitionSpec.

    Raises:
        ValueError: An unknown name, or two axes of one array on the same mesh axis.

    Example:
        >>> tuple(partition_spec(("vocab", "embed")))
        ('tensor', 'fsdp')
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known: {sorted(RULES)}")
    mapped = [None if axis is None else RULES[axis] for axis in axes]
    used = [m for entry in mapped if entry for m in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} put one mesh axis on two array axes: {used}")
    return PartitionSpec(*mapped)


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None, name: str = "array"
) -> NamedSharding:
    """The NamedSharding of an array with these logical axes.

    Args:
        mesh: The device mesh.
        axes: One logical name an array axis.
        shape: The array's shape, to check that every sharded axis divides.
        name: What to call the array in an error.

    Returns:
        The sharding.

    Raises:
        UserError: An axis that its mesh axis does not divide; says which array and axis.

    Example:
        >>> mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        >>> tuple(named_sharding(mesh, ("vocab", "embed"), (16, 8)).spec)
        ('tensor', 'fsdp')
    """
    spec = partition_spec(axes)
    for axis, size, entry in zip(axes, shape or (), spec, strict=False):
        shards = 1
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            shards *= mesh.shape[mesh_axis]
        if size % shards:
            raise UserError(
                f"{name}: axis '{axis}' has size {size}, which the mesh axis {entry} of size "
                f"{shards} does not divide; choose config.mesh.* so that it does"
            )
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes where a mesh is set (`jax.set_mesh`), else a no-op.

    Args:
        x: Any array inside a jitted function.
        *axes: One logical name an array axis.

    Returns:
        x.

    Example:
        >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
