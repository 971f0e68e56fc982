"""Meshes and logical-axis rules: which array axis lies on which mesh axis.

Every parameter names its axes ("vocab", "embed", "heads", …), and rules map those names to the
four mesh axes. One table serves every family, so a new one needs no sharding code; each model may
have a table of its own (`parameter_rules`).
"""

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from uld_jax.errors import UserError

# The last axis has the most traffic, and gets the closest devices.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
EMBED_AXIS = "fsdp"

Rules = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
    "batch": BATCH_AXES,
    "rows": (*BATCH_AXES, "sequence"),
    "length": "sequence",
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


def parameter_rules(sharded: bool) -> Rules:
    """The rules of a model's parameters.

    Args:
        sharded: Whether each device of the fsdp axis holds a part of them (with the optimizer's
            moments: ZeRO-3) or all of them (the moments in parts: ZeRO-1).

    Returns:
        Logical axis to mesh axes.

    Example:
        >>> tuple(partition_spec(("vocab", "embed"), parameter_rules(sharded=False)))
        ('tensor', None)

    Reference:
        Rajbhandari et al., arXiv 1910.02054.
    """
    return RULES if sharded else {**RULES, "embed": None}


def mesh_shape(
    data: int,
    fsdp: int,
    tensor: int,
    device_count: int,
    *,
    sequence: int = 1,
    slices: int = 1,
) -> tuple[int, int, int, int]:
    """Fills in the one axis given as -1 and checks that the axes multiply to the device count.

    Args:
        data: Data-parallel shards, or -1 for the remaining devices.
        fsdp: Shards of parameters and batch, or -1.
        tensor: Shards of heads, MLP and vocabulary, or -1.
        device_count: Devices to place.
        sequence: Shards of every row's tokens, or -1.
        slices: Groups of devices with a fast network, which the data axis spans.

    Returns:
        The axis sizes in the order of `MESH_AXES`.

    Raises:
        UserError: More than one -1, a product that is not the device count, or slices that do not
            divide the data axis.

    Example:
        >>> mesh_shape(-1, 2, 2, device_count=8)
        (2, 2, 1, 2)
    """
    sizes = [data, fsdp, sequence, tensor]
    given = f"mesh ({', '.join(MESH_AXES)}) = {tuple(sizes)}"
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
    if slices < 1 or sizes[0] % slices:
        raise UserError(
            f"{given}: {slices} slices do not divide the {sizes[0]} shards of the data axis, which "
            f"spans them, of {device_count} devices; change config.mesh.slices or config.mesh.data"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    sequence: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
    keep_order: bool = False,
) -> Mesh:
    """Lays the devices out as a (data, fsdp, sequence, tensor) mesh.

    Between slices (of TPUs, or hosts of GPUs) the network is slower than within one. The data axis
    alone spans them, slice by slice: what crosses them is one sum of gradients a step.

    Args:
        data: Data-parallel shards, or -1 for the remaining devices.
        fsdp: Shards of parameters and batch, or -1.
        tensor: Shards of heads, MLP and vocabulary, or -1.
        sequence: Shards of every row's tokens, or -1.
        slices: How many there are. Devices that belong to none, such as CPUs, are cut into as many
            parts, in the order of their processes.
        devices: The devices; all of them by default.
        keep_order: Whether they stay in this order within a slice. For whole slices of TPUs jax
            has one that suits their network; for parts of them it has none.

    Returns:
        A mesh with the axes of `MESH_AXES`.

    Raises:
        UserError: The axes do not multiply to the number of devices, or the slices are not those
            that the devices belong to.

    Example:
        >>> make_mesh(1, 1, 1, devices=jax.devices()[:1]).axis_names
        ('data', 'fsdp', 'sequence', 'tensor')
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, tensor, len(devices), sequence=sequence, slices=slices)
    inner = (shape[0] // slices, *shape[1:])
    auto = (AxisType.Auto,) * len(MESH_AXES)
    parts = [
        np.array(part, object).reshape(inner)
        if keep_order
        else jax.make_mesh(inner, MESH_AXES, axis_types=auto, devices=part).devices
        for part in _by_slice(devices, slices)
    ]
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=auto)


def _by_slice(devices: Sequence[Any], slices: int) -> list[Sequence[Any]]:
    """The devices of each slice, as many in each."""
    own = [getattr(device, "slice_index", None) for device in devices]
    present = sorted({index for index in own if index is not None})
    # Hosts of GPUs need not be told apart, but jax has no order for several slices of TPUs.
    if slices == 1 and not (len(present) > 1 and devices[0].platform == "tpu"):
        return [devices]
    if not present:
        ordered, size = sorted(devices, key=lambda d: d.process_index), len(devices) // slices
        return [ordered[start : start + size] for start in range(0, len(devices), size)]
    parts = [[d for d, at in zip(devices, own, strict=True) if at == index] for index in present]
    if sorted({*map(len, parts)}) != [len(devices) // slices]:
        raise UserError(
            f"config.mesh.slices: expected {len(present)}, the slices that the {len(devices)} "
            f"devices belong to, with as many in each, got {slices} for parts of "
            f"{', '.join(str(len(part)) for part in parts)}"
        )
    return list(parts)


def fold_sequence(mesh: Mesh) -> Mesh:
    """The same devices in the same order, with those of the sequence axis as shards of the batch.

    For programs that read no long rows, such as generation, whose rows are then spread over all.

    Args:
        mesh: From `make_mesh`.

    Returns:
        A mesh whose sequence axis has size 1; arrays may stay as they lie on the other one.

    Example:
        >>> fold_sequence(make_mesh(1, 1, 1, devices=jax.devices()[:1])).shape["sequence"]
        1
    """
    data, fsdp, sequence, tensor = mesh.devices.shape
    devices = mesh.devices.reshape(data, fsdp * sequence, 1, tensor)
    return Mesh(devices, MESH_AXES, axis_types=mesh.axis_types)


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


def partition_spec(
    axes: Sequence[str | EllipsisType | None], rules: Rules = RULES
) -> PartitionSpec:
    """Maps logical axis names to mesh axes.

    Args:
        axes: One logical name an array axis, None for an axis that is never sharded, ... for one
            that is left to the compiler.
        rules: The map.

    Returns:
        The PartitionSpec.

    Raises:
        ValueError: An unknown name, or two axes of one array on the same mesh axis.

    Example:
        >>> tuple(partition_spec(("vocab", "embed")))
        ('tensor', 'fsdp')
    """
    unknown = [axis for axis in axes if isinstance(axis, str) and axis not in rules]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known: {sorted(rules)}")
    mapped = [rules[axis] if isinstance(axis, str) else None for axis in axes]
    used = [m for entry in mapped if entry for m in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} put one mesh axis on two array axes: {used}")
    return PartitionSpec(
        *(
            PartitionSpec.UNCONSTRAINED if axis is ... else entry
            for axis, entry in zip(axes, mapped, strict=True)
        )
    )


def named_sharding(
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int] | None = None,
    name: str = "array",
    rules: Rules = RULES,
) -> NamedSharding:
    """The NamedSharding of an array with these logical axes.

    Args:
        mesh: The device mesh.
        axes: One logical name an array axis.
        shape: The array's shape, to check that every sharded axis divides.
        name: What to call the array in an error.
        rules: Which mesh axis each logical axis lies on.

    Returns:
        The sharding.

    Raises:
        UserError: An axis that its mesh axis does not divide; says which array and axis.

    Example:
        >>> mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        >>> tuple(named_sharding(mesh, ("vocab", "embed"), (16, 8)).spec)
        ('tensor', 'fsdp')
    """
    spec = partition_spec(axes, rules)
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


def constrain(x: jax.Array, *axes: str | EllipsisType | None) -> jax.Array:
    """Pins an activation to its logical axes where a mesh is set (`jax.set_mesh`), else a no-op.

    Args:
        x: Any array inside a jitted function.
        *axes: See `partition_spec`.

    Returns:
        x.

    Example:
        >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
